"""What leaves the program cannot act on a terminal or a browser: commands are run and their bytes looked at."""

import io
import json
import re
import tarfile

import pytest
import torch
from PIL import Image
from runs import config, make_world
from safetensors.torch import save_file
from test_secure import FORGED, clean

from llava_nb import train
from llava_nb.checkpoint import save_llava
from llava_nb.llava import tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.run import chat_command
from llava_nb.safe import convert
from llava_nb.vision import image_processor_for

NAME = FORGED.replace("/", "")  # may stand in a file's name
MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def all_three(file, *flags):
    return [["doctor", str(file), *flags], [str(file), "--dry_run", *flags], [str(file), *flags]]


def said(capfd) -> str:
    out, err = capfd.readouterr()
    return out + err


def png() -> bytes:
    Image.new("RGB", (40, 30), "teal").save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def shards(folder, members: dict[str, bytes]):
    """One tar, whatever its members are called."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize(
    "members",
    [{f"{NAME}.json": b"{"}, {f"{NAME}.json": b'{"conversations": []}'}, {f"{NAME}.png": b"no image"}],
    ids=["no JSON", "no record", "no image"],
)
def test_a_shards_member_cannot_write_to_the_terminal(world, tmp_path, members, capfd):
    """Its name in a message about a record that is none, and about an image that is none."""
    where = shards(tmp_path / "shards", {"good.png": png()} | members)
    image = next(iter(members)) if next(iter(members)).endswith(".png") else "good.png"
    (tmp_path / "r.json").write_text(
        json.dumps(
            [
                {
                    "id": "a",
                    "image": image,
                    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
                }
            ]
        )
    )
    data = str(tmp_path / "r.json") if image != "good.png" else str(where)
    file = config(
        world, "shards", data_path=data, image_folder=str(where), output_dir=str(tmp_path / "out"), max_steps=1
    )[0]
    for argv in all_three(file):
        assert train.main(argv) == 2
        assert clean(text := said(capfd)) and "EVIL" in text, text


@pytest.mark.parametrize("content", ["[{", '[{"conversations": []}]', None], ids=["cut", "bad record", "missing"])
def test_a_file_of_records_cannot_write_to_the_terminal(world, tmp_path, content, capfd):
    path = tmp_path / f"{NAME}.json"
    if content is not None:
        path.write_text(content)
    file = config(world, "named", data_path=str(path), output_dir=str(tmp_path / "out"), max_steps=1)[0]
    for argv in all_three(file):
        assert train.main(argv) == (0 if content is None and "--dry_run" in argv else 2)  # which looks without the data
        assert clean(text := said(capfd)) and "EVIL" in text, text


def test_names_of_tensors_cannot_write_to_the_terminal_through_convert(tmp_path, capfd):
    """As a file of one pickle, and in a folder; the refusal is one line."""
    torch.save({f"{FORGED}.weight": torch.ones(1)}, tmp_path / "mm_projector.bin")
    assert train.main(["convert", str(tmp_path / "mm_projector.bin"), str(tmp_path / "to")]) == 2
    text = said(capfd)
    assert clean(text) and text.count("\n") == 1 and "EVIL" in text
    save_file({"model.mm_projector.9.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as told:
        convert.our_projector({f"mm_projector.{FORGED}": torch.ones(1)})
    assert "other layers" in str(told.value)


def test_a_model_that_says_control_characters_cannot_write_to_the_terminal(world, tmp_path, capfd):
    """Its head knows one token, the byte that begins a terminal's commands; the answer shows it escaped."""
    tokenizer = tiny_tokenizer()
    model, escape = tiny_llava(tokenizer), tokenizer.convert_tokens_to_ids("<0x1B>")
    model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "pad"}
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                p.zero_()
        model.get_input_embeddings().weight.fill_(1)
        model.lm_head.weight.zero_()[escape] = 1
    save_llava(model, tmp_path / "says", tokenizer, image_processor_for(world / "start"))
    capfd.readouterr()
    assert (
        chat_command.main([str(tmp_path / "says"), "--ask", "What?", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    )
    out = capfd.readouterr().out
    assert "\x1b" not in out and out.strip() == r"\x1b" * 5


def test_the_doctors_page_and_lists_run_nothing(world, tmp_path, capfd):
    """Names and texts of records, files and images that are markup stand on the page as text."""
    record = lambda **keys: (
        {"conversations": [{"from": "human", "value": MARKUP}, {"from": "gpt", "value": f"{MARKUP} {FORGED}"}]} | keys
    )  # noqa: E731
    found = [
        record(id=MARKUP, image=f"{MARKUP}.png"),
        record(id=FORGED, dataset=MARKUP, conversations=[]),
        record(id="a", conversations=[{"from": MARKUP, "value": MARKUP}]),
        record(id='" onload="alert(1)'),
    ]
    path = tmp_path / f"{NAME}<script>alert(1)<script>.json"
    path.write_text(json.dumps(found))
    file = config(world, "page", data_path=str(path), output_dir=str(tmp_path / "out"))[0]
    assert train.main(["doctor", str(file)]) == 2 and clean(said(capfd))
    page = (tmp_path / "out" / "findings.html").read_text()
    assert (
        "alert(1)" in page
        and not re.search(r"<script|<img[^>]*onerror|\sonload=\"alert", page.replace("&lt;", ""))
        and "\x1b" not in page
    )
    assert clean((tmp_path / "out" / "findings.jsonl").read_text())
