"""The reference's recorded outputs, from the folder `GOLDENS` names or the one beside this file, and the pictures they were made with."""

import gzip
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer


def folder() -> Path:
    return Path(os.environ.get("GOLDENS") or Path(__file__).parent / "goldens")


@cache
def tokenizer(legacy: bool = False):
    return AutoTokenizer.from_pretrained(folder() / "tokenizer", legacy=legacy)


def conversations() -> list[dict]:
    with gzip.open(folder() / "conversations.json.gz", "rt", encoding="utf-8") as f:
        return json.load(f)


def model_batches() -> dict[str, dict]:
    return {
        name: batch for name, batch in json.loads((folder() / "model.json").read_text()).items() if "records" in batch
    }


def golden_image(k: int, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([(7 * x + 31 * k) % 256, (5 * y + 17 * k) % 256, (3 * (x + y) + 11 * k) % 256], -1).astype(np.uint8)
    )
