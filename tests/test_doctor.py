"""The doctor: one pass names every fault of records and pictures, by kind, and trains nothing."""
import json

import pytest
from PIL import Image
from runs import config, make_world

from llava_nb import train
from llava_nb.imageproc import load_image


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
    assert f"{96 + len(bad)} records: 96 can be trained on, {len(bad)} findings of 5 kinds" in out and "30 x" in out and "4,000 x 10 pixels" in out
    listed = [json.loads(line) for line in (world / "bad" / "findings.jsonl").read_text().splitlines()]
    assert [f["index"] for f in listed] == list(range(96, 96 + len(bad))) and all(f["file"].endswith("mixed.json") for f in listed)
    assert "page.png" in (world / "bad" / "findings.html").read_text() and not (world / "bad" / "config_resolved.json").exists()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (8_000, 8_000), (300, 14)])
def test_a_picture_that_would_take_gigabytes_is_refused_before_it_is_decoded(tmp_path, size, monkeypatch):
    Image.new("1", size).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"it has {size[0]:,} x {size[1]:,} pixels; at most 50 million"): load_image(tmp_path / "x.png")
