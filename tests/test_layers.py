"""Arrows between modules go one way: base, fast, the book, store, safe, run, demo. The book reads and runs without what stands behind it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llava_nb"
LAYERS = (
    "base",
    "fast",
    "book",
    "store",
    "safe",
    "run",
    "demo",
)  # a module imports from its own layer and from those before it
ALONE = {"fast": ("base", "fast")}  # kernels know nothing of LLaVA


def modules() -> dict[str, Path]:
    "Every module of the package by its dotted name below `llava_nb`"
    found = {str(p.relative_to(PACKAGE).with_suffix("")).replace("/", "."): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {name: path for name, path in found.items() if not name.endswith(("__init__", "_modidx"))}


def layer(name: str) -> str:
    "The book's modules stand in the package itself; `train` is the program, which may use everything"
    if name == "train":
        return "run"
    return name.split(".")[0] if "." in name else "book"


def imported(name: str, path: Path) -> set[str]:
    "Our modules that a module imports, anywhere in it"
    known, found, package = modules(), set(), ["llava_nb", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *filter(None, [node.module])])
            found |= {whole, *(f"{whole}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("llava_nb.") for name in found} & set(known)


DEBTS = set()  # modules that still import against the rule: none

GRAPH = {name: imported(name, path) for name, path in modules().items()}


@pytest.mark.parametrize("name", GRAPH)
def test_a_module_imports_from_layers_before_it(name):
    own = layer(name)
    allowed = ALONE.get(own) or LAYERS[: LAYERS.index(own) + 1]
    against = {other for other in GRAPH[name] if layer(other) not in allowed}
    if name in DEBTS:
        assert against, f"{name} is in order: take it from DEBTS"
    else:
        assert not against, f"{name} stands in the layer {own!r} and imports {sorted(against)}"


def test_imports_have_no_cycle():
    TopologicalSorter(GRAPH).prepare()
