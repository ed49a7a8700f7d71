"""Tar shards: the same training as from a folder, whatever is wrong with them told at the start."""

import io
import json
import pickle
import tarfile

import pytest
from runs import config, farthest, launch, make_world, weights

import llava_nb.train as train
from llava_nb.store.shards import Shards, is_shards, write_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_NB_CACHE", str(tmp_path / "cache"))


def test_training_from_shards_is_training_from_a_folder(tmp_path):
    "Pictures in shards, and then the records with them."
    world = make_world(tmp_path)
    pngs, records = sorted(world.glob("*.png")), json.loads((world / "records.json").read_text())
    write_shards(((p.name, p.read_bytes()) for p in pngs), world / "pictures", each=7)
    samples = (
        m
        for r in records
        for m in ([(r["image"], (world / r["image"]).read_bytes())] if "image" in r else [])
        + [(f"{r['id']}.json", json.dumps({k: v for k, v in r.items() if k != "image"}).encode())]
    )
    write_shards(samples, world / "samples", each=10**9)
    short = {"max_steps": 4, "save_steps": 4, "sampler": "modality", "dataloader_num_workers": 1}
    expected = launch(config(world, "files", **short)[0], 0)
    assert launch(config(world, "shards", image_folder=str(world / "pictures"), **short)[0], 0) == expected
    assert (
        launch(config(world, "inside", data_path=str(world / "samples"), image_folder=None, **short)[0], 0) == expected
    )
    assert (
        farthest(weights(world / "files"), weights(world / "shards"))
        == farthest(weights(world / "files"), weights(world / "inside"))
        == 0
    )


def test_the_doctor_reads_headers_in_shards(tmp_path, capsys):
    world = make_world(tmp_path)
    records = [r for r in json.loads((world / "records.json").read_text()) if "image" in r][:4]
    (world / "few.json").write_text(json.dumps(records))
    pictures = {r["image"]: (world / r["image"]).read_bytes() for r in records}
    write_shards(pictures.items(), world / "good")
    write_shards(((pictures | {records[2]["image"]: b"no picture"}).items()), world / "bad")
    write_shards(
        (m for r in records for m in ((r["image"], pictures[r["image"]]), (f"{r['id']}.json", json.dumps(r).encode()))),
        world / "both",
    )
    doctor = lambda name, **changes: train.main(
        ["doctor", str(config(world, name, **{"data_path": str(world / "few.json")} | changes)[0])]
    )  # noqa: E731
    assert doctor("good-run", image_folder=str(world / "good")) == 0
    assert doctor("bad-run", image_folder=str(world / "bad")) == 2
    assert (
        f"record 2 (id {records[2]['id']}): image: {records[2]['image']!r}: its content is text"
        in capsys.readouterr().out
    )
    assert doctor("both-run", data_path=str(world / "both"), image_folder=None) == 0


def test_an_index_is_made_once_and_again_when_a_shard_changes(tmp_path):
    write_shards([("a.png", b"1"), ("b.png", b"22")], tmp_path / "s", each=1)
    first = Shards(tmp_path / "s")
    made = (first.folder / "index.arrow").stat().st_mtime_ns
    again = Shards(tmp_path / "s")
    assert again.folder == first.folder and (again.folder / "index.arrow").stat().st_mtime_ns == made
    copy = pickle.loads(pickle.dumps(first))
    assert copy.read("b.png") == b"22" and len(pickle.dumps(first)) < 500
    write_shards([("a.png", b"333")], tmp_path / "s", each=1)
    changed = Shards(tmp_path / "s")
    assert (
        changed.folder != first.folder
        and changed.read("a.png") == b"333"
        and changed.stamp("a.png") != first.stamp("a.png")
    )


@pytest.mark.parametrize("name", ["index.arrow", "records.jsonl", "shards.json"])
@pytest.mark.parametrize("harm", ["cut", "zeros", "gone", "another shape"])
def test_a_damaged_index_is_made_again(tmp_path, name, harm):
    "As a power cut leaves it, whatever its mark says."
    write_shards([("a.png", b"1"), ("a.json", b'{"id": "a"}'), ("b.png", b"22")], tmp_path / "s")
    file = Shards(tmp_path / "s").folder / name
    whole = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "another shape": b"[]"}[harm])
    again = Shards(tmp_path / "s")
    assert (
        again.read("b.png") == b"22"
        and again.read("a.png") == b"1"
        and (again.folder / "records.jsonl").read_text().count("\n") == 1
    )


def test_names_that_several_shards_use_are_told_apart_by_the_shard(tmp_path):
    write_shards([("x/0.png", b"one"), ("x/0.png", b"two")], tmp_path, each=1)
    found = Shards(tmp_path)
    with pytest.raises(ValueError, match=r"'x/0.png' is in 2 shards of .*; write SHARD.tar/x/0.png"):
        found.find("x/0.png")
    assert found.read("000000.tar/x/0.png") == b"one" and found.read("000001.tar/x/0.png") == b"two"
    assert list(found.problems(["000001.tar/x/0.png", "x/0.png", "y.png", "000007.tar/x/0.png", "\ud800"])) == [
        "x/0.png",
        "y.png",
        "000007.tar/x/0.png",
        "\ud800",
    ]


def test_only_plain_files_of_a_tar_count_and_nothing_is_unpacked(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind, to in (
            ("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.png", tarfile.LNKTYPE, "../../x"),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            tar.addfile(info)
        info = tarfile.TarInfo("../../up.png")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"up"))
    found = Shards(tmp_path)
    assert len(found) == 1 and found.read("../../up.png") == b"up"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar", "cache"]


@pytest.mark.parametrize(
    "write,message",
    [
        (lambda f: tarfile.open(f / "0.tar", "w:gz").close(), "0.tar: not a plain tar"),
        (lambda f: (f / "0.tar").write_bytes(b"<html>" * 400), "0.tar: not a plain tar"),
        (lambda f: write_shards([("a.json", b"{")], f), "000000.tar: a.json is not JSON"),
        (lambda f: (f / "notes.txt").write_text(""), "no .tar shard here"),
    ],
)
def test_what_is_wrong_with_shards_is_told(tmp_path, write, message):
    (tmp_path / "s").mkdir()
    write(tmp_path / "s")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Shards(tmp_path / "s")


def test_a_shard_that_was_cut_off_is_told(tmp_path):
    (shard,) = write_shards([("a.png", b"1" * 2000), ("b.png", b"2" * 2000)], tmp_path / "s")
    shard.write_bytes(shard.read_bytes()[:3700])
    with pytest.raises(ValueError, match="000000.tar: b.png ends after"):
        Shards(tmp_path / "s")


def test_a_picture_folder_with_a_tar_left_in_it_is_a_picture_folder(tmp_path):
    write_shards([("a.png", b"1")], tmp_path)
    assert is_shards(tmp_path) and is_shards("s3://bucket/set")
    (tmp_path / "coco").mkdir()
    assert not is_shards(tmp_path) and not is_shards(tmp_path / "none")


def test_an_unknown_store_is_told(tmp_path):
    with pytest.raises(ValueError, match="nowhere://x"):
        Shards("nowhere://x")
