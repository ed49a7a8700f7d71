"""Records, images and the loader: speed and memory.

    python bench/data.py                        20,000 records of the modelled mixture
    python bench/data.py --records 665298       all of it (1.0 GB of JSON; some minutes, 3 GB of disk)
    python bench/data.py --records 10000000 --words 12 --skip-list   ten million short ones

The lengths are bench/plan.py's, the words come from this repository, the tokenizer is its small Llama-style one.
Each figure of memory is taken in a process of its own. Private memory is what a process has written and shares with
none: pages of a mapped file belong to the system, which may drop them.
"""

import argparse
import json
import multiprocessing
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from plan import cpu_name, draw
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import CLIPImageProcessorPil

from llava_nb.conversation import get_template
from llava_nb.dataset import encode
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.store.conversion import validate_files
from llava_nb.store.shards import Shards, write_shards
from llava_nb.store.validate import BLOCK, RecordValidator

ROOT = Path(__file__).parent.parent
gate = lambda: RecordValidator(get_template("v1"), Encoder(tiny_tokenizer(), 2048, 576, 2048))  # noqa: E731


def write(path: Path, n: int, words: int | None, seed: int = 0) -> None:
    "A JSON list of `n` records: as many words as the mixture's, or `words` each; images are named, none exist."
    vocabulary = np.array(sorted(set(re.findall(r"[a-z]{2,}", (ROOT / "README.md").read_text().lower()))))
    d, rng = draw(seed), np.random.default_rng(seed)
    size, picture = np.resize(d["words"], n), np.resize(d["image"], n)
    with path.open("w") as f:
        f.write("[")
        for k in range(n):
            count = int(words or size[k])
            said, turns = vocabulary[rng.integers(len(vocabulary), size=max(count, 2))], max(1, min(8, count // 20))
            texts = [" ".join(t) or "so" for t in np.array_split(said, 2 * turns)]
            if picture[k]:
                texts[0] = "<image>\n" + texts[0]
            conversation = [{"from": ("human", "gpt")[j % 2], "value": t} for j, t in enumerate(texts)]
            record = (
                {"id": f"{k:09}"}
                | ({"image": f"coco/train2017/{k:012}.jpg"} if picture[k] else {})
                | {"conversations": conversation}
            )
            f.write((",\n" if k else "") + json.dumps(record))
        f.write("]")


class Listed(Dataset):
    "Records as a list of dictionaries in every process, the reference's way."

    def __init__(self, path: Path):
        self.records, self.gate = json.loads(path.read_text()), gate()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return torch.tensor(encode(self.records[i], self.gate.template, self.gate.encoder).input_ids)


class Mapped(Listed):
    "Records mapped from their conversion."

    def __init__(self, path: Path, cache: Path):
        self.gate = gate()
        self.records = validate_files(path, self.gate, cache)


def private(process: psutil.Process) -> float:
    "MB that a process has written and does not share. Linux tells it; elsewhere pages of a mapped file count with it."
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return process.memory_full_info().uss / 2**20
    return int(re.search(r"Private_Dirty:\s+(\d+)", rollup.read_text())[1]) / 2**10


def weigh(kind: str, path: Path, cache: Path, items: int, workers: int, out) -> None:
    "In a fresh process: seconds to open; private MB of the rank and of a worker; records per second."
    torch.set_num_threads(1)
    me, before, start = psutil.Process(), private(psutil.Process()), time.perf_counter()
    data = Listed(path) if kind == "list" else Mapped(path, cache)
    opened, rank = time.perf_counter() - start, private(me) - before
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:items].tolist()
    loader, grown, start = (
        DataLoader(Subset(data, order), batch_size=64, num_workers=workers, collate_fn=len),
        [],
        time.perf_counter(),
    )
    for k, _ in enumerate(loader):
        if k % max(1, len(loader) // 20) == 0 or k == len(loader) - 2 * workers:
            grown.append(np.mean([private(c) for c in me.children()]))
    out.put(
        {
            "opened": opened,
            "rank": rank,
            "first": grown[0],
            "most": max(grown[1:]),
            "last": grown[-1],
            "speed": len(order) / (time.perf_counter() - start),
        }
    )


def aside(f, *args):
    "Run `f` in a fresh process and take what it puts out."
    spawn = multiprocessing.get_context("spawn")
    out = spawn.Queue()
    process = spawn.Process(target=f, args=(*args, out))
    process.start()
    found = out.get()
    process.join()
    return found


def convert(path: Path, cache: Path, out) -> None:
    "In a fresh process: seconds to convert, and the most memory that it and its workers held at once."
    import threading

    me, peak, done = psutil.Process(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.5):
            try:
                peak[0] = max(peak[0], sum(private(p) for p in (me, *me.children(recursive=True))))
            except (psutil.Error, OSError):
                pass  # a process has just ended

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    found = validate_files(path, gate(), cache)
    done.set()
    out.put(
        {"seconds": time.perf_counter() - start, "records": len(found), "bad": len(found.problems), "peak": peak[0]}
    )


def images(folder: Path, n: int = 60) -> list[tuple[str, float]]:
    "Images per second of one worker with one thread, 640 x 480 JPEG to 336 x 336, padded."
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for k in range(n):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
        Image.fromarray(
            np.clip(np.asarray(coarse, int) + rng.integers(-12, 12, (480, 640, 3)), 0, 255).astype(np.uint8)
        ).save(folder / f"{k}.jpg", quality=90)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def rate(f) -> float:
        times = []
        for k in range(n):
            start = time.perf_counter()
            f(folder / f"{k}.jpg")
            times.append(time.perf_counter() - start)
        return 1 / float(np.median(times))

    files = sorted(folder.glob("*.jpg"))
    write_shards(((p.name, p.read_bytes()) for p in files), folder / "shards", each=20)
    shards, pad = Shards(folder / "shards", folder / "cache"), ImageTransform(processor, "pad")
    return [
        ("decoded", rate(lambda p: Image.open(p).convert("RGB"))),
        ("ready, padded", rate(pad)),
        ("ready, padded, from tar shards", rate(lambda p: pad(shards.open(p.name)))),
        ("ready, square", rate(ImageTransform(processor, "square"))),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--records", type=int, default=20_000)
    p.add_argument("--words", type=int, help="words of every record; without it, the modelled mixture's")
    p.add_argument("--items", type=int, default=50_000, help="records that the loaders read")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--skip-list", action="store_true", help="do not weigh a list of dictionaries")
    p.add_argument("--folder", type=Path, help="for the data; by default a temporary one")
    args = p.parse_args()
    where = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        start = time.perf_counter()
        write(where / "data.json", args.records, args.words)
        size = (where / "data.json").stat().st_size
        print(
            f"{args.records:,} records, {size / 1e9:.2f} GB of JSON (written in {time.perf_counter() - start:.0f} s), "
            f"{len(psutil.Process().cpu_affinity())} cores, {cpu_name()}, Python {platform.python_version()}\n",
            flush=True,
        )
        made = aside(convert, where / "data.json", where / "cache")
        print(
            f"converted once: {made['seconds']:.1f} s, {args.records / made['seconds']:,.0f} records/s "
            f"({args.records // BLOCK + 1} blocks), {made['bad']} bad, "
            f"at most {made['peak']:,.0f} MB private in all processes\n",
            flush=True,
        )
        print(
            f"{'':26}{'opened in':>11}{'rank holds':>13}{'a worker: first, most, last':>30}{'records/s':>12}   "
            f"({min(args.items, args.records):,} records in random order, {args.workers} workers)"
        )
        for name, kind in [("mapped (this kit)", "mapped")] + [("a list of dictionaries", "list")] * (
            not args.skip_list
        ):
            w = aside(weigh, kind, where / "data.json", where / "cache", args.items, args.workers)
            print(
                f"{name:26}{w['opened']:>9.1f} s{w['rank']:>10,.0f} MB{w['first']:>15,.0f}, "
                f"{w['most']:,.0f}, {w['last']:,.0f} MB{w['speed']:>12,.0f}",
                flush=True,
            )
        print(
            "\nimages per second, one worker, one thread, JPEG 640 x 480 to 336 x 336: "
            + ", ".join(f"{r:,.0f} {name}" for name, r in images(where))
        )
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
