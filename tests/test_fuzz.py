"""Mutated records and pictures: each is taken whole or refused with a reason, none crashes. FUZZ says how many: 3,000 every day, 200,000 by `make torture`."""
import copy
import io
import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.packing import collate_packed
from llava_nb.records import Gate, LlavaDataset, encode, record_id

COUNT = int(os.environ.get("FUZZ", 3000))
ENCODER = Encoder(tiny_tokenizer(), 2048, 16, 200)
TEXTS = ["", " ", "</s>", "<unk>", "<image>", "<image>\n<image>", "ASSISTANT:", "USER: x ASSISTANT: y</s>", "\x00", "\ud800", "\ufdd0\ufddf", "\ufffe", "e\u0301" * 40, "\u202e", "\U0001f469\u200d\U0001f680", "a" * 3000, "\n" * 50, "[INST]", "<s>", "{{ x }}", "%s"]
VALUES = [None, True, 0, -1, 1.5, 10**30, float("nan"), [], {}, [[]], [{}], {"from": "gpt"}, *TEXTS]
KEYS = ["from", "value", "conversations", "image", "id", "role", "content", ""]


def places(node, path=()) -> list[tuple]:
    """Paths of everything inside a record."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for k, v in inside for p in places(v, (*path, k)))]


def mutate(record, rng: random.Random):
    """One change somewhere."""
    path = rng.choice(places(record)[1:] or [()])
    if not path: return rng.choice(VALUES)
    node = record
    for k in path[:-1]: node = node[k]
    kind = rng.randrange(6)
    if kind == 0: del node[path[-1]]
    elif kind == 1: node[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 2 and isinstance(node[path[-1]], str):
        at = rng.randrange(len(node[path[-1]]) + 1)
        node[path[-1]] = node[path[-1]][:at] + rng.choice(TEXTS) + node[path[-1]][at:]
    elif kind == 3 and isinstance(node, list): node.insert(path[-1], copy.deepcopy(node[path[-1]]))
    elif kind == 4 and isinstance(node, dict): node[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    elif isinstance(node, list): rng.shuffle(node)
    return record


def seeds() -> list[dict]:
    turn = lambda who, text: {"from": who, "value": text}      # noqa: E731
    return [{"id": "a", "image": "x/y.png", "conversations": [turn("human", "<image>\nWhat is it?"), turn("gpt", "A fox."), turn("human", "Sure?"), turn("gpt", "Yes.")]},
            {"id": 7, "conversations": [turn("human", "Hi"), turn("gpt", "Hello.")]},
            {"id": "c", "image": "z.jpg", "conversations": [turn("human", "<image>"), turn("gpt", "A red bus.")]}]


@pytest.mark.parametrize("template", ["v1", "plain", "llava_llama_2"])
def test_a_mutated_record_is_taken_whole_or_refused_with_a_reason(template):
    gate, rng, taken, refused = Gate(get_template(template), ENCODER), random.Random(template), 0, 0
    for _ in range(COUNT // 3):
        record = copy.deepcopy(rng.choice(seeds()))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))): record = mutate(record, rng)
        (row,) = gate([json.dumps(record)]).to_pylist()
        assert row["id"] == record_id(record)
        if row["problem"]: refused += 1; assert len(row["problem"]) > 10; continue
        taken += 1
        encoded = encode(json.loads(row["record"]), gate.template, gate.encoder)
        sample = {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels), "pixel_values": torch.zeros(3, 4, 4) if row["image"] else None}
        packed = collate_packed([sample], (3, 4, 4))
        assert len(packed["targets"]) == row["supervised"] > 0 and packed["input_ids"].shape[1] == row["length"]
        assert int((packed["input_ids"] == 2048).sum()) == 16 * (row["image"] is not None and bool(encoded.image_spans))
    assert taken > COUNT // 100 and refused > COUNT // 20


def test_a_mutated_picture_is_decoded_or_refused_and_nothing_else(tmp_path):
    rng, decoded, refused = random.Random(0), 0, 0
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    files = []
    for kind, more in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {"save_all": True, "append_images": [picture.convert("P")] * 2}), ("BMP", {}), ("TIFF", {})):
        buffer = io.BytesIO(); (picture.convert("P") if kind == "GIF" else picture).save(buffer, kind, **more); files.append(buffer.getvalue())
    (tmp_path / "x").write_bytes(files[0])
    transform = ImageTransform(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), "pad")
    dataset = LlavaDataset([{"id": "fuzz", "image": "x", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A fox."}]}], get_template("v1"), ENCODER, transform, tmp_path)
    for _ in range(COUNT // 10):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 2, 8, 40))): data[rng.randrange(min(len(data), rng.choice((40, 10**6))))] = rng.randrange(256)
        if rng.random() < .3: del data[rng.randrange(len(data)):]
        (tmp_path / "x").write_bytes(data)
        try: pixels = dataset[0]["pixel_values"]
        except ValueError as e: assert "record 0 (id fuzz)" in str(e) and str(tmp_path / "x") in str(e); refused += 1; continue      # whatever Pillow raised
        decoded += 1
        assert pixels.shape == (3, 28, 28) and torch.isfinite(pixels).all()
    assert decoded > COUNT // 100 and refused > COUNT // 100
