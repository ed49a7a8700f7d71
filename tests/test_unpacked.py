"""Images that Parquet files hold as bytes: the same training as from a folder, every fault named at the start."""

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from runs import config, farthest, launch, make_world, verdicts, weights
from transformers import CLIPImageProcessorPil

from llava_nb import train
from llava_nb.base.image_files import TooLarge
from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.store import files as reading
from llava_nb.store import unpacked
from llava_nb.store.dataset import ValidatedDataset
from llava_nb.store.files import held_name, image_held, read_records
from llava_nb.store.images import Folder
from llava_nb.store.unpacked import Unpacked, unpack, with_unpacked

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_NB_CACHE", str(tmp_path / "cache"))


def write(path, records, kind=IMAGE, column="image", group=20):
    """A Parquet file with the types, and the note, that `datasets` writes."""
    features = {"info": {"features": {"id": {"dtype": "string", "_type": "Value"}, column: {"_type": "Image"}}}}
    schema = pa.schema(
        [("id", pa.string()), (column, kind), ("conversations", TURNS)], metadata={"huggingface": json.dumps(features)}
    )
    parquet.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=group)
    return path


def png(k, size=(40, 30)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(k, image, **more):
    asked = "What is this?" if image is None else "<image>\nWhat is this?"
    return {
        "id": f"r{k}",
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": f"Thing {k}."}],
        "image": image,
    } | more


def dataset(file, folder=None, **how):
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    source = with_unpacked([file], Folder(folder) if folder else None)
    return ValidatedDataset(
        file, get_template("v1"), Encoder(tiny_tokenizer(), 2048, 4, 128), ImageTransform(clip, "pad"), source, **how
    )


def in_parquet(world, group=20):
    """The records of a world, with their images inside."""
    said = json.loads((world / "records.json").read_text())
    held = [
        r | {"image": {"bytes": (world / r["image"]).read_bytes(), "path": r["image"]} if "image" in r else None}
        for r in said
    ]
    return write(world / "train-00000-of-00001.parquet", held, group=group)


def test_training_from_parquet_is_training_from_a_folder(tmp_path, capsys):
    "Without an image folder; the same losses and weights, also when it is resumed."
    world = make_world(tmp_path)
    short = {"max_steps": 4, "save_steps": 2, "sampler": "modality", "dataloader_num_workers": 2}
    expected = launch(config(world, "files", **short)[0], 0)
    held = short | {"data_path": str(in_parquet(world)), "image_folder": None}
    assert {
        code
        for code, _ in verdicts(
            config(world, "seen", **held | {"max_steps": 1, "dataloader_num_workers": 0})[0], capsys
        ).values()
    } == {0}
    assert launch(config(world, "held", **held)[0], 0) == expected
    assert farthest(weights(world / "files"), weights(world / "held")) == 0
    assert launch(config(world, "again", **held, resume=str(world / "held" / "checkpoint-2"))[0], 0) == expected
    assert farthest(weights(world / "files"), weights(world / "again")) == 0


def test_bytes_paths_and_text_may_be_mixed(tmp_path):
    (tmp_path / "there.png").write_bytes(png(7))
    held = {"bytes": png(1), "path": "1.png"}
    rows = [
        record(0, held),
        record(1, None),
        record(2, {"bytes": None, "path": "there.png"}),
        record(3, held),
        record(4, {"bytes": None, "path": None}) | {"conversations": record(4, None)["conversations"]},
    ]
    file = write(tmp_path / "mixed.parquet", rows, group=2)
    with pytest.raises(ValueError, match=r"record 2 \(id r2\): image: 'there.png' is given, but no image_folder"):
        dataset(file)
    found = dataset(file, tmp_path)
    assert found.pictures.tolist() == [0, -1, 1, 0, -1]  # the same bytes are one image
    assert (
        len(found.source.shards) == 1
        and found.source.read(held_name(png(1))) == png(1)
        and found.source.read("there.png") == png(7)
    )
    direct = ImageTransform(found.image_transform.processor, "pad")
    assert torch.equal(found[0]["pixel_values"], direct(io.BytesIO(png(1)))) and torch.equal(
        found[2]["pixel_values"], direct(tmp_path / "there.png")
    )


@pytest.mark.parametrize(
    "kind,wrap",
    [
        (pa.binary(), lambda b: b),
        (pa.large_binary(), lambda b: b),
        (pa.list_(IMAGE), lambda b: [{"bytes": b, "path": None}]),
        (pa.list_(pa.binary()), lambda b: [b]),
        (pa.struct([("bytes", pa.binary())]), lambda b: {"bytes": b}),
        (pa.dictionary(pa.int32(), pa.binary()), lambda b: b),
    ],
)
def test_every_column_of_one_image_is_read(tmp_path, kind, wrap):
    file = write(tmp_path / "a.parquet", [record(k, wrap(png(k))) for k in range(5)], kind)
    assert [dataset(file).source.read(r["image"]) for r in read_records(file)] == [png(k) for k in range(5)]


@pytest.mark.parametrize(
    "kind,image,said",
    [
        (IMAGE, {"bytes": b"no image at all", "path": "x.png"}, "its content is text"),
        (IMAGE, {"bytes": b"", "path": "x.png"}, "empty"),
        (IMAGE, {"bytes": pickle.dumps(os.getcwd), "path": None}, "no known kind of data"),
        (IMAGE, {"bytes": b"\xff\xd8\xff" + bytes(60_000_000), "path": None}, "60,000,003 bytes"),
        (IMAGE, {"bytes": None, "path": "away.png"}, "'away.png' is given, but no image_folder"),
        (
            pa.list_(IMAGE),
            [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
            "make a record of each image",
        ),
        (
            pa.struct([("url", pa.string())]),
            {"url": "https://x/y.png"},
            "bytes are read from the column `image` of a Parquet file",
        ),
        (
            pa.struct([("bytes", pa.string())]),
            {"bytes": "aGVsbG8="},
            "bytes are read from the column `image` of a Parquet file",
        ),
    ],
    ids=["text", "empty", "pickle", "60 MB", "path", "two", "url", "base64"],
)
def test_a_bad_image_is_its_records_finding_in_all_three(tmp_path, capsys, kind, image, said):
    world = make_world(tmp_path)
    file = write(world / "a.parquet", [record(0, None), record(1, image), record(2, None)], kind)
    how = config(world, "out", data_path=str(file), image_folder=None, max_steps=1)[0]
    assert {code for code, _ in verdicts(how, capsys).values()} == {2}
    assert train.main(["doctor", str(how)]) == 2
    out = capsys.readouterr().out
    assert re.search(rf"record 1 \(id r1\).*({said})", out), out


def test_a_column_named_images_is_refused_as_in_other_files(tmp_path):
    file = write(
        tmp_path / "a.parquet",
        [{"id": "r0", "images": [{"bytes": png(1), "path": "1.png"}], "conversations": record(0, 1)["conversations"]}],
        pa.list_(IMAGE),
        "images",
    )
    (tmp_path / "a.json").write_text(
        json.dumps([{"id": "r0", "images": ["1.png"], "conversations": record(0, 1)["conversations"]}])
    )
    for path in (file, tmp_path / "a.json"):
        with pytest.raises(ValueError, match=r"record 0 \(id r0\): images: .*`image`"):
            dataset(path)


def test_memory_is_bounded_by_a_row_group(tmp_path):
    "400 MB of images in row groups of 20 MB; neither reading the records nor unpacking holds more than a few of them."
    schema = pa.schema([("id", pa.string()), ("image", IMAGE), ("conversations", TURNS)])
    with parquet.ParquetWriter(tmp_path / "big.parquet", schema) as out:
        for k in range(0, 40, 2):
            out.write_table(
                pa.Table.from_pylist(
                    [record(j, {"bytes": bytes([j]) * 10_000_000, "path": None}) for j in (k, k + 1)], schema
                )
            )
    code = """
import resource, sys
from pathlib import Path
from llava_nb.store.files import read_records
from llava_nb.store.unpacked import unpack
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
file, before = Path(sys.argv[1]), peak()
assert sum(1 for _ in read_records(file)) == 40
unpack([file], file.parent / "cache")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big.parquet")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200


def test_an_image_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    file = write(tmp_path / "a.parquet", [record(0, {"bytes": bytes(60_000_000), "path": None})])
    with pytest.raises(TooLarge, match="60,000,000 bytes; at most 50,000,000"):
        dataset(file).source.open(held_name(bytes(60_000_000)))


def test_a_row_group_that_would_not_fit_is_refused(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", [record(k, {"bytes": png(k), "path": None}) for k in range(8)], group=4)
    monkeypatch.setattr(reading, "MAX_GROUP", 10_000)
    with pytest.raises(
        ValueError,
        match=r"a.parquet: row group 0 has 2\d,\d{3} bytes, .* at most 10,000; "
        r"write the file again with a row_group_size of 1000",
    ):
        dataset(file)


def test_what_was_unpacked_is_used_again_and_made_anew_when_it_is_not_whole(tmp_path):
    file = write(tmp_path / "a.parquet", [record(k, {"bytes": png(k), "path": None}) for k in range(6)])
    unpacked.EACH, each = 2, unpacked.EACH
    try:
        folder = unpack([file], tmp_path / "cache")
        tars = sorted(folder.glob("*.tar"))
        stamps = lambda: [t.stat().st_mtime_ns for t in tars]  # noqa: E731
        made = stamps()
        assert len(tars) == 3 and unpack([file], tmp_path / "cache") == folder and stamps() == made
        for damage in (
            lambda: os.truncate(tars[1], 700),
            tars[2].unlink,
            (folder / "unpacked.json").unlink,
            lambda: (folder / "unpacked.json").write_text("{"),
            lambda: (folder / "000009.tar").write_bytes(b"x"),
        ):
            damage()
            found = with_unpacked([file], None)
            assert (
                all(found.read(held_name(png(k))) == png(k) for k in range(6))
                and len(found.shards) == 6
                and stamps() != made
            )
            made = stamps()
        os.utime(file, ns=(1, 1))
        assert unpack([file], tmp_path / "cache") == folder  # touched, the same content
        write(file, [record(k, {"bytes": png(k), "path": None}) for k in range(1, 7)])
        assert unpack([file], tmp_path / "cache") != folder
    finally:
        unpacked.EACH = each


def test_a_flipped_bit_is_never_another_image(tmp_path):
    file = write(tmp_path / "a.parquet", [record(0, {"bytes": png(0), "path": None})])
    found = dataset(file)
    (tar,) = (tmp_path / "cache").glob("images-*/*.tar")
    content = bytearray(tar.read_bytes())
    content[512 + 300] ^= 1
    tar.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"record 0 \(id r0\): .*is not what was unpacked; remove .*images-a-.*, and it is unpacked again",
    ):
        found[0]


def test_a_disk_that_is_full_is_said_before_and_while_unpacking(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", [record(k, {"bytes": png(k), "path": None}) for k in range(6)])
    code = (
        "import resource, sys; from pathlib import Path; from llava_nb.store.unpacked import unpack; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); unpack([Path(sys.argv[1])], Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "small")], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "no room to unpack the images of" in done.stderr
        and "(File too large); name another place with --records_cache" in done.stderr
    )
    assert (
        unpack([file], tmp_path / "small") and len(with_unpacked([file], None, tmp_path / "small").shards) == 6
    )  # what it left is made anew
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda _: type("Free", (), {"free": 10})())
    with pytest.raises(
        OSError,
        match=r"no room to unpack the images of .*a.parquet: [\d,]+ bytes are needed and 10 are free; "
        r"name another place with --records_cache",
    ):
        unpack([file], tmp_path / "full")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:2000] + bytes(b"\xff" * 3000) + b[5000:],
        lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda b: b"PAR1",
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, change):
    file = write(tmp_path / "a.parquet", [record(k, {"bytes": png(k), "path": None}) for k in range(6)])
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"^[^\n]*a.parquet: not a whole Parquet file [^\n]*$"):
        dataset(file)


def test_another_process_gets_paths_and_not_images(tmp_path):
    file = write(tmp_path / "a.parquet", [record(k, {"bytes": png(k), "path": None}) for k in range(6)])
    found = dataset(file).source
    copy = pickle.loads(pickle.dumps(found))
    assert isinstance(copy, Unpacked) and len(pickle.dumps(found)) < 700 and copy.read(held_name(png(3))) == png(3)
    assert copy.stamp(held_name(png(3))) == "parquet/" + hashlib.sha256(png(3)).hexdigest()


def test_files_without_images_of_their_own_change_nothing(tmp_path):
    file = write(tmp_path / "a.parquet", [record(0, "x.png")], pa.string())
    nulls = write(tmp_path / "b.parquet", [record(0, {"bytes": None, "path": "x.png"})])
    folder = Folder(tmp_path)
    assert (
        with_unpacked([file], folder) is folder
        and with_unpacked([nulls], folder) is folder
        and with_unpacked([], None) is None
    )
    assert (
        image_held(["x.png"]) == ["x.png"]
        and image_held({"path": "x.png"}) == {"path": "x.png"}
        and image_held(float("inf")) == float("inf")
    )
