"""Mutated records and pictures: each is taken whole or refused with a reason, none crashes. FUZZ and FUZZ_PICTURES say how many: 3,000 and 300 every day, 200,000 and 20,000 by `make torture`."""

import copy
import ctypes
import io
import json
import multiprocessing
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_nb.conversation import get_template
from llava_nb.dataset import encode, record_id
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.packing import collate_packed
from llava_nb.safe.doctor import Findings, look, summary, write
from llava_nb.store.conversion import validate_files
from llava_nb.store.dataset import ValidatedDataset
from llava_nb.store.images import Folder
from llava_nb.store.record_checks import KINDS
from llava_nb.store.records import with_pictures
from llava_nb.store.validate import RecordValidator

COUNT, PICTURES = int(os.environ.get("FUZZ", 3000)), int(os.environ.get("FUZZ_PICTURES", 300))
ENCODER = Encoder(tiny_tokenizer(), 2048, 16, 200)
TEXTS = [
    "",
    " ",
    "</s>",
    "<unk>",
    "<image>",
    "<image>\n<image>",
    "ASSISTANT:",
    "USER: x ASSISTANT: y</s>",
    "\x00",
    "\ud800",
    "\ufdd0\ufddf",
    "\ufffe",
    "e\u0301" * 40,
    "\u202e",
    "\U0001f469\u200d\U0001f680",
    "a" * 3000,
    "\n" * 50,
    "[INST]",
    "<s>",
    "{{ x }}",
    "%s",
]
VALUES = [None, True, 0, -1, 1.5, 10**30, float("nan"), [], {}, [[]], [{}], {"from": "gpt"}, *TEXTS]
KEYS = ["from", "value", "conversations", "image", "images", "video", "weight", "id", "role", "content", ""]


def places(node, path=()) -> list[tuple]:
    """Paths of everything inside a record."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for k, v in inside for p in places(v, (*path, k)))]


def mutate(record, rng: random.Random):
    """One change somewhere."""
    path = rng.choice(places(record)[1:] or [()])
    if not path:
        return rng.choice(VALUES)
    node = record
    for k in path[:-1]:
        node = node[k]
    kind = rng.randrange(6)
    if kind == 0:
        del node[path[-1]]
    elif kind == 1:
        node[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 2 and isinstance(node[path[-1]], str):
        at = rng.randrange(len(node[path[-1]]) + 1)
        node[path[-1]] = node[path[-1]][:at] + rng.choice(TEXTS) + node[path[-1]][at:]
    elif kind == 3 and isinstance(node, list):
        node.insert(path[-1], copy.deepcopy(node[path[-1]]))
    elif kind == 4 and isinstance(node, dict):
        node[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    elif isinstance(node, list):
        rng.shuffle(node)
    return record


def seeds() -> list[dict]:
    turn = lambda who, text: {"from": who, "value": text}  # noqa: E731
    return [
        {
            "id": "a",
            "image": "x/y.png",
            "conversations": [
                turn("human", "<image>\nWhat is it?"),
                turn("gpt", "A fox."),
                turn("human", "Sure?"),
                turn("gpt", "Yes."),
            ],
        },
        {"id": 7, "conversations": [turn("human", "Hi"), turn("gpt", "Hello.")]},
        {"id": "c", "image": "z.jpg", "conversations": [turn("human", "<image>"), turn("gpt", "A red bus.")]},
    ]


@pytest.mark.parametrize("template", ["v1", "plain", "llava_llama_2"])
def test_a_mutated_record_is_taken_whole_or_refused_with_a_reason(template, record_property):
    gate, rng, taken, refused = RecordValidator(get_template(template), ENCODER), random.Random(template), 0, 0
    for _ in range(COUNT // 3):
        record = copy.deepcopy(rng.choice(seeds()))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            record = mutate(record, rng)
        (row,) = gate([json.dumps(record)]).to_pylist()
        assert row["id"] == record_id(record)
        if row["problem"]:
            refused += 1
            assert row["problem"]["kind"] in KINDS and row["problem"]["what"] and row["problem"]["remedy"]
            continue
        taken += 1
        encoded = encode(json.loads(row["record"]), gate.template, gate.encoder)
        sample = {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": torch.zeros(3, 4, 4) if row["image"] else None,
        }
        packed = collate_packed([sample], (3, 4, 4))
        assert len(packed["targets"]) == row["supervised"] > 0 and packed["input_ids"].shape[1] == row["length"]
        assert int((packed["input_ids"] == 2048).sum()) == 16 * (row["image"] is not None and bool(encoded.image_spans))
    assert taken > COUNT // 100 and refused > COUNT // 20
    record_property(
        "reached",
        f"{taken + refused:,} mutated records, {template}: {taken:,} taken, {refused:,} refused with a reason, none uncaught",
    )


PIL = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def saved(image: Image.Image, kind: str, **more) -> bytes:
    image.save(out := io.BytesIO(), kind, **more)
    return out.getvalue()


def originals() -> list[bytes]:
    """The five formats in several makes, and others that must be refused."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    more, palette = (
        {"save_all": True, "append_images": [picture.transpose(Image.Transpose.ROTATE_180)] * 2},
        picture.convert("P"),
    )
    return [
        saved(picture, "PNG"),
        saved(picture.convert("RGBA"), "PNG"),
        saved(picture.convert("I;16"), "PNG"),
        saved(picture.quantize(16), "PNG", transparency=bytes(16)),
        saved(picture, "PNG", **more),
        saved(picture, "JPEG"),
        saved(picture, "JPEG", progressive=True),
        saved(picture.convert("CMYK"), "JPEG"),
        saved(picture, "WEBP"),
        saved(picture, "WEBP", lossless=True),
        saved(picture, "WEBP", **more),
        saved(palette, "GIF"),
        saved(palette, "GIF", save_all=True, append_images=[palette.transpose(Image.Transpose.ROTATE_180)]),
        saved(picture, "BMP"),
        saved(palette, "BMP"),
        saved(picture, "TIFF"),
        saved(picture, "EPS"),
    ]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed anywhere or in the header, a piece doubled or taken out, a cut."""
    data, at = bytearray(data), lambda: rng.randrange(min(len(data), rng.choice((40, 10**6))))
    for _ in range(rng.choice((1, 2, 8, 40))):
        data[at()] = rng.choice((0, 255, rng.randrange(256)))
    k = at()
    if rng.random() < 0.2:
        data[k:k] = data[k : k + 50]
    if rng.random() < 0.2:
        del data[k : k + rng.randrange(1, 50)]
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def test_a_mutated_picture_is_decoded_or_refused_and_nothing_else(tmp_path, record_property):
    rng, decoded, refused, files = random.Random(0), 0, 0, originals()
    (tmp_path / "x").write_bytes(files[0])
    dataset = ValidatedDataset(
        [
            {
                "id": "fuzz",
                "image": "x",
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A fox."}],
            }
        ],
        get_template("v1"),
        ENCODER,
        ImageTransform(PIL, "pad", reduced_jpeg=True, apply_exif=True),
        tmp_path,
    )
    for _ in range(PICTURES):
        (tmp_path / "x").write_bytes(mutated(rng.choice(files), rng))
        try:
            pixels = dataset[0]["pixel_values"]
        except ValueError as e:
            assert "record 0 (id fuzz)" in str(e) and str(tmp_path / "x") in str(e)
            refused += 1
            continue  # whatever Pillow raised
        decoded += 1
        assert pixels.shape == (3, 28, 28) and torch.isfinite(pixels).all()
        said, odd = look(dataset.source, "x", deep=True)
        assert not said and all(odd)
    assert decoded > PICTURES // 20 and refused > PICTURES // 20
    record_property(
        "reached",
        f"{decoded + refused:,} mutated pictures: {decoded:,} decoded, {refused:,} refused with a reason, none uncaught",
    )


def test_the_doctor_tells_of_mutated_records_and_pictures(tmp_path):
    """All counted, all listed, a page drawn: whatever stands in the file."""
    rng, gate = random.Random(1), RecordValidator(get_template("v1"), ENCODER)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.png").write_bytes(originals()[0])
    (tmp_path / "z.jpg").write_bytes(mutated(originals()[5], rng))
    records = [mutate(copy.deepcopy(rng.choice(seeds())), rng) for _ in range(COUNT // 10)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)))
    checked, found = (
        with_pictures(validate_files(tmp_path / "r.jsonl", gate, tmp_path / "cache"), Folder(tmp_path)),
        Findings(),
    )
    found.add(checked, Folder(tmp_path), deep=True)
    write(found, gate, tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    assert (
        found.total == len(records) == found.good + len(found.problems)
        and sum(f["kind"] != "note" for f in listed) == len(found.problems) > 10
    )
    assert (
        summary(found)
        and "other" not in {f["kind"] for f in listed}
        and (tmp_path / "out" / "findings.html").stat().st_size > 10_000
    )


def huge() -> dict[str, bytes]:
    """Small files of large pictures: as large as the gate takes, and larger."""
    grey = Image.new("L", (7_000, 7_000), 128)
    chunk = lambda name, data: len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")  # noqa: E731

    def png(width: int, height: int, kind: int, bytes_a_pixel: int) -> bytes:
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, kind, 0, 0, 0]))
            + chunk(b"IDAT", zlib.compress(bytes(height * (1 + width * bytes_a_pixel)), 1))
            + chunk(b"IEND", b"")
        )

    return {
        "png 10,000 x 5,000": png(10_000, 5_000, 2, 3),
        "png with alpha": png(7_000, 7_000, 6, 4),
        "png 10,000 x 600": png(10_000, 600, 2, 3),
        "png 20,000 x 1": saved(Image.new("1", (20_000, 1)), "PNG"),
        "png 13,000 x 13,000": saved(Image.new("1", (13_000, 13_000)), "PNG"),
        "jpeg": saved(grey.convert("RGB"), "JPEG", quality=5),
        "jpeg, progressive": saved(grey.convert("RGB"), "JPEG", quality=5, progressive=True),
        "jpeg, CMYK": saved(grey.convert("CMYK"), "JPEG", quality=5),
        "webp 3,500 x 3,500": saved(grey.resize((3_500, 3_500)), "WEBP", quality=1, method=0),
        "webp 7,000 x 7,000": saved(grey, "WEBP", quality=1, method=0),
        "gif": saved(grey, "GIF"),
        "bmp": saved(grey.convert("1"), "BMP"),
        "unguarded": b"",
    }


def _memory(name: str) -> float:  # MB
    return next(
        int(line.split()[1]) / 1e3
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def _peak(data: bytes, aspect: str, answers) -> None:
    transform = ImageTransform(PIL, aspect)
    transform(Image.new("RGB", (30, 20)))  # what is loaded once
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before is not there to be taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    try:
        transform(io.BytesIO(data) if data else Image.new("RGB", (8_500, 8_500)))
        said = "read"
    except ValueError as e:
        said = str(e)
    answers.put((said, _memory("VmHWM") - before))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of memory")
def test_no_picture_takes_more_than_256_mb(record_property):
    """What the peak of a process of its own grows by; the last, which no gate looked at, would take more."""
    context, found = (
        multiprocessing.get_context("forkserver"),
        {},
    )  # forked from a process that has done nothing: room that tests left in this one would be zeroed, and counted
    context.set_forkserver_preload([__name__])
    for name, data in huge().items():
        for aspect in ("pad", "square") if name == "png with alpha" else ("pad",):
            answers = context.SimpleQueue()
            child = context.Process(target=_peak, args=(data, aspect, answers))
            child.start()
            child.join(100)
            assert child.exitcode == 0, name
            found[name, aspect] = answers.get()
    unguarded = found.pop(("unguarded", "pad"))[1]
    assert unguarded > 256
    for case, (said, peak) in found.items():
        assert peak < (256 if said == "read" else 64), (case, said, peak)
    record_property(
        "reached",
        f"{len(found)} files of large pictures: at most {max(peak for _, peak in found.values()):.0f} MB; one without the gate {unguarded:.0f} MB",
    )
    read = {name for (name, _), (said, _) in found.items() if said == "read"}
    assert read == {
        "png 10,000 x 5,000",
        "png with alpha",
        "png 10,000 x 600",
        "jpeg",
        "jpeg, CMYK",
        "webp 3,500 x 3,500",
        "gif",
        "bmp",
    }
