"""The data half of the fault catalogue (ids 1 to 96) through the real command: one record, image or file a case."""

import io
import json
import os
import re
import shutil
import socket
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from runs import config, make_world, verdict
from transformers import AutoTokenizer

from llava_nb import train
from llava_nb.base.image_files import open_image
from llava_nb.conversation import get_template
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.safe.doctor import self_test
from llava_nb.store.conversion import validate_files
from llava_nb.store.record_checks import KINDS
from llava_nb.store.validate import RecordValidator


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    where = make_world(tmp_path_factory.mktemp("world"))
    (where / "images" / "coco").mkdir(parents=True)
    (where / "outside").mkdir()
    Image.new("RGB", (60, 40), "teal").save(where / "images" / "coco" / "fine.png")
    shutil.copy(where / "images" / "coco" / "fine.png", where / "outside" / "fine.png")
    return where


def said(*texts, first="human") -> list[dict]:
    """Turns by turns."""
    who = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": who[k % 2], "value": text} for k, text in enumerate(texts)]


def of(turns, **more) -> dict:
    return {"id": "it", "conversations": turns} | more


def shown(image, text="<image>\nWhat?") -> dict:
    return of(said(text, "A shade."), image=image)


SOUND = {"id": "sound", "image": "coco/fine.png", "conversations": said("<image>\nWhich?", "Teal.")}
LONG, NEARLY = "word " * 5_000, " ".join(["word"] * 105)  # the second fits without a picture, and not with one

# id: (record, "bad" or "note", what is said of it)
RECORDS = {
    "7 a key twice": (
        '{"id": "it", "id": "it", "conversations": %s}' % json.dumps(said("Hi", "Hello")),
        "note",
        "a key twice",
    ),
    "8 a number without end": ('{"id": %s}' % ("9" * 5000), "bad", r"cannot be read as JSON \(Exceeds the limit"),
    "8 numbers past all bounds": (
        '{"id": 1e999, "n": -1e999, "conversations": %s}' % json.dumps(said("Hi", "Hello")),
        "note",
        "keys beside",
    ),
    "10 an id twice": (SOUND, "note", "an id that another record has"),
    "13 not an object": ('"text"', "bad", "a record is an object, this is str"),
    "14 no conversations": ({"id": "it"}, "bad", "must be a list of turns, got None"),
    "15 conversations null": (of(None), "bad", "must be a list"),
    "15 conversations text": (of("Hi"), "bad", "must be a list of turns, got 'Hi'"),
    "16 no turn": (of([]), "bad", "must be a list of turns"),
    "17 no value": (
        of([{"from": "human"}, {"from": "gpt", "value": "x"}]),
        "bad",
        r"conversations\[0\]: a turn without `value`",
    ),
    "17 no from": (of([{"value": "x"}]), "bad", r"conversations\[0\]: a turn without `from`"),
    "18 value null": (of(said("Hi", None)), "bad", r"\[1\].value: must be text, got None"),
    "18 value a number": (of(said("Hi", 3)), "bad", "must be text, got 3"),
    "18 value a list": (of(said(["Hi"], "x")), "bad", r"\[0\].value: must be text"),
    "19 empty answer": (of(said("Hi", "")), "bad", r"\[1\].value: is empty"),
    "20 empty question": (of(said("", "Hi")), "bad", r"\[0\].value: is empty"),
    "21 white answer": (of(said("Hi", " \n")), "bad", r"\[1\].value: is empty"),
    "22 user": (of([{"from": "user", "value": "Hi"}]), "bad", "did you mean 'human'"),
    "22 assistant": (of([*said("Hi"), {"from": "assistant", "value": "Hi"}]), "bad", "did you mean 'gpt'"),
    "23 system": (of([{"from": "system", "value": "Be kind."}, *said("Hi", "x")]), "fine", ""),
    "23 a later system": (
        of([*said("Hi", "x"), {"from": "system", "value": "Be kind."}]),
        "bad",
        "a system prompt is the first turn",
    ),
    "24 Human": (of([{"from": "Human", "value": "Hi"}]), "bad", "did you mean 'human'"),
    "24 a space": (of([{"from": "human ", "value": "Hi"}]), "bad", "did you mean 'human'"),
    "25 two questions": (of([*said("Hi"), *said("Hi", "x")]), "bad", "two 'human' turns in a row"),
    "26 begins with an answer": (of(said("Hi", "Hi", "x", first="gpt")), "note", "first turn dropped"),
    "27 a picture in a first answer": (
        of(said("<image>", "Hi", "x", first="gpt"), image="coco/fine.png"),
        "bad",
        "belongs to a question",
    ),
    "28 only answers": (of(said("Hi", first="gpt")), "bad", "no question with an answer"),
    "28 answers in a row": (
        of([*said("Hi", first="gpt"), *said("Hi", first="gpt")]),
        "bad",
        "two|in a row|nothing to learn",
    ),
    "29 ends with a question": (of(said("Hi", "x", "And?")), "note", "last turn dropped"),
    "30 only a question": (of(said("Hi")), "bad", "nothing to learn"),
    "31 no <image>": (shown("coco/fine.png", "What?"), "bad", "no turn says <image>"),
    "32 <image> without a picture": (
        of(said("Is <image> HTML?", "No.")),
        "bad",
        "<image>, and the record has no `image`; name its file",
    ),
    "33 <image> twice in a turn": (
        shown("coco/fine.png", "<image> <image> What?"),
        "bad",
        "a second <image> for one image",
    ),
    "34 <image> in two turns": (
        of(said("<image>", "x", "<image>", "y"), image="coco/fine.png"),
        "bad",
        r"\[2\].value: a second <image>",
    ),
    "35 <image> in an answer": (of(said("What?", "<image>"), image="coco/fine.png"), "bad", "in an answer"),
    "36 a list of pictures": (shown(["a", "b"]), "bad", "must be one path.*make a record of each"),
    "36 a list of one": (shown(["coco/fine.png"]), "note", "an image in a list of one"),
    "36 null": (of(said("Hi", "x"), image=None), "fine", ""),
    "36 null and a mark": (shown(None), "bad", "<image>, and the record has no `image`"),
    "36 empty": (of(said("Hi", "x"), image=""), "fine", ""),
    "36 an empty list": (of(said("Hi", "x"), image=[]), "note", "an image in a list"),
    "36 a number": (shown(7), "bad", "must be one path.* got 7"),
    "160 images": (
        of(said("<image>\nWhat?", "A shade."), images=["coco/fine.png"]),
        "bad",
        r"images: \['coco/fine.png'\] would be lost.*did you mean `image`",
    ),
    "160 Image": (of(said("What?", "x"), Image="coco/fine.png"), "bad", "did you mean `image`"),
    "160 an image in a turn": (
        of([{"from": "human", "value": "What?", "image_url": "a.png"}, *said("x", first="gpt")]),
        "bad",
        r"conversations\[0\].image_url: 'a.png' would be lost",
    ),
    "160 in metadata": (of(said("Hi", "x"), meta={"picture": {"path": "a"}}), "bad", "meta.picture"),
    "160 a second image": (shown("coco/fine.png") | {"image_2": "b.png"}, "bad", "one image a record is read"),
    "160 pixels": (of(said("Hi", "x"), pixel_values=[[1.0]]), "bad", "pixel_values"),
    "160 about the image": (
        shown("coco/fine.png") | {"image_size": [3, 4], "imageUrl": "http://x"},
        "note",
        "keys beside",
    ),
    "160 empty": (of(said("Hi", "x"), images=[], video=None, audio=""), "note", "keys beside"),
    "161 video": (of(said("<video>\nWhat?", "x"), video="v.mp4"), "bad", "video: 'v.mp4' would be lost"),
    "161 a mark of a video": (of(said("<video>\nWhat?", "x")), "bad", "'<video>' is no mark that is read"),
    "161 sound": (of(said("Hi", "x"), audioPath="a.wav"), "bad", "videos and sounds are not read"),
    "162 marks of others": (of(said("<|vision_start|><|image_pad|>What?", "x")), "bad", "is no mark that is read"),
    "162 numbered": (shown("coco/fine.png", "<image>\n<image_1> What?"), "bad", "'<image_1>' is no mark"),
    "162 a path in marks": (of(said("<img>a.png</img> What?", "x")), "bad", "is no mark"),
    "162 HTML": (of(said("What does <img> do in HTML?", "It shows an image.")), "fine", ""),
    "162 meant by": (
        shown("coco/fine.png", "<img>\nWhat?"),
        "bad",
        r"no turn says <image>.*did you mean it by '<img>'",
    ),
    "163 messages": ({"id": "it", "messages": [{"role": "user", "content": "Hi"}]}, "bad", "found `messages`; rename"),
    "163 instruction": ({"id": "it", "instruction": "a", "output": "b"}, "bad", "found `instruction` and `output`"),
    "163 role": (of([{"role": "user", "content": "Hi"}]), "bad", r"conversations\[0\]: says `role` and `content`"),
    "163 parts": (
        of([{"from": "human", "value": [{"type": "text", "text": "Hi"}]}, *said("x", first="gpt")]),
        "bad",
        "join the parts of a content list",
    ),
    "164 a weight": (
        of([*said("Hi"), {"from": "gpt", "value": "x", "weight": 0}]),
        "bad",
        r"conversations\[1\].weight: 0 would be lost",
    ),
    "164 a weight of one": (of([*said("Hi"), {"from": "gpt", "value": "x", "weight": 1.0}]), "note", "keys beside"),
    "164 a system prompt as a key": (of(said("Hi", "x"), system="Be kind."), "bad", "a system prompt as a first turn"),
    "164 tool calls": (of([*said("Hi"), {"from": "gpt", "value": "x", "tool_calls": [1]}]), "bad", "tool_calls"),
    "165 a long role": (of([{"from": "x" * 5_000_000, "value": "Hi"}]), "bad", r"from: '.{70,90} is unknown"),
    "166 nested in a record": (
        of(said("Hi", "x"), a=json.loads("[" * 200 + "]" * 200)),
        "bad",
        "nested deeper than 64",
    ),
    "166 nested at the parser's limit": (
        '{"id": "it", "a": %s%s}' % ("[" * 900, "]" * 900),
        "bad",
        "nested (too deep|deeper)",
    ),
    "167 an image behind the end": (
        of(said(*["Hello there", "Hello to you"] * 30, "<image>\nWhat?", "Teal."), image="coco/fine.png"),
        "bad",
        "model_max_length 256 ends before an image",
    ),
    "37 </s> in a question": (of(said("Is </s> a tag?", "x")), "note", "a special token's name"),
    "38 </s> in an answer": (of(said("Hi", "It is </s>.")), "note", "a special token's name"),
    "39 <s>": (of(said("Hi", "<s>")), "note", "a special token's name"),
    "40 <unk>": (of(said("<unk>", "<unk>")), "note", "a special token's name"),
    "41 ASSISTANT:": (of(said("USER: a ASSISTANT: b", "ASSISTANT: USER:")), "fine", ""),
    "42 other templates' words": (of(said("<im_start> [INST]", "<|im_end|>")), "note", "a special token's name"),
    "43 NUL": (of(said("Hi", "a\0b")), "bad", r"holds U\+0000 at character 1"),
    "44 half a character": (of(said("Hi", "\ud83d")), "bad", r"holds U\+D83D"),
    "45 invisible": (of(said("a\u202eb", "x")), "note", "invisible, direction-changing or private-use"),
    "45 private use": (of(said("Hi", "\ue000")), "note", "private-use"),
    "46 carriage returns": (of(said("Hi\r\n", "x")), "note", "carriage returns"),
    "47 a long question and a picture": (
        shown("coco/fine.png", "<image>\n" + LONG),
        "bad",
        "no target token within model_max_length 256",
    ),
    "48 a long question": (of(said(LONG, "x")), "bad", "no target token within"),
    "49 a long answer": (of(said("Hi", LONG)), "note", "cut at model_max_length"),
    "50 the picture's features count": (shown("coco/fine.png", "<image>\n" + NEARLY), "bad", "no target token within"),
    "50 without it": (of(said(NEARLY, "A shade.")), "fine", ""),
    "51 more keys": (of(said("Hi", "x"), model="gpt-4"), "note", "keys beside id, image and conversations"),
    "53 missing": (shown("coco/gone.png"), "bad", "'coco/gone.png' is not a file in"),
    "75 up": (shown("../outside/fine.png"), "bad", "leads out of the image folder"),
    "76 absolute": (shown("/etc/hostname"), "bad", "leads out of the image folder"),
    "80 URL": (shown("https://example.org/a.png"), "bad", "is not a file in"),
    "80 data:": (
        shown("data:image/png;base64," + "A" * 5000),
        "bad",
        "no path that this system can follow|is not a file",
    ),
    "81 NUL in a path": (shown("a\0.png"), "bad", "no path that this system can follow"),
    "81 backslash": (shown("coco\\fine.png"), "bad", "did you mean 'coco/fine.png'"),
    "81 trailing space": (shown("coco/fine.png "), "bad", "did you mean 'coco/fine.png'"),
    "81 other case": (shown("coco/FINE.PNG"), "bad", "did you mean 'coco/fine.png'"),
    "81 other kind": (shown("coco/fine.jpg"), "bad", "did you mean 'coco/fine.png'"),
}


def examined(world: Path, name: str, records, capsys, *flags: str, **changes) -> tuple[int, str, list[dict]]:
    """What the doctor says: exit code, words, findings."""
    data = world / f"{name}.data.json"
    if isinstance(records, bytes):
        data.write_bytes(records)
    elif records is not None:
        data.write_text("[" + ", ".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "]")
    file, settings = config(world, name, **{"data_path": str(data), "image_folder": str(world / "images")} | changes)
    code = train.main(["doctor", str(file), *flags])
    out, err = capsys.readouterr()
    listed = Path(settings["output_dir"]) / "findings.jsonl"
    return code, out + err, [json.loads(line) for line in listed.read_text().splitlines()] if listed.is_file() else []


def slug(case: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in case)


@pytest.mark.parametrize("case", RECORDS)
def test_a_record(world, case, capsys):
    """Named by the doctor in full and refused by a run before a model is built; or taken with a note; or fine."""
    record, outcome, message = RECORDS[case]
    code, said, found = examined(world, slug(case), [SOUND, record], capsys)
    assert "Traceback" not in said and not torch.cuda.is_initialized()
    mine = [f for f in found if f["index"] == 1]
    if outcome == "bad":
        (f,) = mine
        name = "none" if record == '"text"' or case.startswith(("166", "8 a number")) else "it"
        assert code == 2 and f["kind"] in KINDS and f["id"] == name and re.search(message, f["message"]), f
        assert f"record 1 (id {name}): {f['message']}" in said and f["file"].endswith(".data.json")
        assert (
            verdict(world / f"{slug(case)}.json", capsys, "--use_cpu", "True")[0]
            == train.main([str(world / f"{slug(case)}.json"), "--use_cpu", "True"])
            == 2
        )
        err = capsys.readouterr().err
        assert (
            err.startswith("llava_nb: 1 of 2 records cannot be trained on")
            and f["message"] in err
            and "Traceback" not in err
        )
    else:
        assert code == 0 and all(f["kind"] == "note" for f in found), said
        assert any(message in f["message"] for f in mine) if outcome == "note" else not mine


def test_a_path_in_another_normal_form(world, capsys):
    """81: macOS writes é as two characters."""
    Image.new("RGB", (9, 9)).save(world / "images" / "coco" / "caf\u00e9.png")
    code, said, found = examined(world, "nfc", [shown("coco/cafe\u0301.png")], capsys)
    assert code == 2 and "did you mean 'coco/caf\u00e9.png'" in said


FILES = {
    "1 missing": (None, "does not exist"),
    "2 cut off": (b'[{"id": 1, "conversations": [', "not JSON at line 1"),
    "3 an object": (b'{"data": []}', "holds one dict"),
    "3 null": (b"null", "holds one NoneType"),
    "4 an empty list": (b"[]", "no record"),
    "4 an empty file": (b"", "is empty"),
    "5 latin-1": ('[{"id": "\u00e9"}]'.encode("latin-1"), "not UTF-8 at byte 9"),
    "5 UTF-16": ("[]".encode("utf-16"), "not UTF-8 at byte 0"),
    "6 a Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git-LFS pointer"),
    "6 a web page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "158 a comma too many": (json.dumps([SOUND])[:-1].encode() + b",]", "comma before the closing bracket; remove it"),
    "158 a comment": (b"[\n// one\n{}]", "line 2, column 1.*this is a comment"),
    "158 Python's quotes": (b"[{'id': 1}]", "single quotes"),
    "158 commas and no brackets": (b"{},\n{}", "put \\[ before the first"),
    "158 a line break in a text": (b'[{"id": "a\nb"}]', "inside a text a line break is written"),
    "158 wrapped": (b'{"data": [{"conversations": []}]}', "the records seem to be its 'data'"),
    "159 zeros": (bytes(9000), "begins with 4,096 zero bytes"),
    "159 an archive": (b"\x1f\x8b\x08", "a gzip archive; unpack it"),
    "159 no end": (b'{"a": "' + b"x" * 20_000_000, "more than 16,777,216 characters, or no end"),
    "8 nested": (b"[" * 100_000, "nested too deep"),
    "8 nested lines": (b'{"a":' * 100_000 + b"\n", "nested too deep"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_records(world, case, capsys):
    """One line, with the file's name, before anything else is looked at."""
    content, message = FILES[case]
    code, said, _ = examined(world, slug(case), content, capsys)
    assert code == 2 and re.search(message, said) and f"{slug(case)}.data.json" in said and "Traceback" not in said
    if case not in ("4 an empty list", "159 no end"):
        assert said.count("\n") == 1  # a large file has a bar
    if case not in ("1 missing", "159 no end"):
        verdict(world / f"{slug(case)}.json", capsys)  # a dry run does without the first, and says so
    assert train.main([str(world / f"{slug(case)}.json"), "--use_cpu", "True"]) == 2
    assert re.search(message, capsys.readouterr().err) and not torch.cuda.is_initialized()


def test_lines_and_a_byte_order_mark_are_read(world, capsys):
    """3, 5: records one a line, and a mark before them, are no fault."""
    for name, content in (
        ("behind each other", (json.dumps(SOUND) + json.dumps(SOUND)).encode()),
        ("over lines", "\n".join(json.dumps(r, indent=1) for r in (SOUND, SOUND)).encode()),
        ("lines", "\n".join(map(json.dumps, [SOUND, SOUND | {"id": 2}])).encode()),
        ("marked", json.dumps([SOUND, SOUND]).encode("utf-8-sig")),
    ):
        code, said, _ = examined(world, name, content, capsys)
        assert code == 0 and "2 records: 2 can be trained on" in said


def saved(image: Image.Image, kind: str, **more) -> bytes:
    image.save(out := io.BytesIO(), kind, **more)
    return out.getvalue()


def drawing(size=(64, 48), mode="RGB") -> Image.Image:
    image = Image.effect_noise(size, 60).convert("RGB")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="teal")
    return image.convert(mode)


def flat(*size, mode="1") -> bytes:
    return saved(Image.new(mode, size), "PNG")


def header(width: int, height: int) -> bytes:  # of a PNG, and nothing else
    word = lambda n: n.to_bytes(4, "big")  # noqa: E731
    chunk = lambda name, data: word(len(data)) + name + data + word(zlib.crc32(name + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0]))
        + chunk(b"IDAT", b"")
    )


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(drawing(), "JPEG", exif=exif)


def long_text() -> bytes:  # 80 MB of zeros in a text chunk of 80 KB
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))
    return saved(drawing(), "PNG", pnginfo=info)


# id: (name, bytes, "bad" or "note" or "fine", what is said); what only --deep finds ends with !
PICTURES = {
    "54 a GIF named .jpg": ("x.jpg", saved(drawing().convert("P"), "GIF"), "note", "content is GIF, name says JPEG"),
    "54 a JPEG": ("x.jpg", saved(drawing(), "JPEG"), "fine", ""),
    "54 a WEBP": ("x.webp", saved(drawing(), "WEBP", lossless=True), "fine", ""),
    "54 a BMP": ("x.bmp", saved(drawing(), "BMP"), "fine", ""),
    "55 zero bytes": ("x.jpg", b"", "bad", "content is empty"),
    "56 half a JPEG": ("x.jpg", saved(drawing((400, 300)), "JPEG")[:9000], "bad!", "damaged.*truncated"),
    "56 half a PNG": ("x.png", saved(drawing((400, 300)), "PNG")[:9000], "bad!", "damaged"),
    "58 text": ("x.jpg", b"not a picture", "bad", "content is text"),
    "58 a web page": ("x.jpg", b"<html><body>404", "bad", "content is a web page"),
    "58 a Git-LFS pointer": (
        "x.jpg",
        b"version https://git-lfs.github.com/spec/v1\n",
        "bad",
        "content is a Git-LFS pointer",
    ),
    "59 SVG": ("x.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "bad", "content is SVG"),
    "60 EPS": ("x.jpg", saved(drawing(), "EPS"), "bad", "content is PostScript"),
    "61 TIFF": ("x.jpg", saved(drawing(), "TIFF"), "bad", "content is TIFF"),
    "61 AVIF": ("x.jpg", b"\0\0\0\x20ftypavif" + bytes(99), "bad", "content is AVIF"),
    "61 HEIC": ("x.jpg", b"\0\0\0\x18ftypheic" + bytes(99), "bad", "content is HEIC"),
    "61 Photoshop": ("x.jpg", b"8BPS\0\1" + bytes(99), "bad", "content is Photoshop"),
    "61 JPEG 2000": ("x.jpg", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "bad", "content is JPEG 2000"),
    "62 CMYK": ("x.jpg", saved(drawing(mode="CMYK"), "JPEG"), "note", "CMYK"),
    "63 a transparent palette": (
        "x.png",
        saved(drawing().quantize(8), "PNG", transparency=bytes(range(8))),
        "note",
        "transparency dropped",
    ),
    "64 transparent": ("x.png", saved(drawing(mode="RGBA"), "PNG"), "note", "transparency dropped"),
    "65 16 bits": ("x.png", saved(Image.new("I;16", (20, 20), 40_000), "PNG"), "note", "16 bits a channel"),
    "66 grey": ("x.png", saved(drawing(mode="L"), "PNG"), "fine", ""),
    "66 one bit": ("x.png", saved(drawing(mode="1"), "PNG"), "fine", ""),
    "67 a moving GIF": (
        "x.gif",
        saved(drawing(mode="P"), "GIF", save_all=True, append_images=[drawing((64, 48), "P")]),
        "note",
        "more than one frame",
    ),
    "67 a moving WEBP": (
        "x.webp",
        saved(drawing(), "WEBP", save_all=True, append_images=[drawing()]),
        "note",
        "more than one frame",
    ),
    "67 a moving PNG": (
        "x.png",
        saved(drawing(), "PNG", save_all=True, append_images=[drawing()]),
        "note",
        "more than one frame",
    ),
    "68 EXIF": ("x.jpg", turned(), "note", "EXIF says to turn it"),
    "69 1 x 1": ("x.png", flat(1, 1), "bad", "1 x 1 pixels"),
    "70 1 x 9": ("x.png", flat(1, 9), "bad", "1 x 9 pixels"),
    "70 3 x 3": ("x.png", flat(3, 3), "fine", ""),
    "71 20,000 x 1": ("x.png", flat(20_000, 1), "bad", "20,000 x 1 pixels"),
    "72 169 million pixels": ("x.png", flat(13_000, 13_000), "bad", "far more pixels"),
    "73 a header of 60,000 x 60,000": ("x.png", header(60_000, 60_000), "bad", "far more pixels"),
    "74 a text without end": ("x.png", long_text(), "bad", "Decompressed data too large"),
    "74 a file of 60 MB": ("x.png", saved(drawing(), "PNG") + bytes(60_000_000), "bad", "60,0.* bytes; at most"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture(world, case, capsys):
    """What the gate refuses, the doctor names; what it takes, it takes with a note or without."""
    name, content, outcome, message = PICTURES[case]
    place = world / "images" / slug(case)
    place.mkdir()
    (place / name).write_bytes(content)
    records = [SOUND, shown(f"{slug(case)}/{name}")]
    if outcome == "bad!":
        assert examined(world, slug(case), records, capsys)[0] == 0  # the header is fine
    code, said, found = examined(world, slug(case), records, capsys, "--deep")
    if outcome == "bad":
        assert verdict(world / f"{slug(case)}.json", capsys)[0] == 2
    (place / name).unlink()
    mine = [f for f in found if f["index"] == 1]
    assert "Traceback" not in said and "Warning:" not in said
    if outcome.startswith("bad"):
        (f,) = [f for f in mine if f["kind"] != "note"]
        assert (
            code == 2
            and f["kind"] in ("size", "unreadable")
            and re.search(message, f["message"])
            and f"record 1 (id it): {f['message']}" in said
        ), f
        assert f["field"] == "image" and f["value"] == f"{slug(case)}/{name}" and f["remedy"]
    else:
        assert code == 0 and (any(message in f["message"] for f in mine) if outcome == "note" else not mine), (
            said,
            mine,
        )


def test_16_bits_keep_their_range_and_alpha_is_the_references(world):
    """64, 65: nothing is clipped to white or black; transparency goes as convert("RGB") lets it go."""
    from llava_nb.base.image_files import to_rgb

    for value in (0, 300, 40_000, 65_535):
        assert to_rgb(Image.new("I;16", (2, 2), value)).getpixel((0, 0)) == (value >> 8,) * 3
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="no known range"):
            to_rgb(Image.new(mode, (2, 2), 70_000))
    clear = Image.new("RGBA", (2, 2), (9, 8, 7, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (9, 8, 7) == clear.convert("RGB").getpixel((0, 0))


def place(kind: str, at: Path, outside: Path) -> None:
    if kind == "folder":
        at.mkdir()
    elif kind == "pipe":
        os.mkfifo(at)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(at.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(at.name)
        finally:
            os.chdir(here)
    else:
        at.symlink_to(
            {"device": "/dev/zero", "link out": outside, "dangling link": "nowhere.png", "loop": at.name}[kind]
        )


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link out", "dangling link", "loop"])
def test_what_is_no_plain_file_is_refused_and_not_opened(world, kind, capsys):
    """77, 78, 79: nobody waits for a pipe; a link must not lead out."""
    at = world / "images" / f"{slug(kind)}.png"
    place(kind, at, world / "outside" / "fine.png")
    code, said, (found,) = examined(world, slug(kind), [shown(at.name)], capsys)
    assert code == 2 and found["kind"] in ("path", "missing") and "Traceback" not in said
    if kind in ("folder", "pipe", "socket"):
        with pytest.raises(ValueError, match="no regular file"), open_image(at):
            pass


def test_a_picture_that_may_not_be_read(tmp_path):
    """82: as somebody who is not root, in a process of its own."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    from llava_nb.safe.doctor import look
    from llava_nb.store.images import Folder

    source = Folder(tmp_path)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            said, _ = look(source, "x.png")
            code = (
                0
                if "'x.png' cannot be read (Permission denied); give access to it" in str(said)
                and said.kind == "missing"
                else 3
            )
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
def test_the_padding_token_does_not_matter(pad):
    """86, 87, 88: nothing is padded, so a tokenizer without padding token, or with EOS as one, learns all its ends."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    if pad is None:
        tokenizer.unk_token = None
    gate = RecordValidator(get_template("v1"), Encoder(tokenizer, 2048, 16, 256))
    self_test(gate, 2112, 2048)
    (row,) = gate([json.dumps(of(said("<unk>", "A </s> b", "c", "d <unk>")))]).to_pylist()
    encoded = gate.encoder(gate.template.segments(said("<unk>", "A </s> b", "c", "d <unk>")))
    assert row["problem"] is None and encoded.labels.count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_that_is_not_the_models(world, capsys):
    """93, 94: ids past the embedding's rows."""
    shutil.copytree(world / "start", world / "more")
    tokenizer = AutoTokenizer.from_pretrained(world / "more")
    tokenizer.add_tokens([f"<new{k}>" for k in range(200)])
    tokenizer.save_pretrained(world / "more")
    code, said, _ = examined(world, "more_tokens", [SOUND], capsys, model=str(world / "more"))
    assert (
        code == 2
        and "the tokenizer has ids up to" in said
        and "take the tokenizer that belongs to the model" in said
        and said.count("\n") == 1
    )


def test_a_template_that_would_learn_something_else(world, capsys):
    """89, 90: the words of the template are not the tokenizer's, or its decoder changes what was said."""
    code, said, _ = examined(world, "chatml", [SOUND], capsys, template="chatml")
    assert code == 2 and "this tokenizer does not know" in said and said.count("\n") == 1
    shutil.copytree(world / "start", world / "lower")
    path = world / "lower" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, *filter(None, [state["normalizer"]])],
    }
    path.write_text(json.dumps(state))
    code, said, _ = examined(world, "lowered", [SOUND], capsys, model=str(world / "lower"))
    assert code == 2 and "would learn" in said and "choose another template" in said


def test_a_template_that_reaches_for_more_than_text(world, capsys):
    """96: a tokenizer's own template runs in Jinja's sandbox, and only where it is asked for."""
    shutil.copytree(world / "start", world / "sly")
    tokenizer = AutoTokenizer.from_pretrained(world / "sly")
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer.save_pretrained(world / "sly")
    assert examined(world, "sly_v1", [SOUND], capsys, model=str(world / "sly"))[0] == 0
    code, said, _ = examined(world, "sly_own", [SOUND], capsys, model=str(world / "sly"), template="chat_template")
    assert code == 2 and "chat_template" in said and said.count("\n") == 1


def test_a_thousand_faults_are_a_thousand_findings(world, capsys):
    """R3, R30: one pass, 20 of a kind in print, all in the list; good and bad are the records of the file."""
    bad = [record for record, outcome, _ in RECORDS.values() if outcome == "bad"]
    records = [bad[k % len(bad)] if k % 3 else SOUND for k in range(1500)]
    code, said, found = examined(world, "thousand", records, capsys)
    listed = [f for f in found if f["kind"] != "note"]
    assert (
        code == 2
        and "1,500 records: 500 can be trained on, 1,000 findings" in said
        and [f["index"] for f in listed] == [k for k in range(1500) if k % 3]
    )
    assert said.count("thousand.data.json: record") <= 20 * len({f["kind"] for f in listed})
    code, said, _ = examined(world, "thousand", None, capsys, "--bad_records", "skip")
    assert code == 0
    gate = RecordValidator(get_template("v1"), Encoder(tiny_tokenizer(), 2048, 16, 256))
    assert (
        len(validate_files(world / "thousand.data.json", gate))
        + sum(1 for f in listed if f["kind"] not in ("missing", "path"))
        == 1500
    )
