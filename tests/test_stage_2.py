"""The page that leads from each sentence of LLaVA's method to its line: every line is where the page says."""

import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "stage_2.md"
ROWS = re.findall(
    r"^\| (?!sentence|---)(.+?) \| \[.+?\]\((.+?)\) \| `(.+)` \|$", PAGE.read_text(encoding="utf-8"), re.M
)


def code_of(path: Path) -> str:
    "The code of a notebook without its outputs, or the text of another file"
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def test_every_row_of_the_page_is_read():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(ROWS) == len(rows) - 2 >= 20


@pytest.mark.parametrize("sentence, link, line", ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_sentence_leads_to_its_line(sentence, link, line):
    found = code_of(PAGE.parent / link).count(line)
    assert found, f"{link} holds no line {line!r}: correct docs/stage_2.md"
