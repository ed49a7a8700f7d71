"""Write README.md, and its pictures under docs/images/, from nbs/index.ipynb.

usage: python tools/readme.py [FOLDER]      FOLDER: where to write; the repository by default
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "docs/images"


def visible(nb):
    "The cells of `nb` as a reader sees them: hidden ones dropped, directives stripped, inputs of `echo: false` emptied"
    cells = []
    for cell in nb.cells:
        directives = re.findall(r"^#\|\s*(.*?)\s*$", cell.source, re.M) if cell.cell_type == "code" else []
        if "hide" in directives:
            continue
        cell.metadata.alt = next(
            (d.removeprefix("fig-alt: ") for d in directives if d.startswith("fig-alt: ")), "figure"
        )
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M) if directives else cell.source
        cell.metadata.transient = {"remove_source": "echo: false" in directives}
        for output in cell.get("outputs", []):  # a picture's repr beside it says nothing
            if "image/png" in output.get("data", {}):
                output["data"].pop("text/plain", None)
        cells.append(cell)
    nb.cells = cells
    return nb


def write(folder: Path) -> None:
    "Write the README and the pictures it shows into `folder`"
    nb = visible(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    body, resources = MarkdownExporter().from_notebook_node(nb, {"unique_key": "index", "output_files_dir": IMAGES})
    alts = iter([c.metadata.alt for c in nb.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})])
    body = re.sub(r"!\[png\]", lambda _: f"![{next(alts)}]", body)
    body = re.sub(r"[ \t]+$", "", body, flags=re.M)
    body = re.sub(r"\]\(((?:\w+/)?\w+\.ipynb)\)", r"](nbs/\1)", body)  # the notebooks' links to one another
    body = re.sub(r"\]\(\.\./", "](", body)  # and those to pages at the top
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", encoding="utf-8")
    shutil.rmtree(folder / IMAGES, ignore_errors=True)
    for name, data in sorted(resources["outputs"].items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
