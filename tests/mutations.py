"""Every way in which we could think of spoiling a file of a model folder, and a process that tries each with a limit of time and memory."""

import contextlib
import io
import json
import math
import multiprocessing
import random
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llava_nb.checkpoint import save_llava
from llava_nb.llava import build_llava, seeded
from llava_nb.masking import tiny_tokenizer

SECONDS, MEGABYTES = 30, 1_500  # of one case, at most; of memory more than before it
ABSENT = "absent"  # no such file, or no such key


def deep(levels: int) -> list:
    value = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = {
    "null": None,
    "absent": ABSENT,
    "list": [],
    "list of numbers": [1, 2],
    "list of lists": [[]],
    "object": {},
    "object of objects": {"x": {}},
    "empty": "",
    "text": "x",
    "path": "../../x",
    "surrogate": "\ud800",
    "escape": "\x1b]0;x\x07\nllava_nb: all is well",
    "-1": -1,
    "0": 0,
    "1": 1,
    "3": 3,
    "million": 10**6,
    "10^9": 10**9,
    "10^12": 10**12,
    "10^30": 10**30,
    "half": 0.5,
    "-half": -0.5,
    "nan": math.nan,
    "infinity": math.inf,
    "1e308": 1e308,
    "true": True,
    "false": False,
    "long": "x" * 200_000,
    "deep": deep(400),
    "bidirectional": "\u202e\u0000\ufdd0",
}
WHOLE = {
    "empty": b"",
    "space": b" ",
    "zeros": bytes(5000),
    "brace": b"{",
    "open lists": b"[" * 200_000,
    "open objects": b'{"a":' * 100_000,
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "text": b'"x"',
    "object": b"{}",
    "nan": b"NaN",
    "not utf-8": b"\xff\xfe{}\x80",
    "page": b"<!DOCTYPE html><html><body>Access denied</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n",
    "pickle": b"\x80\x02}q\x00.",
    "escape": b"\x1b]0;x\x07\nllava_nb: all is well",
    "huge number": b"9" * 100_000,
    "absent": ABSENT,
}
SLOW = [
    "(a+)+$",
    "(a|a)*$",
    "(x+x+)+y",
    "(?:(?:a{1,100}){1,100}){1,100}",
    "(",
    "[",
    "(?<=a+)b",
    "(?P<n>a)\\1",
    "\\p{Nothing}",
    "",
    "a{99999999}",
    "(?i)(\\s*)*x",
    "\ud800",
    ".*.*.*.*.*=.*",
]  # patterns
TEMPLATES = [
    "{% for x in range(10**12) %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ '%99999999999d' % 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[99] }}",
    "{% broken",
    "{{ 10 ** 10 ** 9 }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ raise_exception('\x1b[31mno') }}",
    "{{ (range(10**9) | list) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "\ud800",
]


def small_folder(where: Path) -> Path:
    """A llava-hf folder with every kind of file: sharded weights with an index, a template, what generation and the processor say."""
    tokenizer = tiny_tokenizer()
    size = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
        **size,
    )
    with seeded(0):
        tower = AutoModel.from_config(CLIPVisionConfig(num_hidden_layers=2, image_size=28, patch_size=14, **size))
        model = build_llava(AutoModelForCausalLM.from_config(text), tower, tokenizer)
    model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "pad"}
    model.generation_config.max_length = 64
    save_llava(
        model,
        where,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )
    in_two_shards(where)
    Image.new("RGB", (40, 30), "teal").save(where.parent / "image.png")
    return where


def in_two_shards(where: Path) -> None:
    weights = load_file(where / "model.safetensors")
    (where / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, where / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (where / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )


# One file, spoilt


def places(node, path: tuple = ()) -> Iterator[tuple]:
    """Paths of what is inside; of a long container the first two and the last."""
    inside = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in inside if len(inside) <= 40 else [*inside[:2], inside[-1]]:
        yield (*path, key)
        yield from places(value, (*path, key))


def with_value(found, path: tuple, value):
    """A copy with another value at a path."""
    found = json.loads(json.dumps(found))
    node = found
    for key in path[:-1]:
        node = node[key]
    if value == ABSENT:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return found


def dumped(found, path: tuple, value) -> bytes:
    return json.dumps(with_value(found, path, value)).encode()


def of_json(data: bytes, name: str) -> Iterator[tuple[str, bytes | partial]]:
    found = json.loads(data)
    for path in places(found):
        for what, value in VALUES.items():
            yield f"{'.'.join(map(str, path))} {what}", partial(dumped, found, path, value)
    key, value = next(iter(found.items()))
    twice = json.dumps({key: None})[1:-1] + ", "
    yield "a key twice", b"{" + twice.encode() + data.lstrip()[1:]
    yield "a key of another script", json.dumps({f"{key[:-1]}\u0435": value} | found).encode()
    yield "a byte order mark", b"\xef\xbb\xbf" + data
    yield "ten thousand keys", json.dumps({f"x{k}": k for k in range(10_000)} | found).encode()
    yield "names of code", partial(changed, found, {"auto_map": {"AutoModel": "x.Y"}})
    if name == "tokenizer.json":
        yield from of_tokenizer(found)


def changed(found: dict, change: dict) -> bytes:
    return json.dumps(found | change).encode()


def of_tokenizer(found: dict) -> Iterator[tuple[str, bytes | partial]]:
    for k, pattern in enumerate(SLOW):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        yield f"splits by {k}", partial(changed, found, {"pre_tokenizer": split})
        yield (
            f"replaces by {k}",
            partial(changed, found, {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "a"}}),
        )
        yield (
            f"decodes by {k}",
            partial(changed, found, {"decoder": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "a"}}),
        )
    grow = {"type": "Replace", "pattern": {"String": ""}, "content": "aaaaaaaaaa"}
    for n in (5, 60):
        yield (
            f"grows {n} times",
            partial(changed, found, {"normalizer": {"type": "Sequence", "normalizers": [grow] * n}}),
        )
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    yield (
        "doubles 40 times",
        partial(changed, found, {"normalizer": {"type": "Sequence", "normalizers": [double] * 40}}),
    )
    yield (
        "prepends a megabyte",
        partial(changed, found, {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}}),
    )
    yield "a token of a megabyte", partial(dumped, found, ("added_tokens", 0, "content"), "x" * 1_000_000)
    for kind in ("Unigram", "WordLevel", "WordPiece", "Nothing"):
        yield f"is {kind}", partial(dumped, found, ("model", "type"), kind)


def of_safetensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def joined(header, body: bytes = body) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    names = [n for n in header if n != "__metadata__"]
    for name in names[:3] + names[-2:]:
        says, rest = header[name], {k: v for k, v in header.items() if k != name}
        shape, (start, end) = says["shape"], says["data_offsets"]
        for kind in (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I64",
            "I8",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F8_E5M2",
            "C64",
            "X",
            "",
            None,
            7,
        ):
            yield f"{name} of {kind}", joined(header | {name: says | {"dtype": kind}})
        for other in (
            [],
            [0],
            shape[::-1] + [1],
            [1, *shape],
            [-1],
            [2**40],
            [2**63],
            ["x"],
            None,
            [math.prod(shape)],
            [0.5],
        ):
            yield f"{name} shaped {other}", joined(header | {name: says | {"shape": other}})
        for place in (
            [0, 0],
            [end, start],
            [start, end + 4],
            [start + 1, end + 1],
            [-4, 0],
            [2**62, 2**63],
            [start],
            None,
            [10**30, 10**31],
        ):
            yield f"{name} at {place}", joined(header | {name: says | {"data_offsets": place}})
        for other in (
            "",
            "x",
            "\x1b[31mx\n",
            "\ud800",
            "__metadata__",
            "a" * 100_000,
            name.replace("0", "9"),
            name + "\u0000",
        ):
            yield f"{name} named {other[:20]!r}", joined(rest | {other: says})
        for what, value in {"nan": math.nan, "infinity": math.inf, "1e38": 1e38, "nothing": 0.0}.items():
            yield (
                f"{name} holds {what}",
                joined(header, body[:start] + struct.pack("<f", value) * ((end - start) // 4) + body[end:]),
            )
        yield (
            f"{name} twice",
            joined(json.dumps(header)[:-1].encode() + f", {json.dumps(name)}: {json.dumps(says)}}}".encode()),
        )
    yield (
        "one more",
        joined(
            header | {"x": {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}}, body + bytes(4)
        ),
    )
    for k, length in enumerate((0, 1, 2**31, 2**62, 2**64 - 1)):
        yield f"a header of {length}", struct.pack("<Q", length) + data[8:]
    for what, value in {
        "text": "x",
        "numbers": {"format": 7},
        "none": None,
        "another": {"format": "tf"},
        "long": {"format": "pt", "x": "x" * 1_000_000},
    }.items():
        yield f"metadata {what}", joined(header | {"__metadata__": value})


def of_file(file: Path) -> Iterator[tuple[str, bytes | str | partial]]:
    """All mutations of one file of a folder."""
    data, rng = file.read_bytes(), random.Random(file.name)
    yield from WHOLE.items()
    for part in (0.1, 0.5, 0.9):
        yield f"cut at {part}", data[: int(part * len(data))]
    yield "one byte less", data[:-1]
    yield "one byte more", data + b"x"
    yield "twice", data + data
    for k in range(20):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 30))):
            flipped[rng.randrange(min(len(data), rng.choice((300, 10**9))))] ^= 1 << rng.randrange(8)
        yield f"flipped {k}", bytes(flipped)
    if file.suffix == ".json":
        yield from of_json(data, file.name)
    elif file.suffix == ".safetensors":
        yield from of_safetensors(data)
    else:
        yield from ((f"template {k}", text.encode("utf-8", "surrogatepass")) for k, text in enumerate(TEMPLATES))


def all_cases(folder: Path) -> dict[tuple[str, str], bytes | str | partial]:
    """By file and mutation: the content, or what makes it."""
    return {(file.name, what): data for file in sorted(folder.iterdir()) for what, data in of_file(file)}


# One case, tried


def spoil(file: Path, data: bytes | str | partial) -> None:
    if data == ABSENT:
        file.unlink()
    else:
        file.write_bytes(data() if isinstance(data, partial) else data)


def asked(folder: Path, way: str) -> tuple[int, str]:
    """Exit code, and what is said to stderr, of one way to use the folder."""
    from llava_nb import train
    from llava_nb.run import chat_command

    settings = {
        "model": str(folder),
        "data_path": str(folder.parent / "records.json"),
        "image_folder": str(folder.parent),
        "output_dir": str(folder.parent / "out"),
        "stage": 2,
        "template": "v1",
        "image_aspect_ratio": "pad",
        "model_max_length": 256,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    (folder.parent / "records.json").write_text(
        json.dumps(
            [
                {
                    "id": "a",
                    "image": "image.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat is this?"},
                        {"from": "gpt", "value": "A cat."},
                    ],
                }
            ]
        )
    )
    (folder.parent / "run.json").write_text(json.dumps(settings))
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        if way == "chat":
            code = chat_command.main(
                [
                    str(folder),
                    "--image",
                    str(folder.parent / "image.png"),
                    "--ask",
                    "What is " + "a" * 30 + "?",
                    "--max_new_tokens",
                    "2",
                    "--device",
                    "cpu",
                ]
            )
        else:
            code = train.main([str(folder.parent / "run.json"), *(["--dry_run"] if way == "dry run" else [])])
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    return code, said.getvalue()


def verdict(folder: Path, name: str, way: str) -> str:
    """What is wrong with the answer to a spoilt folder; "" if nothing is."""
    try:
        code, said = asked(folder, way)
    except BaseException as e:
        return f"{type(e).__name__}: {e}"[:500]  # noqa: BLE001  a pyo3 panic is none of Exception
    said = "\n".join(line for line in said.splitlines() if not line.startswith("note: ") and "it/s]" not in line)
    if code == 0:
        return f"0, and said {said[:500]}" if "Traceback" in said else ""
    if code == 5 and "the gradient is not finite" in said:
        return ""  # weights that are no numbers: found at the first step
    if code not in (2, 4):
        return f"exit code {code}: {said[:500]}"
    if "Traceback" in said or not 0 < len(said.strip().splitlines()) <= 9 or len(said) > 5_000:
        return f"not in few lines: {said[:500]}"
    if not (str(folder) in said or name in said):
        return f"names no folder: {said[:500]}"
    return (
        f"not printable: {said[:500]!r}" if set("\x1b\x07\r") & set(said) or "\nllava_nb: all is well" in said else ""
    )


def tried(
    folder: Path, name: str, data: bytes | str | partial, ways: tuple[str, ...] = ("chat", "dry run", "run")
) -> dict[str, str]:
    """The verdict of each way, the file put back afterwards."""
    kept = (folder / name).read_bytes()
    spoil(folder / name, data)
    try:
        return {way: bad for way in ways if (bad := verdict(folder, name, way))}
    finally:
        (folder / name).write_bytes(kept)


# Many cases, in a process that may be ended


def memory(what: str) -> float:  # MB
    return next(
        int(line.split()[1]) / 1e3
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(what)
    )


def work(folder: Path, pipe) -> None:
    """Take one case after another; say what is wrong with it and by how much memory grew."""
    folder = Path(shutil.copytree(folder, folder.parent / f"of-{multiprocessing.current_process().pid}" / folder.name))
    shutil.copy(folder.parent.parent / "image.png", folder.parent / "image.png")
    torch.set_num_threads(1)
    while case := pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        bad = tried(folder, *case)
        pipe.send((bad, memory("VmHWM") - before))


class Worker:
    """A process with its own copy of the folder."""

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mutations", "llava_nb.train"])
        self.folder, (self.pipe, theirs) = folder, multiprocessing.Pipe()
        self.process = context.Process(target=work, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, case: tuple) -> dict[str, str]:
        self.pipe.send(case)
        try:
            if not self.pipe.poll(SECONDS):
                return {"all": f"more than {SECONDS} s"}
            bad, grown = self.pipe.recv()
        except EOFError:
            return {"all": f"the process ended with {self.process.join(5) or self.process.exitcode}"}
        return bad | ({"memory": f"{grown:,.0f} MB"} if grown > MEGABYTES else {})

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def all_wrong(folder: Path, cases: list[tuple]) -> dict[tuple[str, str], dict[str, str]]:
    """Cases (file, mutation, content), each tried in a process; what is wrong with which."""
    found, worker = {}, Worker(folder)
    for name, what, data in cases:
        if bad := worker.ask((name, data)):
            found[name, what] = bad
        if "all" in bad:
            worker.end()
            worker = Worker(folder)
    worker.end()
    return found
