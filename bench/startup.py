"""From the command to the first step, and the memory of ranks and workers, at toy size on a CPU.

    python bench/startup.py                        some two minutes on two cores
    python bench/startup.py --ranks 2 --workers 0 4

Each row is a launch of `deepspeed --num_gpus N llava_nb/train.py CONFIG.json` (ZeRO-2, stage 2, a llava-hf folder of half a million
parameters): the seconds until it prints its first step, and private memory, what a process has written and shares with
none, read ten times a second: the most that one rank has held, and one of its data workers. The first launch checks and converts
the records, the others find them converted.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before transformers asks

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import torch
from data import private
from PIL import Image
from plan import cpu_name
from transformers import CLIPImageProcessorPil

from llava_nb.checkpoint import save_llava
from llava_nb.fast.zero import free_port
from llava_nb.llava import tiny_llava
from llava_nb.masking import tiny_tokenizer

TRAIN, BIN = Path(__file__).resolve().parent.parent / "llava_nb" / "train.py", Path(sys.executable).parent
FIXED = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
STEP = re.compile(r"step +1/\d+ +loss +[\d.]+")  # train.py's line


def world(where: Path, n: int, seed: int = 0) -> None:
    "Records, every third with one of 16 pictures, and a llava-hf folder."
    rng, records = np.random.default_rng(seed), []
    for k in range(16):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(where / f"{k}.png")
    for k in range(n):
        said = " ".join(f"word{w}" for w in rng.integers(50, size=rng.integers(2, 12)))
        asked, picture = ("What is this?", {}) if k % 3 else ("<image>\nWhat is this?", {"image": f"{k % 16}.png"})
        records.append(
            {"id": str(k), "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}
            | picture
        )
    (where / "records.json").write_text(json.dumps(records))
    tokenizer = tiny_tokenizer()
    save_llava(
        tiny_llava(tokenizer),
        where / "model",
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    )


def settings(where: Path, workers: int, steps: int) -> Path:
    "The configuration of one launch."
    (where / "train.json").write_text(
        json.dumps(
            {
                "model": str(where / "model"),
                "data_path": str(where / "records.json"),
                "image_folder": str(where),
                "output_dir": str(where / "run"),
                "template": "v1",
                "model_max_length": 256,
                "stage": 2,
                "zero": 2,
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "dataloader_num_workers": workers,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            }
        )
    )
    return where / "train.json"


def is_rank(process: psutil.Process) -> bool:
    return any(word.startswith("--local_rank=") for word in process.cmdline())


def watch(launcher: int, stepping: threading.Event, done: threading.Event, peak: dict[str, float]) -> None:
    "Keep the most MB of one rank and, from the first step on, of one process below a rank, which then is a data worker."
    while not done.wait(0.1):
        try:
            family = psutil.Process(launcher).children(recursive=True)
            ranks = [
                p for p in family if is_rank(p) and not is_rank(p.parent())
            ]  # a forked worker has its rank's command line
            below = [c for r in ranks for c in r.children(recursive=True)] if stepping.is_set() else []
            for kind, p in [("rank", p) for p in ranks] + [("worker", p) for p in below]:
                peak[kind] = max(peak[kind], private(p))
        except (psutil.Error, OSError, TypeError):
            pass  # a process has just ended, the next look will do


def launch(where: Path, ranks: int, workers: int, steps: int) -> dict[str, float]:
    "Seconds from the command to the first step and to the end, and the memory."
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "LLAVA_NB_CACHE": str(where / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    } | FIXED
    command = [
        BIN / "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        TRAIN,
        settings(where, workers, steps),
    ]
    found, stepping, done = {"rank": 0.0, "worker": 0.0}, threading.Event(), threading.Event()
    start = time.perf_counter()
    with open(where / "errors.log", "w") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    watcher = threading.Thread(target=watch, args=(process.pid, stepping, done, found))
    watcher.start()
    for line in process.stdout:
        if STEP.search(line) and not stepping.is_set():
            found["first"] = time.perf_counter() - start
            stepping.set()
    code = process.wait()
    done.set()
    watcher.join()
    if code or "first" not in found:
        raise SystemExit(f"the launch ended with code {code}:\n{(where / 'errors.log').read_text()[-3000:]}")
    return found | {"all": time.perf_counter() - start}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="data workers of a rank")
    p.add_argument("--records", type=int, default=20_000)
    p.add_argument("--steps", type=int, default=20)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        world(where, args.records)
        command = " ".join(["python bench/startup.py", *sys.argv[1:]])
        print(
            f"{date.today():%d %B %Y}, {len(psutil.Process().cpu_affinity())} cores of {cpu_name()}, torch {torch.__version__}, `{command}`: {args.records:,} records, {args.steps} steps\n"
        )
        print(
            "| ranks | workers of a rank | records | to the first step | to the end | a rank holds | a worker holds |\n|---|---|---|---|---|---|---|"
        )
        rows = [(r, w) for r in args.ranks for w in args.workers]
        for k, (ranks, workers) in enumerate(rows[:1] + rows):
            t = launch(where, ranks, workers, args.steps)
            cells = [
                ranks,
                workers,
                "already converted" if k else "converted first",
                f"{t['first']:.1f} s",
                f"{t['all']:.1f} s",
                f"{t['rank']:,.0f} MB",
                f"{t['worker']:,.0f} MB" if workers else "",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
