"""Records: every fault named by record and field, nothing lost, before anything is trained."""

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import IGNORE_INDEX, Encoder, tiny_tokenizer
from llava_nb.store.dataset import ValidatedDataset
from llava_nb.store.files import read_records

ENCODER = Encoder(tiny_tokenizer(), 2048, 16, 256)
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def record(id="a", image=None, question="What?", answer="A fox.") -> dict:
    r = {
        "id": id,
        "conversations": [
            {"from": "human", "value": ("<image>\n" if image else "") + question},
            {"from": "gpt", "value": answer},
        ],
    }
    return r | ({"image": image} if image else {})


def dataset(records, folder=None, **kw):
    return ValidatedDataset(records, get_template("v1"), ENCODER, ImageTransform(CLIP, "pad"), folder, **kw)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1}, {"b"', "not JSON at line 1"),
        ("version https://git-lfs.github.com/spec/v1", "Git-LFS"),
        ("<!DOCTYPE html>", "web page"),
        ("", "is empty"),
        ('{"data": []}', "not a list of records"),
        ('{"conversations": []}\nnope', "not JSON at line 2"),
    ],
)
def test_a_file_that_is_no_list_of_records(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        list(read_records(tmp_path / "d.json"))
    assert str(tmp_path / "d.json") in str(e.value)


def test_json_jsonl_bom_and_latin1(tmp_path):
    records = [record("a"), record("b")]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert list(read_records(tmp_path / "a.json")) == list(read_records(tmp_path / "a.jsonl")) == records
    (tmp_path / "l.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 at byte 8"):
        list(read_records(tmp_path / "l.json"))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "none.json"))


def test_lengths_and_items_agree(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    data = dataset([record("a", "x.png"), record("b", answer="One. " * 20)], tmp_path)
    for i in range(2):
        item = data[i]
        assert len(item["input_ids"]) == len(item["labels"]) == data.lengths[i]
        assert int((item["labels"][1:] != IGNORE_INDEX).sum()) == data.supervised[i]
        assert (item["pixel_values"] is not None) == data.has_image[i]
    assert data.word_lengths.tolist() == [4, -21]


def test_every_problem_is_named_and_nothing_is_lost(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    (tmp_path / "dir").mkdir()
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    bad = {"gone": "gone.png", "up": "../x.png", "root": "/etc/hostname", "dir": "dir", "link": "out.png"}
    records = (
        [record("fine", "x.png")]
        + [record(k, v) for k, v in bad.items()]
        + ["text", 7, None, record("long", question="w " * 600), record("empty", answer=" ")]
    )
    with pytest.raises(ValueError) as e:
        dataset(records, tmp_path)
    lines = str(e.value).splitlines()
    assert lines[0].startswith(f"{len(records) - 1} of {len(records)} records") and all(
        f"(id {k})" in str(e.value) for k in bad
    )
    kept = dataset(records, tmp_path, bad_records="skip")
    assert len(kept) + len(kept.quarantined) == len(records) and list(kept.records) == [records[0]]
    kept.write_quarantine(tmp_path / "q.jsonl")
    assert [json.loads(l)["index"] for l in (tmp_path / "q.jsonl").read_text().splitlines()] == list(
        range(1, len(records))
    )


def test_many_problems_are_capped_in_print_and_counted(tmp_path):
    with pytest.raises(ValueError, match="and 80 more"):
        dataset([record(answer="")] * 100)


def test_a_picture_that_cannot_be_decoded_names_file_and_record(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"record 0 \(id a\).*x\.png: cannot be decoded"):
        dataset([record("a", "x.png")], tmp_path)[0]


def expand2square(image, background=(122, 116, 104)):
    """The reference's padding, mm_utils.py."""
    square = Image.new("RGB", (max(image.size),) * 2, background)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(80, 60), (40, 100), (56, 56), (7, 3), (30, 600), (600, 31), (57, 56), (501, 1003)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_the_processors_own(aspect, size, mode, tmp_path):
    image = Image.effect_noise(size, 60).convert("RGB").convert(mode)
    image.save(tmp_path / "x.png")
    rgb = image.convert("RGB")
    wanted = torch.as_tensor(
        CLIP(expand2square(rgb) if aspect == "pad" else rgb, return_tensors="pt")["pixel_values"][0]
    )
    assert torch.equal(ImageTransform(CLIP, aspect)(tmp_path / "x.png"), wanted) and torch.equal(
        ImageTransform(CLIP, aspect)(rgb), wanted
    )


@pytest.mark.parametrize("size", [(3000, 3001), (5000, 1700)])
def test_a_large_picture_is_squared_in_bands_to_the_same_bits(size):
    image = Image.effect_noise(size, 60).convert("RGB")
    assert torch.equal(
        ImageTransform(CLIP, "pad")(image),
        torch.as_tensor(CLIP(expand2square(image), return_tensors="pt")["pixel_values"][0]),
    )


def test_a_large_jpeg_at_a_reduced_scale_is_close_and_a_small_one_the_same(tmp_path):
    for size, same in (((1500, 1000), False), ((90, 60), True)):
        Image.effect_mandelbrot(size, (-2, -1.2, 1, 1.2), 60).convert("RGB").save(tmp_path / "x.jpg")
        for aspect in ("square", "pad"):
            whole, reduced = (ImageTransform(CLIP, aspect, reduced_jpeg=r)(tmp_path / "x.jpg") for r in (False, True))
            assert torch.equal(whole, reduced) == same and (whole - reduced).abs().mean() < 0.05


def test_siglip_shape_and_modes(tmp_path):
    transform = ImageTransform(SiglipImageProcessorPil(size={"height": 56, "width": 56}), "pad")
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        Image.new(mode, (20, 30)).save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
        assert transform(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")).shape == transform.shape == (3, 56, 56)


def test_exif_is_applied_only_if_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "p.jpg", exif=exif)
    as_stored, turned = (ImageTransform(CLIP, "pad", exif)(tmp_path / "p.jpg") for exif in (False, True))
    assert (
        as_stored.shape == turned.shape
        and torch.equal(turned, as_stored.flip(1).transpose(1, 2))
        and not torch.equal(turned, as_stored)
    )


def test_line_separators_inside_a_text_do_not_cut_a_jsonl_line(tmp_path):
    records = [record("a", answer="one\u2028two\x85three\x0cfour"), record("b")]
    (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    assert list(read_records(tmp_path / "a.jsonl")) == records


def test_paths_and_ids_that_the_system_refuses_are_problems_and_not_crashes(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    records = [record("a\ud83d", name) for name in ("x" * 5000, "a\0b", "\ud83d.png", "loop")] + [record("fine")]
    kept = dataset(records, tmp_path, bad_records="skip")
    assert len(kept) == 1 and len(kept.quarantined) == 4
    kept.write_quarantine(tmp_path / "q.jsonl")
    assert json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])["id"] == "a\\ud83d"
    print(*kept.quarantined)


def test_pictures_without_a_transform_are_refused(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no image_transform"):
        ValidatedDataset([record("a", "x.png")], get_template("v1"), ENCODER, None, tmp_path)


MARKUP = (
    "```html\n<video>\n<source src='a.mp4'></video>\n```",
    "Use <video controls></video>.",
    "`<image>` is a tag of RSS",
    "<picture><source></picture>",
    "std::vector<Image>",
    "C++ vector<image> v;",
    "In XML: <image>a.png</image>",
    "An <img> tag has alt.",
    "<IMG SRC=x>",
    "Map<String, Image>",
)
MARKS = (
    "<video>\nWhat happens?",
    "See <video> here",
    "What is this? <image>",
    "<IMAGE>",
    "print('<image>')",
    "```\ncode\n```\n<audio>",
    "<img>a.png</img>",
    "<image_1> what",
)


@pytest.mark.parametrize("text", MARKUP)
def test_what_programmers_write_is_text(tmp_path, text):
    """ShareGPT's conversations, which LLaVA trains on, are full of HTML and templates of C++"""
    for turns in ((text, "Yes."), ("What?", text)):
        kept = dataset(
            [{"conversations": [{"from": who, "value": v} for who, v in zip(("human", "gpt"), turns)]}], tmp_path
        )
        sample = kept[0]
        assert sample["pixel_values"] is None and ENCODER.image_token_id not in sample["input_ids"].tolist()


@pytest.mark.parametrize("text", MARKS)
def test_a_mark_without_its_file_is_refused(tmp_path, text):
    for turns in ((text, "Yes."), ("What?", text)):
        bad = [{"conversations": [{"from": who, "value": v} for who, v in zip(("human", "gpt"), turns)]}]
        with pytest.raises(ValueError, match="1 of 1 records"):
            dataset(bad, tmp_path)
