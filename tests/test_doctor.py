"""The doctor: one pass names every fault of records and pictures, by kind, and trains nothing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from runs import config, make_world, run
from test_catalogue_data import PICTURES, RECORDS, SOUND, of, said, shown, slug

from llava_nb import train
from llava_nb.base.image_files import open_image
from llava_nb.conversation import BadRecord, get_template
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.safe.doctor import Findings, write
from llava_nb.store.conversion import validate_files
from llava_nb.store.images import Folder
from llava_nb.store.records import with_findings, with_pictures
from llava_nb.store.validate import RecordValidator


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_sound_set_ends_with_0_and_a_bad_one_with_2_and_every_finding(world, capsys):
    file, settings = config(world, "sound")
    assert train.main(["doctor", str(file)]) == 0
    assert "96 records: 96 can be trained on, 0 findings" in capsys.readouterr().out
    said = lambda value: [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]  # noqa: E731
    (world / "page.png").write_text("<html>404")
    Image.new("1", (4000, 10)).save(world / "thin.png")
    bad = [
        {"id": "page", "image": "page.png", "conversations": said("<image>")},
        {"id": "thin", "image": "thin.png", "conversations": said("<image>")},
        *({"id": f"gone{k}", "image": f"no{k}.png", "conversations": said("<image>")} for k in range(30)),
        {"id": "user", "conversations": [{"from": "user", "value": "Hi"}]},
        "text",
    ]
    (world / "mixed.json").write_text(json.dumps(json.loads((world / "records.json").read_text()) + bad))
    file, settings = config(world, "bad", data_path=str(world / "mixed.json"))
    assert train.main(["doctor", str(file)]) == 2
    out = capsys.readouterr().out
    assert (
        f"{96 + len(bad)} records: 96 can be trained on, {len(bad)} findings of 5 kinds" in out
        and "missing: 30 (. 30)" in out
        and "and 10 more" in out
        and "4,000 x 10 pixels" in out
    )
    listed = [json.loads(line) for line in (world / "bad" / "findings.jsonl").read_text().splitlines()]
    assert [f["index"] for f in listed if f["kind"] != "note"] == list(range(96, 96 + len(bad))) and all(
        f["file"].endswith("mixed.json") for f in listed
    )
    html = (world / "bad" / "findings.html").read_text()
    assert (
        "page.png" in html
        and "data:image/jpeg" in html
        and "learned" in html
        and "http" not in html
        and not (world / "bad" / "config_resolved.json").exists()
    )
    assert (
        train.main(["doctor", str(file), "--bad_records", "missing,size,unreadable,role"]) == 2
    )  # the text is of another kind
    assert (
        train.main(["doctor", str(file), "--bad_records", "skip"]) == 2
    )  # as a run that is not told of the two pictures
    assert "llava_nb: 2 of 37 images cannot be read" in capsys.readouterr().err
    told = ["--bad_records", "skip", "--findings", str(world / "bad" / "findings.jsonl")]
    assert train.main(["doctor", str(file), *told]) == 0
    assert train.main(["doctor", str(file), *told, "--max_bad_records", "5%"]) == 3
    assert train.main(["doctor", str(file), "--bad_records", "gone"]) == 2
    assert "'gone' is no kind of bad record" in capsys.readouterr().err


def test_a_run_that_is_told_what_the_doctor_found_leaves_it_out(world, capsys):
    """Trained and left out are the records of the file, counted again from what was written."""
    record = {
        "id": "cut",
        "image": "cut.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
    }
    Image.effect_noise((400, 300), 60).save(world / "cut.jpg")
    (world / "cut.jpg").write_bytes((world / "cut.jpg").read_bytes()[:9000])
    sound = json.loads((world / "records.json").read_text())
    (world / "cut_records.json").write_text(
        json.dumps(
            sound
            + [record, {"id": "late", "conversations": [{"from": "gpt", "value": "Hi"}, *sound[0]["conversations"]]}]
        )
    )
    file, settings = config(
        world, "cut", data_path=str(world / "cut_records.json"), max_steps=1, save_strategy="no", use_cpu=True
    )
    assert train.main(["doctor", str(file)]) == 0 and train.main(["doctor", str(file), "--deep"]) == 2
    assert "(id cut): image: 'cut.jpg': it is damaged" in capsys.readouterr().out
    findings = str(world / "cut" / "findings.jsonl")
    assert train.main([str(file), "--findings", findings]) == 2 and "(id cut)" in capsys.readouterr().err
    assert (
        train.main([str(file), "--findings", findings, "--bad_records", "unreadable", "--max_bad_records", "0"]) == 3
        and "max_bad_records" in capsys.readouterr().err
    )
    assert train.main([str(file), "--findings", findings, "--bad_records", "unreadable", "--max_bad_records", "1"]) == 0
    out = capsys.readouterr().out
    left = [json.loads(line) for line in (world / "cut" / "quarantine.jsonl").read_text().splitlines()]
    assert (
        "97 records," in out
        and "noted: 1 x first turn dropped" in out
        and [p["id"] for p in left] == ["cut"]
        and 97 + len(left) == len(sound) + 2
    )
    assert (
        train.main([str(file), "--repair", "False", "--findings", findings, "--bad_records", "unreadable"]) == 2
        and "begins with an answer" in capsys.readouterr().err
    )
    (world / "cut_records.json").write_text(json.dumps(sound + [record | {"id": "other"}]))
    assert train.main([str(file), "--findings", findings]) == 2 and "run the doctor again" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_opens_its_pictures_first_and_refuses_those_it_cannot_read(world, ranks):
    """Two bad ones of five, which the ranks share; all are said by the first rank, once, and no weight is read."""
    folder = world / f"five{ranks}"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (60, 40), (k, 90, 90)).save(folder / f"{k}.png")
    (folder / "3.jpg").write_text("<html>404")
    (folder / "4.webp").write_bytes(b"")
    names = [p.name for p in sorted(folder.iterdir())]
    (folder / "records.json").write_text(
        json.dumps(
            [
                {
                    "id": name,
                    "image": names[k % 5],
                    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
                }
                for k, name in enumerate(names * 4)
            ]
        )
    )
    changes = {
        "data_path": str(folder / "records.json"),
        "image_folder": str(folder),
        "max_steps": 1,
        "save_strategy": "no",
    }
    done = run(config(world, f"opened{ranks}", **changes)[0], ranks)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        done.stderr.count("2 of 5 images cannot be read") == 1
        and "record 3 (id 3.jpg): image: '3.jpg': its content is" in done.stderr
        and "record 4 (id 4.webp)" in done.stderr
        and "attention:" not in done.stdout
    )
    done = run(
        config(world, f"unopened{ranks}", **changes, image_check_seconds=0)[0], 0
    )  # in the middle of the run, as it is without
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("llava_nb: ")]
    assert (
        done.returncode == 6
        and "begins again: there is no checkpoint yet" in said
        and "doctor CONFIG.json --deep" in said
    )


def test_tokenizer_template_and_length_are_tried_before_records_are_read(world, capsys):
    for changes, said in (
        ({"model_max_length": 70}, "leaves fewer than 64 tokens beside an image's 16 features"),
        ({"model_max_length": 10**30}, "positions of the language model"),
    ):
        assert train.main(["doctor", str(config(world, "never", **changes)[0])]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (world / "never").exists()


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (8_000, 8_000), (300, 14)])
def test_a_picture_that_would_take_gigabytes_is_refused_before_it_is_decoded(tmp_path, size, monkeypatch):
    Image.new("1", size).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"it has {size[0]:,} x {size[1]:,} pixels; at most 50 million"):
        with open_image(tmp_path / "x.png"):
            pytest.fail("opened")


HOSTILE = {
    "markup in an id": of(said("Hi", ""), id="<script>alert(1)</script>"),
    "markup in a path": shown('"><img src=x onerror=alert(1)>.png'),
    "a terminal's codes": of(said("Hi", "x\x1b[2J\x9b31m\0"), id="\x1b]0;title\x07"),
    "markup in a role": of([{"from": "</td><iframe src=//x>", "value": "\x1b"}]),
    "text that turns round": of(said("Hi", ""), id="\u202eab\u2028c"),
    "markup in a key": {
        "id": "key",
        "<svg onload=alert(1)>": 1,
        "conversations": said("<b onclick=x>Hi</b>", "<style>*{display:none}</style>"),
    },
}


class Page(HTMLParser):
    """What a page is made of, and whether all that is opened is closed."""

    ALONE, LEFT_OPEN = {"meta", "img", "br"}, {"td", "th", "tr", "p"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.astray, self.text = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in self.ALONE | self.LEFT_OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.LEFT_OPEN:
            return
        if not self.open or self.open.pop() != tag:
            self.astray.append(tag)

    def handle_data(self, text):
        if not self.open or self.open[-1] != "style":
            self.text.append(text)


def all_that_is_bad(world: Path) -> list:
    """The good record, every bad record and image of the catalogue, those of the field, and attacks on the page."""
    images = world / "images"
    (images / "coco").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), "teal").save(images / "coco" / "fine.png")
    field = [
        r
        for case in json.loads((Path(__file__).parent / "field" / "cases.json").read_text()).values()
        if case["code"] == 2 and "model_max_length" not in case.get("settings", {})
        for r in case.get("records", [])
    ]
    found = [SOUND, *(record for record, outcome, _ in RECORDS.values() if outcome == "bad"), *field, *HOSTILE.values()]
    for case, (name, content, outcome, _) in PICTURES.items():
        if outcome == "fine":
            continue
        (images / slug(case)).mkdir(exist_ok=True)
        (images / slug(case) / name).write_bytes(content)
        found.append(shown(f"{slug(case)}/{name}"))
    return found


def test_everything_bad_at_once_is_found_and_shown_safely(world, capsys):
    """One data set of all: each is found, by kind; the list has a line each; the page is well formed and inert."""
    records = all_that_is_bad(world)
    (world / "all.json").write_text("[" + ", ".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "]")
    file, settings = config(world, "all_bad", data_path=str(world / "all.json"), image_folder=str(world / "images"))
    assert train.main(["doctor", str(file), "--deep"]) == 2
    told = "".join(capsys.readouterr())
    assert "Traceback" not in told and not any(ord(c) < 32 and c not in "\n\t\r" or 127 <= ord(c) < 160 for c in told)
    listed = [json.loads(line) for line in (world / "all_bad" / "findings.jsonl").read_text().splitlines()]
    pictures = [outcome for _, _, outcome, _ in PICTURES.values() if outcome != "fine"]
    noted = {len(records) - len(pictures) + k for k, outcome in enumerate(pictures) if outcome == "note"}
    fine = noted | {0, *(k for k, r in enumerate(records) if isinstance(r, dict) and r.get("id") == "key")}
    bad = {f["index"] for f in listed if f["kind"] != "note"}
    assert set(range(len(records))) - fine - bad == set() and not bad & noted and 0 not in bad
    for f in listed:
        assert (
            f["file"].endswith("all.json")
            and {"file", "index", "id", "kind", "field", "value", "what", "remedy"} <= f.keys()
            and f["what"]
        )
        assert len(f["value"] or "") <= 210 and len(f["message"]) < 2000 and (f["kind"] == "note" or f["remedy"]), f
    assert len({f["kind"] for f in listed}) >= 8
    html = (world / "all_bad" / "findings.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert (
        not page.astray
        and not page.open
        and page.tags
        <= {"meta", "title", "style", "h1", "h2", "table", "tr", "th", "td", "div", "b", "i", "p", "pre", "img", "span"}
    ), (page.astray, page.open, page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes) and all(
        value.startswith("data:image/jpeg;base64,") for name, value in page.attributes if name in ("src", "href")
    )
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 or c in "\u2028\u2029\u202e" for c in html)
    assert "<script>alert(1)</script>" in "".join(page.text)


def test_neither_the_list_nor_the_page_keeps_a_password(tmp_path):
    """Of an image's address, of an id, of a place of shards; and the list still names its records to a run."""
    address, said = "s3://key:hunter2@bucket", [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "page.png").write_text("<html>404")
    data = [
        {"id": f"{address}/1", "image": "page.png", "conversations": said},
        {"id": "gone", "image": f"{address}/2.png", "conversations": said},
        {
            "id": "unread",
            "image": "page.png",
            "conversations": said,
            "video": f"{address}/3.mp4",
            "url": "https://host/4.png?signature=hunter2",
        },
    ]
    (tmp_path / "data.json").write_text(json.dumps(data))

    class Elsewhere(Folder):
        def __str__(self) -> str:
            return address

        def problems(self, images):
            return {
                i: BadRecord("missing", f"{i!r} is in no shard of {self}", "add it", "image")
                for i in images
                if i != "page.png"
            }

    gate, source = RecordValidator(get_template("v1"), Encoder(tiny_tokenizer(), 2048, 16, 256)), Elsewhere(tmp_path)
    records = with_pictures(validate_files(tmp_path / "data.json", gate, tmp_path / "cache"), source)
    found = Findings()
    found.add(records, source)
    write(found, gate, tmp_path / "out")
    listed, page = ((tmp_path / "out" / name).read_text() for name in ("findings.jsonl", "findings.html"))
    assert (
        "hunter2" not in listed + page and listed.count("s3://***@bucket") >= 4 and page.count("s3://***@bucket") >= 4
    )
    left = with_findings(records, tmp_path / "out" / "findings.jsonl")
    assert len(left) == 0 and [p.kind for p in left.problems] == ["unreadable", "missing", "unread"]
