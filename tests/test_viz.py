"""Drawings: the same bytes every time, a text beside each, one colour code, nothing that only a style shows."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_nb.base import viz

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
TOKENS = ["<s>", "▁Hi", "<image>", "<image>", "▁A", "</s>"]
FLAGS = [False, False, False, False, True, True]


def strip(**more) -> viz.Drawing:
    return viz.token_strip(TOKENS, FLAGS, **more)


def pixels(drawing: viz.Drawing, tmp_path: Path) -> Image.Image:
    (tmp_path / "drawn.png").write_bytes(drawing._repr_png_())
    return Image.open(tmp_path / "drawn.png").convert("RGB")


def test_a_strip_has_the_same_bytes_every_time():
    first = strip(title="one")._repr_png_()
    with viz.style():
        import matplotlib

        matplotlib.rcParams["font.size"] = 30  # a notebook before this one may have set anything
        assert strip(title="one")._repr_png_() == first
    assert b"matplotlib" not in first and b"Software" not in first


def test_a_strip_is_also_text_with_marks_and_borders():
    assert repr(strip(title="one")).split("\n") == [
        "one",
        "context  <s>|·Hi",
        "image    <image>×2",
        "learned  ·A|</s>",
        "2 learned, 2 image, 2 context of 6 tokens",
    ]
    assert repr(strip(unit="segments")).endswith("of 6 segments")
    assert repr(viz.token_strip(["<image>", "<0x0A>"], [False, False])).split("\n")[:2] == [
        "image    <image>",
        "context  ↵",
    ]


def test_a_strip_shows_the_colours_of_the_one_table(tmp_path):
    seen = set(pixels(strip(), tmp_path).get_flattened_data())
    hexes = {
        kind: tuple(int(fill["facecolor"][k : k + 2], 16) for k in (1, 3, 5))
        for kind, fill in viz.FILLS.items()
        if fill["facecolor"] != "white"
    }
    assert {kind for kind, rgb in hexes.items() if rgb in seen} == {"learned", "image", "context"}


@pytest.mark.parametrize("text", ["x" * 5000, "a long system prompt, " * 60, "·" * 400])
def test_a_strip_stays_inside_its_figure(text):
    placed = list(viz._laid_out([("first", "context"), (text, "learned"), ("last", "context")]))
    assert all(column + len(piece) < viz.WIDTH for _, column, piece, _ in placed)
    assert "".join(piece for *_, piece, kind in placed if kind == "learned") == text
    places = [(line, column) for line, column, *_ in placed]
    assert places == sorted(set(places))


def test_foreign_text_is_drawn_and_never_interpreted(recwarn):
    hostile = viz.token_strip(["\x1b[31m", "東", "$x^2$", "<b>", "🔥"], [False] * 5)
    assert hostile._repr_png_() and not recwarn.list
    assert repr(hostile).startswith(r"context  \x1b[31m|\u6771|$x^2$|<b>|\U0001f525")


def test_a_strip_for_a_page_of_its_own_is_escaped():
    page = viz.token_html(["<script>", "<image>", "<image>", "▁A"], [False, False, False, True])
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;image&gt;×2" in page
    assert f"background-color: {viz.FILLS['learned']['facecolor']}" in page and ">·A</span>" in page


def test_a_flag_for_each_token():
    with pytest.raises(ValueError, match="2 tokens but 1 learned flags"):
        viz.token_strip(["a", "b"], [True])


def test_aligned_rows_in_text_and_with_arrows():
    rows = {"ids": [("1", "context"), ("<image>", "image")], "labels": [("-100", "context"), ("7", "learned")]}
    drawn = viz.aligned_rows(rows, "title", arrows=[((0, 0), (1, 1))])
    assert repr(drawn).split("\n") == ["title", "ids     1    | <image>", "labels  -100 | [7]"]
    (arrow,) = [child for child in drawn.figure.axes[0].texts if getattr(child, "arrow_patch", None)]
    assert arrow.xy[0] > arrow.xyann[0] and arrow.xy[1] > arrow.xyann[1]  # to the right, and down
    assert [text.get_text() for text in drawn.figure.axes[0].get_legend().texts] == ["learned", "image", "context"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_needs_a_style_to_be_read(path):
    "GitHub and nbviewer take styles out of HTML: what coloured spans say is lost there"
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    pages = [
        "".join(o["data"]["text/html"]) for c in found for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ]
    assert not [page[:200] for page in pages if re.search(r"<span[^>]*style=[^>]*background", page)]
