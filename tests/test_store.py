"""The Arrow file of records: the content of a list, made once, by any number of processes, resumed after a stop."""

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.store import cache, conversion, files
from llava_nb.store.conversion import convert, validate_files
from llava_nb.store.dataset import ValidatedDataset
from llava_nb.store.files import data_files, file_names, read_records
from llava_nb.store.records import Records, open_records, validate_list
from llava_nb.store.validate import BLOCK, RecordValidator

ENCODER, V1 = Encoder(tiny_tokenizer(), 2048, 16, 256), get_template("v1")
GATE = RecordValidator(V1, ENCODER)


def record(k: int, image=None, answer="A fox.") -> dict:
    said = [
        {"from": "human", "value": ("<image>\n" if image else "") + f"What is {k}?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": k, **({"image": image} if image else {}), "conversations": said}


def some(n: int) -> list[dict]:
    return [record(k, answer=f"Number {k}, \u00e9\u2028 {'and so on ' * (k % 7)}" if k % 50 else " ") for k in range(n)]


def written(path, found, **kw):
    path.write_text(json.dumps(found, **kw), encoding="utf-8")
    return path


def messages(found: Records) -> list[tuple]:
    return [(p.index, p.id, p.message) for p in found.problems]


ODD = [{"a": [1, {"b": "]},["}], "c": '\\" é \U0001f98a'}, 12, -3.5e7, "text", None, [], {}, True] + some(3)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
@pytest.mark.parametrize("strict", [True, False])
def test_both_readers_give_the_records_of_a_list(tmp_path, monkeypatch, size, style, strict):
    monkeypatch.setattr(files, "_WINDOW", size)
    if not strict:
        monkeypatch.setattr(files, "_strict_rows", lambda data: iter([None]))
    assert list(read_records(written(tmp_path / "a.json", ODD, **style))) == ODD
    assert list(read_records(written(tmp_path / "b.json", [], **style))) == []
    for between in ("\n\r\n", " ", "\n"):
        (tmp_path / "c.jsonl").write_text(between.join(json.dumps(r, **style) for r in ODD), encoding="utf-8-sig")
        assert list(read_records(tmp_path / "c.jsonl")) == ODD


def test_records_that_strict_json_does_not_know_are_read(tmp_path):
    """pandas writes NaN for a missing image; whoever cuts a text in an emoji leaves half a surrogate pair."""
    good = record(1)
    text = json.dumps(
        [good, good | {"image": float("nan")}, record(2, answer="half \ud83d"), good | {"score": float("inf")}]
    )
    (tmp_path / "a.json").write_text(text)
    found = validate_files(tmp_path / "a.json", GATE, tmp_path / "cache")
    assert [r["id"] for r in found] == [1, 1, 1] and [(p.index, p.kind) for p in found.problems] == [(2, "text")]


def test_strict_json_is_read_by_msgspec_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_tolerant_rows", None)
    assert list(read_records(written(tmp_path / "a.json", ODD, ensure_ascii=False))) == ODD


def test_an_error_behind_good_records_comes_behind_them(tmp_path):
    text = json.dumps([record(k) for k in range(9)]).encode()
    at = text.rindex(b"fox")
    (tmp_path / "a.json").write_bytes(text[:at] + b"\xff" + text[at:])
    rows = read_records(tmp_path / "a.json")
    assert [next(rows)["id"] for _ in range(8)] == [*range(8)]
    with pytest.raises(ValueError, match=f"not UTF-8 at byte {at:,}; convert it first"):
        next(rows)


def test_errors_of_a_damaged_list_are_placed_as_the_standard_library_places_them(tmp_path, monkeypatch):
    rng, text, seen = random.Random(0), json.dumps(some(6), indent=1, ensure_ascii=False), 0
    for k in range(200):
        at, size = rng.randrange(1, len(text)), rng.choice((3, 50, 5000))
        damaged = text[:at] if k % 3 == 0 else text[:at] + rng.choice('x}],:"{') + text[at + 1 :]
        (tmp_path / "d.json").write_text(damaged, encoding="utf-8")
        monkeypatch.setattr(files, "_WINDOW", size)
        try:
            right = json.loads(damaged)
        except json.JSONDecodeError as e:
            with pytest.raises(ValueError, match="not JSON at line") as found:
                list(read_records(tmp_path / "d.json"))
            place = f"line {e.lineno}, column {e.colno} (byte {len(damaged[: e.pos].encode()):,} of "
            if e.msg not in ("Expecting value", "Expecting ',' delimiter"):
                assert place in str(found.value), (damaged[at - 20 : at + 20], e)
            seen += 1
        else:
            assert list(read_records(tmp_path / "d.json")) == right
    assert seen > 100


def test_files_of_every_kind_and_a_folder_of_them_give_the_same_records(tmp_path):
    good = [record(k, None if k % 2 else f"{k}.png") for k in range(9)]
    parquet.write_table(pa.Table.from_pylist(good), tmp_path / "b.parquet")
    assert list(read_records(tmp_path / "b.parquet")) == good
    written(tmp_path / "a.json", good[:4])
    (tmp_path / "c.jsonl").write_text(json.dumps(good[4]) + "\n")
    (tmp_path / "notes.txt").write_text("no data")
    assert list(read_records(tmp_path)) == good[:4] + good + good[4:5]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match="b.parquet: not a whole Parquet file"):
        list(read_records(tmp_path / "b.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .json"):
        data_files(tmp_path / "empty")


def test_a_conversion_holds_what_a_list_holds(tmp_path):
    found = some(300) + ["text", None, {"id": "x\ud83d"}]
    a, b = validate_list(found, GATE), validate_files(written(tmp_path / "a.json", found), GATE, tmp_path / "cache")
    assert (
        list(a) == list(b) == [r for k, r in enumerate(found) if k % 50 and k < 300]
        and messages(a) == messages(b)
        and len(a.problems) == 9
    )
    assert all((a.column(c) == b.column(c)).all() for c in ("length", "supervised", "words", "image"))
    assert {p.file for p in b.problems} == {str(tmp_path / "a.json")}


def test_processes_change_nothing(tmp_path):
    data = written(tmp_path / "a.json", some(3 * BLOCK + 5))
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        convert([data], GATE, tmp_path / str(workers), workers)
    one, two = ((tmp_path / w / name).read_bytes() for w in "12" for name in ["records.arrow"])
    assert (
        one == two
        and (tmp_path / "1" / "problems.jsonl").read_bytes() == (tmp_path / "2" / "problems.jsonl").read_bytes()
    )


def test_a_stopped_conversion_goes_on_after_the_last_whole_block(tmp_path, monkeypatch):
    data, asked = written(tmp_path / "a.json", some(3 * BLOCK)), []

    class Stops(RecordValidator):
        def __call__(self, rows, first=0, file=0):
            if first >= stop:
                raise KeyboardInterrupt
            asked.append(first)
            return super().__call__(rows, first, file)

    gate, stop = Stops(V1, ENCODER), 2 * BLOCK
    with pytest.raises(KeyboardInterrupt):
        validate_files(data, gate, tmp_path / "cache", workers=1)
    parts = sorted((tmp_path / "cache").glob("*/parts/*.arrow"))
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:-40])  # and one of the blocks was cut by a power failure
    asked.clear()
    stop = 10**9
    again = validate_files(data, gate, tmp_path / "cache", workers=1)
    assert asked == [0, 2 * BLOCK] and list(again) == list(validate_list(some(3 * BLOCK), GATE))
    assert not list((tmp_path / "cache").glob("*/parts"))


def test_a_conversion_is_used_again_exactly_as_long_as_nothing_changed(tmp_path):
    data, folder = (
        written(tmp_path / "a.json", some(20)),
        lambda gate=GATE: validate_files(data, gate, tmp_path / "cache").folder,
    )
    first = folder()
    stamp = os.stat(first / "records.arrow").st_mtime_ns
    os.utime(data)
    assert folder() == first and os.stat(first / "records.arrow").st_mtime_ns == stamp
    added = tiny_tokenizer()
    added.add_tokens(["fox"])
    others = {
        folder(RecordValidator(get_template("llava_llama_2"), ENCODER)),
        folder(RecordValidator(V1, Encoder(tiny_tokenizer(), 2048, 16, 255))),
        folder(RecordValidator(V1, Encoder(added, 2048, 16, 256))),
    }
    written(data, some(21))
    others |= {first, folder()}
    assert len(others) == 5


def test_several_files_in_their_order_each_with_its_name_as_source(tmp_path):
    (tmp_path / "more").mkdir()
    b, a, c = (
        written(tmp_path / "b.json", [record(1), 5, record(2, "sub/x.png") | {"dataset": "own"}]),
        written(tmp_path / "a.json", [record(3)]),
        written(tmp_path / "more" / "c.json", [record(4, "sub/y.png")]),
    )
    found = validate_files((b, tmp_path / "more", str(a)), GATE, tmp_path / "cache", workers=2)
    assert (
        [r["id"] for r in found] == [1, 2, 4, 3]
        and found.table["source"].to_pylist() == ["b", "own", "c", "a"]
        and found.files == [str(b), str(c), str(a)]
    )
    assert [(p.file, p.index, p.source) for p in found.problems] == [(str(b), 1, "b")]
    assert list(read_records((b, c))) == [
        record(1),
        5,
        record(2, "sub/x.png") | {"dataset": "own"},
        record(4, "sub/y.png"),
    ]


def test_one_path_is_what_it_was_and_several_have_a_conversion_of_their_own(tmp_path):
    """As text, as a path or as the only one of a list; a folder is one path."""
    (tmp_path / "data").mkdir()
    a, b = (
        written(tmp_path / "data" / "a.json", [record(1, "sub/x.png")]),
        written(tmp_path / "data" / "b.json", [record(2)]),
    )
    folder = lambda path: validate_files(path, GATE, tmp_path / "cache")  # noqa: E731
    assert folder(a).folder == folder(str(a)).folder == folder((a,)).folder and folder((a,)).table[
        "source"
    ].to_pylist() == ["sub"]
    assert folder(tmp_path / "data").table["source"].to_pylist() == ["sub", "text only"] and folder((a, b)).table[
        "source"
    ].to_pylist() == ["a", "b"]
    assert len({folder(path).folder for path in (a, b, (a, b), (b, a), tmp_path / "data")}) == 5


def test_a_file_given_twice_and_all_that_are_missing_are_refused_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    a, b = written(tmp_path / "data" / "a.json", [record(1)]), written(tmp_path / "b.json", [record(2)])
    (tmp_path / "link.json").symlink_to(a)
    (tmp_path / "same").symlink_to(tmp_path / "data")
    for given in (
        (a, b, a),
        (a, tmp_path / "link.json"),
        (tmp_path / "data", a),
        (b, tmp_path / "data", tmp_path / "same"),
        (a, f"{tmp_path}/./data/../data/a.json"),
    ):
        with pytest.raises(ValueError, match=r"(a|link)\.json.*: given twice; name each file of records once"):
            data_files(given)
    with pytest.raises(FileNotFoundError, match="no1.json, .*no2.json: no such file of records"):
        data_files((tmp_path / "no1.json", a, tmp_path / "no2.json"))


def test_names_tell_files_apart(tmp_path):
    for paths, names in (
        (("x/a.json", "b.json"), ["a", "b"]),
        (("a.json", "a.jsonl"), ["a.json", "a.jsonl"]),
        (("x/a.json", "y/a.json"), ["x/a", "y/a"]),
        (("x/a.json", "x/a.jsonl", "y/a.json"), ["x/a.json", "x/a.jsonl", "y/a.json"]),
    ):
        assert file_names([tmp_path / p for p in paths]) == names
    assert len(set(file_names([tmp_path / "1/x/a.json", tmp_path / "2/x/a.json"]))) == 2


def test_pictures_that_go_and_come_are_seen_at_the_next_start(tmp_path):
    data = written(tmp_path / "a.json", [record(0, "sub/x.png"), record(1), record(2, "sub/y.png")])
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "sub" / "x.png")
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})

    def start(**kw):
        return ValidatedDataset(
            data, V1, ENCODER, ImageTransform(clip, "pad"), tmp_path, cache=tmp_path / "cache", **kw
        )

    with pytest.raises(ValueError, match=r"1 of 3 .*\n.*a\.json: record 2 \(id 2\): image: 'sub/y.png' is not a file"):
        start()
    kept = start(bad_records="skip")
    assert (
        [r["id"] for r in kept.records] == [0, 1]
        and kept.has_image.tolist() == [True, False]
        and kept[0]["pixel_values"] is not None
    )
    assert [r["id"] for r in pickle.loads(pickle.dumps(kept)).records] == [0, 1]
    Image.new("RGB", (8, 8)).save(tmp_path / "sub" / "y.png")
    assert len(start()) == 3


def test_another_process_gets_a_path_and_not_the_records(tmp_path):
    found = validate_files(written(tmp_path / "a.json", some(500)), GATE, tmp_path / "cache")
    assert len(pickle.dumps(found)) < 500 and list(pickle.loads(pickle.dumps(found))) == list(found)


def test_no_place_for_the_conversion_is_told_with_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--records_cache"):
        validate_files(written(tmp_path / "a.json", some(2)), GATE, tmp_path / "file")


def _write(path, data: bytes):
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda f: os.truncate(f / "records.arrow", os.path.getsize(f / "records.arrow") // 2),
    "empty": lambda f: os.truncate(f / "records.arrow", 0),
    "zeros": lambda f: _write(f / "records.arrow", bytes(os.path.getsize(f / "records.arrow"))),
    "gone": lambda f: os.unlink(f / "records.arrow"),
    "a byte": lambda f: _write(
        f / "records.arrow", (d := (f / "records.arrow").read_bytes())[:1000] + bytes([d[1000] ^ 1]) + d[1001:]
    ),
    "problems cut": lambda f: os.truncate(f / "problems.jsonl", 20),
    "problems gone": lambda f: os.unlink(f / "problems.jsonl"),
    "{}": lambda f: _write(f / "done.json", b"{}"),
    "[]": lambda f: _write(f / "done.json", b"[]"),
    "no JSON": lambda f: _write(f / "done.json", b"\0" * 40),
    "done empty": lambda f: _write(f / "done.json", b""),
    "an older shape": lambda f: _write(
        f / "done.json", json.dumps({"files": ["x"], "records": 1, "problems": 0}).encode()
    ),
    "files of another kind": lambda f: _write(f / "done.json", json.dumps({"files": [1], "sums": {}}).encode()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_conversion_is_made_again_and_said_so(tmp_path, what, capsys):
    data = written(tmp_path / "a.json", some(60))
    folder, right = validate_files(data, GATE, tmp_path / "cache").folder, list(validate_list(some(60), GATE))
    DAMAGE[what](folder)
    capsys.readouterr()
    again = validate_files(data, GATE, tmp_path / "cache")
    said = capsys.readouterr().err
    assert (
        list(again) == right
        and messages(again) == messages(validate_list(some(60), GATE))
        and said.count("\n") == 1
        and str(folder) in said
        and "made again" in said
    )
    assert list(validate_files(data, GATE, tmp_path / "cache")) == right and not capsys.readouterr().err


def test_a_conversion_is_on_the_disk_before_its_mark(tmp_path, monkeypatch):
    """What a power failure leaves is either marked and whole, or not marked."""
    done, durable, fsync, replace = [], {}, os.fsync, os.replace

    def synced(handle):
        durable[os.readlink(f"/proc/self/fd/{handle}")] = True
        return fsync(handle)

    def renamed(a, b):
        done.append((str(b), durable.get(str(a), False)))
        return replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder = validate_files(written(tmp_path / "a.json", some(5)), GATE, tmp_path / "cache").folder
    assert all(was for _, was in done) and done[-1][0] == str(folder / "done.json") and durable[str(folder)]
    assert {str(folder / name) for name in ("records.arrow", "problems.jsonl")} < {name for name, _ in done}


def test_parts_that_a_stop_left_damaged_are_made_anew(tmp_path):
    """Zeros inside, another block's rows, no part at all: none is taken for what it is not."""
    data, folder = written(tmp_path / "a.json", some(3 * BLOCK)), tmp_path / "c"
    (folder / "parts").mkdir(parents=True)
    blocks = list(conversion.blocks_of([data]))
    for k, block in enumerate(blocks):
        conversion._write_part(folder / "parts" / f"{k:06}.arrow", GATE(block.rows, block.first, block.file))
    first, second, third = sorted((folder / "parts").glob("*.arrow"))
    whole = first.read_bytes()
    first.write_bytes(whole[:5000] + bytes(20_000) + whole[25_000:])
    second.write_bytes(third.read_bytes())
    third.write_bytes(b"")
    assert not any(conversion._is_complete(p, b) for p, b in zip((first, second, third), blocks))
    convert([data], GATE, folder, 1)
    assert list(open_records(folder)) == list(validate_list(some(3 * BLOCK), GATE))


def test_workers_of_a_conversion_end_with_the_process_that_was_killed(tmp_path):
    """kill -9 cannot be answered; whoever works for the dead notices."""
    code = f"""
import sys, time; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_store import GATE, conversion
if __name__ == "__main__":
    with conversion._executor(GATE, 2) as pool:
        for f in [pool.submit(conversion._validate, conversion.Block(["{{}}"], 0, 0)) for _ in range(8)]: f.result()
        print(*pool._processes, flush=True); time.sleep(600)
"""
    (tmp_path / "run.py").write_text(code)
    child = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True)
    try:
        workers = [int(pid) for pid in child.stdout.readline().split()]
    finally:
        child.kill()
    child.wait()
    until = time.monotonic() + 30
    while (
        left := [
            pid
            for pid in workers
            if os.path.exists(f"/proc/{pid}/cmdline") and b"spawn" in open(f"/proc/{pid}/cmdline", "rb").read()
        ]
    ) and time.monotonic() < until:
        time.sleep(0.2)
    assert workers and not left


def test_a_text_that_the_tokenizer_fails_on_is_that_records_finding():
    """A regular expression that gives up makes Rust panic, which is no `Exception`."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    gate = RecordValidator(
        V1,
        Encoder(
            PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(json.dumps(state)),
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
            ),
            2048,
            16,
            256,
        ),
    )
    found = validate_list([record(0), record(1, answer="a" * 60 + "b"), record(2)], gate)
    assert (
        len(found) == 2
        and [(p.index, p.kind) for p in found.problems] == [(1, "tokenizer")]
        and "the tokenizer fails on a text of" in found.problems[0].message
    )


def test_a_record_of_a_million_keys_or_turns_is_read_in_bounded_time():
    """CPU seconds of this process, so that other work does not count; quadratic handling would take hours."""
    begin, turns = time.process_time(), [{"from": ("human", "gpt")[k % 2], "value": f"say {k}"} for k in range(100_000)]
    (keys, long) = GATE(
        [json.dumps(record(0) | {f"k{k}": k for k in range(1_000_000)}), json.dumps({"conversations": turns})]
    ).to_pylist()
    assert (
        keys["problem"] is None
        and long["problem"] is None
        and long["length"] == 256
        and time.process_time() - begin < 60
    )


def test_a_file_without_an_end_of_a_record_is_refused_in_bounded_memory(tmp_path):
    with (tmp_path / "x.jsonl").open("wb") as f:
        f.write(b'{"a": "' + b"x" * 200_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1, column 1 .*more than 16,777,216 characters, or no end"):
        list(read_records(tmp_path / "x.jsonl"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 150_000_000
    (tmp_path / "y.jsonl").write_text('{"a": 1} ' * 100_000)
    assert len(list(read_records(tmp_path / "y.jsonl"))) == 100_000


def test_a_list_is_read_in_little_memory(tmp_path):
    """The records are views of a mapped file: what is held for each is a small object, not its text."""
    with (tmp_path / "x.json").open("w") as f:
        f.write("[" + ",".join([json.dumps(record(0, answer="word " * 400))] * 20_000) + "]")
    tracemalloc.start()
    count, most = sum(1 for _ in files.rows_of(tmp_path / "x.json")), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and most < (tmp_path / "x.json").stat().st_size / 10


def test_a_list_nested_without_end_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" + "[" * 1_000_000 + "]" * 1_000_000 + "]")
    with pytest.raises(ValueError, match="nested too deep to be records, at line 1"):
        list(read_records(tmp_path / "x.json"))


def aged(path, monkeypatch):
    """As if the file had been left alone for long: its `ctime` cannot be set."""
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    return path


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path, monkeypatch):
    data, read, right = aged(written(tmp_path / "a.json", some(20)), monkeypatch), [], cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda file: (read.append(os.path.basename(file.name)), right(file))[1])
    folders = {validate_files(data, GATE, tmp_path / "cache").folder for _ in range(3)}
    assert (
        len(folders) == 1 and read.count("a.json") == 1 and read.count("records.arrow") == 2
    )  # made, and checked once
    before = len(read)
    validate_files(data, GATE, tmp_path / "cache")
    assert len(read) == before


@pytest.mark.parametrize("settled", [2.0, -1.0])
def test_no_change_of_a_file_goes_unseen(tmp_path, monkeypatch, settled):
    """Same size and modification time, written over or renamed into place, and twice in one tick of the clock."""
    monkeypatch.setattr(cache, "SETTLED", settled)
    data, contents = tmp_path / "a.json", [json.dumps([record(k)]) for k in range(10, 40)]
    data.write_text(contents[0])
    first = data.stat()
    for k, text in enumerate(contents):
        if settled < 0:
            time.sleep(0.02)  # the stamp alone must tell: more than a tick
        if k % 2:
            data.write_text(text)
        else:
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", data)
        os.utime(data, ns=(first.st_atime_ns, first.st_mtime_ns))
        assert (
            data.stat().st_size == first.st_size
            and cache.content_hash(data, tmp_path / "cache") == hashlib.sha256(text.encode()).hexdigest()
        )
    found = [r["id"] for r in validate_files(data, GATE, tmp_path / "cache")]
    assert found == [39]


def test_a_stamp_that_is_too_young_is_not_trusted(tmp_path):
    data = written(tmp_path / "a.json", some(3))
    cache.content_hash(data, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/hashes/*"))


def test_data_that_changes_while_it_is_converted_leaves_no_conversion(tmp_path, monkeypatch):
    data, convert = written(tmp_path / "a.json", some(20)), conversion.convert

    def changed(found, *rest):
        written(data, some(21))
        convert(found, *rest)

    monkeypatch.setattr(conversion, "convert", changed)
    with pytest.raises(OSError, match=r"a\.json: changed while its records were read"):
        validate_files(data, GATE, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/done.json"))


def test_a_cache_that_cannot_keep_hashes_costs_time_only(tmp_path):
    data = written(tmp_path / "a.json", some(3))
    (tmp_path / "cache").write_text("a file")
    assert cache.content_hash(data, tmp_path / "cache") == cache.sha256_of(data)


def test_a_quarantine_keeps_no_password(tmp_path):
    bad = record(1, "s3://user:hunter2@bucket/a.png")
    data = ValidatedDataset([record(0), bad], V1, ENCODER, None, tmp_path, bad_records="skip")
    data.write_quarantine(tmp_path / "q.jsonl")
    text = (tmp_path / "q.jsonl").read_text()
    assert "hunter2" not in text and "s3://***@bucket/a.png" in text
