"""Questions to a model open their images as the training does: from a folder, from shards, from Parquet."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.run.evals import answer
from llava_nb.store.files import read_records
from llava_nb.store.shards import Shards, write_shards
from llava_nb.store.unpacked import with_unpacked


def record(k: int, image: str) -> dict:
    return {
        "id": str(k),
        "type": "name",
        "split": "all",
        "image": image,
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
    }


def test_a_folder_shards_and_parquet_give_the_same_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_NB_CACHE", str(tmp_path / "cache"))
    names = [f"{k}.png" for k in range(4)]
    for k, name in enumerate(names):
        Image.effect_noise((40, 30), 20 * k + 10).convert("RGB").save(tmp_path / name)
    write_shards(((name, (tmp_path / name).read_bytes()) for name in names), tmp_path / "shards")
    held = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in names]
    pq.write_table(
        pa.table({"image": held, "id": names, "conversations": [record(0, "")["conversations"]] * 4}),
        tmp_path / "r.parquet",
    )
    in_parquet = [r["image"] for r in read_records(tmp_path / "r.parquet")]
    tokenizer = tiny_tokenizer()
    model = tiny_llava(tokenizer)
    transform = ImageTransform(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), "pad"
    )
    ask = lambda images, paths: [
        a.text
        for a in answer(
            model,
            tokenizer,
            get_template("v1"),
            transform,
            [record(k, p) for k, p in enumerate(paths)],
            images,
            max_new_tokens=4,
        )
    ]  # noqa: E731
    from_folder = ask(tmp_path, names)
    assert from_folder == ask(Shards(tmp_path / "shards"), names) and len(from_folder) == 4
    assert from_folder == ask(with_unpacked([tmp_path / "r.parquet"], None), in_parquet) and not any(
        (tmp_path / name).exists() for name in in_parquet
    )
    with pytest.raises(FileNotFoundError, match="none.png"):
        ask(tmp_path, ["none.png"])
