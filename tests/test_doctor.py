"""The doctor: one pass names every fault of records and pictures, by kind, and trains nothing."""
import json

import pytest
from PIL import Image
from runs import config, make_world, run

from llava_nb import train
from llava_nb.imageproc import open_image


@pytest.fixture(scope="module")
def world(tmp_path_factory): return make_world(tmp_path_factory.mktemp("world"))


def test_a_sound_set_ends_with_0_and_a_bad_one_with_2_and_every_finding(world, capsys):
    file, settings = config(world, "sound")
    assert train.main(["doctor", str(file)]) == 0
    assert "96 records: 96 can be trained on, 0 findings" in capsys.readouterr().out
    said = lambda value: [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]       # noqa: E731
    (world / "page.png").write_text("<html>404"); Image.new("1", (4000, 10)).save(world / "thin.png")
    bad = [{"id": "page", "image": "page.png", "conversations": said("<image>")}, {"id": "thin", "image": "thin.png", "conversations": said("<image>")}, *({"id": f"gone{k}", "image": f"no{k}.png", "conversations": said("<image>")} for k in range(30)),
           {"id": "user", "conversations": [{"from": "user", "value": "Hi"}]}, "text"]
    (world / "mixed.json").write_text(json.dumps(json.loads((world / "records.json").read_text()) + bad))
    file, settings = config(world, "bad", data_path=str(world / "mixed.json"))
    assert train.main(["doctor", str(file)]) == 2
    out = capsys.readouterr().out
    assert f"{96 + len(bad)} records: 96 can be trained on, {len(bad)} findings of 5 kinds" in out and "missing: 30 (. 30)" in out and "and 10 more" in out and "4,000 x 10 pixels" in out
    listed = [json.loads(line) for line in (world / "bad" / "findings.jsonl").read_text().splitlines()]
    assert [f["index"] for f in listed if f["kind"] != "note"] == list(range(96, 96 + len(bad))) and all(f["file"].endswith("mixed.json") for f in listed)
    html = (world / "bad" / "findings.html").read_text()
    assert "page.png" in html and "data:image/jpeg" in html and "learned" in html and "http" not in html and not (world / "bad" / "config_resolved.json").exists()
    assert train.main(["doctor", str(file), "--bad_records", "missing,size,unreadable,role"]) == 2        # the text is of another kind
    assert train.main(["doctor", str(file), "--bad_records", "skip"]) == 2       # as a run that is not told of the two pictures
    assert "llava_nb: 2 of 37 pictures cannot be read" in capsys.readouterr().err
    told = ["--bad_records", "skip", "--findings", str(world / "bad" / "findings.jsonl")]
    assert train.main(["doctor", str(file), *told]) == 0
    assert train.main(["doctor", str(file), *told, "--max_bad", "5%"]) == 3
    assert train.main(["doctor", str(file), "--bad_records", "gone"]) == 2
    assert "'gone' is no kind of bad record" in capsys.readouterr().err


def test_a_run_that_is_told_what_the_doctor_found_leaves_it_out(world, capsys):
    """Trained and left out are the records of the file, counted again from what was written."""
    record = {"id": "cut", "image": "cut.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    Image.effect_noise((400, 300), 60).save(world / "cut.jpg")
    (world / "cut.jpg").write_bytes((world / "cut.jpg").read_bytes()[:9000])
    sound = json.loads((world / "records.json").read_text())
    (world / "cut_records.json").write_text(json.dumps(sound + [record, {"id": "late", "conversations": [{"from": "gpt", "value": "Hi"}, *sound[0]["conversations"]]}]))
    file, settings = config(world, "cut", data_path=str(world / "cut_records.json"), max_steps=1, save_strategy="no", use_cpu=True)
    assert train.main(["doctor", str(file)]) == 0 and train.main(["doctor", str(file), "--deep"]) == 2
    assert "(id cut): image: 'cut.jpg': it is damaged" in capsys.readouterr().out
    findings = str(world / "cut" / "findings.jsonl")
    assert train.main([str(file), "--findings", findings]) == 2 and "(id cut)" in capsys.readouterr().err
    assert train.main([str(file), "--findings", findings, "--bad_records", "unreadable", "--max_bad", "0"]) == 3 and "max_bad" in capsys.readouterr().err
    assert train.main([str(file), "--findings", findings, "--bad_records", "unreadable", "--max_bad", "1"]) == 0
    out = capsys.readouterr().out
    left = [json.loads(line) for line in (world / "cut" / "quarantine.jsonl").read_text().splitlines()]
    assert "97 records," in out and "noted: 1 x first turn dropped" in out and [p["id"] for p in left] == ["cut"] and 97 + len(left) == len(sound) + 2
    assert train.main([str(file), "--repair", "False", "--findings", findings, "--bad_records", "unreadable"]) == 2 and "begins with an answer" in capsys.readouterr().err
    (world / "cut_records.json").write_text(json.dumps(sound + [record | {"id": "other"}]))
    assert train.main([str(file), "--findings", findings]) == 2 and "run the doctor again" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_opens_its_pictures_first_and_refuses_those_it_cannot_read(world, ranks):
    """Two bad ones of five, which the ranks share; all are said by the first rank, once, and no weight is read."""
    folder = world / f"five{ranks}"; folder.mkdir()
    for k in range(3): Image.new("RGB", (60, 40), (k, 90, 90)).save(folder / f"{k}.png")
    (folder / "3.jpg").write_text("<html>404"); (folder / "4.webp").write_bytes(b"")
    names = [p.name for p in sorted(folder.iterdir())]
    (folder / "records.json").write_text(json.dumps([{"id": name, "image": names[k % 5], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]} for k, name in enumerate(names * 4)]))
    changes = {"data_path": str(folder / "records.json"), "image_folder": str(folder), "max_steps": 1, "save_strategy": "no"}
    done = run(config(world, f"opened{ranks}", **changes)[0], ranks)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("2 of 5 pictures cannot be read") == 1 and "record 3 (id 3.jpg): image: '3.jpg': its content is" in done.stderr and "record 4 (id 4.webp)" in done.stderr and "attention:" not in done.stdout
    done = run(config(world, f"unopened{ranks}", **changes, look_seconds=0)[0], 0)        # in the middle of the run, as it is without
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("llava_nb: ")]
    assert done.returncode == 6 and "from the beginning: no checkpoint is sealed yet" in said and "doctor CONFIG.json --deep" in said


def test_tokenizer_template_and_length_are_tried_before_records_are_read(world, capsys):
    for changes, said in (({"model_max_length": 70}, "leaves fewer than 64 tokens beside an image's 16 features"), ({"model_max_length": 10**30}, "positions of the language model")):
        assert train.main(["doctor", str(config(world, "never", **changes)[0])]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (world / "never").exists()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (8_000, 8_000), (300, 14)])
def test_a_picture_that_would_take_gigabytes_is_refused_before_it_is_decoded(tmp_path, size, monkeypatch):
    Image.new("1", size).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"it has {size[0]:,} x {size[1]:,} pixels; at most 50 million"):
        with open_image(tmp_path / "x.png"): pytest.fail("opened")
