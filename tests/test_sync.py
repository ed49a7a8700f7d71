"""The notebooks are the source: the package, the README and the metadata must say what they say."""

import ast
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.version import Version

import llava_nb

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "llava_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
IMPORT_NAMES = {"pillow": "PIL", "protobuf": "google"}  # where a requirement and its import differ
NEVER = {
    "fastcore",
    "nbdev",
    "execnb",
    "IPython",
}  # they change under patch releases; an exported module uses none of them
KB = 1024

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: within(p))
by_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: within(p))


def settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def required() -> set[str]:
    return {IMPORT_NAMES.get(name, name) for name in re.findall(r"(?:^|\s)([\w-]+)", settings()["requirements"])}


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def within(path: Path) -> str:
    "Where a notebook or module lies, as an id: `fast/attention`"
    return str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).with_suffix(""))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path) for output in cell["outputs"]]


def files_under(folder: Path, pattern: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.glob(pattern))
        if p.is_file() and "checkpoints" not in str(p)
    }


def same(fresh: dict[str, bytes], kept: dict[str, bytes], remedy: str) -> None:
    assert sorted(fresh) == sorted(kept), (
        f"missing {sorted(set(fresh) - set(kept))}, stale {sorted(set(kept) - set(fresh))}: {remedy}"
    )
    changed = [name for name in fresh if fresh[name] != kept[name]]
    assert not changed, f"{changed} differ: {remedy}"


# Notebooks to package


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    "The repository as nbdev would write it, from the notebooks alone"
    copy = tmp_path_factory.mktemp("export") / ROOT.name
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    (copy / "llava_nb").mkdir()
    for name in ("pyproject.toml", "settings.ini", "llava_nb/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {
        "PYTHONPATH": str(copy)
    }  # nbdev exports nothing under IN_TEST
    for module, command in (("doclinks", "nbdev_export"), ("clean", "nbdev_clean")):
        code = f"import sys; sys.argv = ['{command}']; from nbdev.{module} import {command} as run; run()"
        subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, check=True, stdin=subprocess.DEVNULL)
    return copy


def test_package_is_what_the_notebooks_export(exported):
    same(
        files_under(exported / "llava_nb", "**/*.py"),
        files_under(ROOT / "llava_nb", "**/*.py"),
        "edit the notebook, `make export`, delete stale modules",
    )


def test_notebooks_are_clean(exported):
    same(
        files_under(exported / "nbs", "**/*.ipynb"),
        files_under(ROOT / "nbs", "**/*.ipynb"),
        "run `.venv/bin/nbdev_clean`",
    )


def test_readme_is_generated(tmp_path):
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    readme.write(tmp_path)
    for pattern in ("README.md", "docs/images/*"):
        same(files_under(tmp_path, pattern), files_under(ROOT, pattern), "run `make readme`")


def test_readme_names_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [p.name for p in NOTEBOOKS if p.stem != "index" and f"({p.relative_to(ROOT)})" not in text], (
        "run `make notebooks`"
    )


def test_readme_is_read_on_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_links_of_the_pages_lead_somewhere():
    pages = [p for p in ROOT.glob("*.md")] + [p for p in (ROOT / "docs").glob("*.md")] + [ROOT / "bench" / "RESULTS.md"]
    links = {
        (p, link)
        for p in pages
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", p.read_text(encoding="utf-8"))
        if "://" not in link
    }
    assert len(links) > 40
    assert not [f"{p.name}: {link}" for p, link in links if not (p.parent / link).exists()]


def test_links_between_notebooks_lead_somewhere():
    lost = []
    for path in NOTEBOOKS:
        text = "".join(source(cell) for cell in cells(path, "markdown"))
        links = [link for link in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", text) if "://" not in link]
        lost += [f"{within(path)}: {link}" for link in links if not (path.parent / link).exists()]
    assert not lost


# Metadata


def test_settings_pyproject_and_version_agree():
    config, project = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["version"] == llava_nb.__version__
    assert config["description"].startswith(llava_nb.__doc__.strip(" .\n"))
    assert config["lib_name"] == project["project"]["name"]
    assert f">={config['min_python']}" == project["project"]["requires-python"]
    assert {key: project["tool"]["nbdev"][key] for key in ("lib_path", "nbs_path", "tst_flags")} == {
        key: config[key] for key in ("lib_path", "nbs_path", "tst_flags")
    }


def test_exact_pins_agree_with_the_constraints():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    exact = re.findall(
        r"([\w-]+)==([\w.]+)",
        " ".join(settings()[key] for key in ("dev_requirements", "demo_requirements", "demo_files")),
    )
    assert exact and {name: pins.get(name) for name, _ in exact} == dict(exact)


def test_the_floor_is_what_settings_allow():
    "`make floor` runs on the lowest versions that settings.ini names, but for torch, which has no such wheel for a CPU"
    lowest = dict(re.findall(r"([\w-]+)>=([\w.]+)", settings()["requirements"]))
    floor = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints-floor.txt").read_text(), re.M))
    lowest.pop("torch")
    assert {name: Version(floor.get(name, "0")) for name in lowest} == {
        name: Version(version) for name, version in lowest.items()
    }
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    tools = set(floor) - set(lowest)
    assert {name: floor[name] for name in tools} == {name: pins.get(name) for name in tools}


# Exported code


def imports(tree: ast.AST) -> set[str]:
    "The top-level packages that the nodes of `tree` import; relative imports are our own"
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in names}


def at_import(tree: ast.Module) -> ast.Module:
    "What runs when the module is imported: the top level without the bodies of functions"
    return ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])


@by_module
def test_module_imports_only_what_it_declares(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imports(tree) & (NEVER - ({"IPython"} if path.stem == "viz" else set()))
    top = imports(at_import(tree))
    assert "matplotlib" not in top, "import matplotlib inside the function that draws"
    undeclared = top - set(sys.stdlib_module_names) - required() - {"llava_nb"}
    assert not undeclared, f"not in settings.ini's requirements: {undeclared}"


@by_module
def test_module_name_hides_no_other(path):
    "Run as a file, llava_nb/ comes first on the path: a module there must not hide another package"
    found = importlib.util.find_spec(path.stem) if path.stem not in sys.modules else None
    assert path.stem not in set(sys.stdlib_module_names) | required() and (
        found is None or Path(found.origin or "").resolve().is_relative_to(ROOT / "tests")
    )


def test_modules_import_alone_and_quietly():
    "Each module with none of the others loaded; no environment, random state, thread count or figure style changes"
    code = f"""
import importlib, os, random, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, torch, transformers
state = lambda: (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), torch.get_default_dtype(), torch.get_num_threads())
import deepspeed, transformers.trainer, transformers.models.llava.modeling_llava   # torch sets a cache directory when these are first imported
for name in {[within(p).replace("/", ".") for p in MODULES]!r}:
    for loaded in [m for m in sys.modules if m.split('.')[0] == 'llava_nb']: del sys.modules[loaded]
    before = state()
    importlib.import_module(f'llava_nb.{{name}}')
    assert state() == before, f'importing llava_nb.{{name}} changes global state'
    unwanted = {sorted(NEVER)!r}
    assert not set(unwanted) & set(sys.modules), f'importing llava_nb.{{name}} loads one of {{unwanted}}'
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_functions_are_short():
    lengths = {
        f"{within(path)}.{node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert not {name: n for name, n in lengths.items() if n > 60}
    assert statistics.median(lengths.values()) <= 10
    assert sum(n <= 30 for n in lengths.values()) >= 0.9 * len(lengths), sorted(lengths, key=lengths.get)[-10:]


def defined(body: list[ast.stmt]) -> list[str]:
    """Functions and classes that stand here, a property's setter left out: it bears its name on purpose."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in body
        if isinstance(node, kinds) and not any(isinstance(d, ast.Attribute) for d in node.decorator_list)
    ]


@by_module
def test_no_name_is_defined_twice(path):
    """The later of two would win, and a merge leaves two in silence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
        names = defined(node.body)
        assert not (twice := sorted({name for name in names if names.count(name) > 1})), (
            f"{path.name} defines {twice} twice"
        )


@by_notebook
def test_notebook_holds_no_rest_of_a_merge(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<{7}|>{7}", text), "a conflict was left unresolved"
    names = [cell["id"] for cell in json.loads(text)["cells"]]
    assert len(names) == len(set(names)), f"cells {sorted({n for n in names if names.count(n) > 1})} are there twice"


# What a notebook looks like


@by_notebook
def test_notebook_begins_as_the_house_says(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n\n?> .+", source(first)), (
        "first cell: `# Title`, then `> one-line summary`"
    )


@by_notebook
def test_imports_stand_in_cells_of_their_own(path):
    "A build of the docs runs every cell that imports: it must find nothing else there"
    for cell in (c for c in cells(path) if source(c).startswith("#| export")):
        body = ast.parse(source(cell)).body
        mixed = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in body}
        run_as_file = any(isinstance(node, ast.If) for node in body)
        assert len(mixed) < 2 or run_as_file, f"imports and other code in one cell:\n{source(cell)[:300]}"


@by_notebook
def test_a_demonstration_hides_no_name_of_its_module(path):
    "A cell that is not exported and stores a name that the module imports or defines breaks what follows it"
    own = set()
    for cell in cells(path):
        try:
            tree = ast.parse(source(cell))
        except SyntaxError:
            continue  # a line of the shell
        if source(cell).startswith("#| export"):
            names = [
                alias.asname or alias.name
                for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            ]
            own |= {*names, *(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))}
        else:
            stored = {
                node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            assert not stored & own, f"{stored & own}: rename it in {source(cell)[:100]!r}"


@by_notebook
def test_notebook_shows_what_it_does(path):
    shown = outputs(path)
    assert shown, "no cell has an output: run `make notebooks`"
    assert not [o for o in shown if o["output_type"] == "error"]
    assert not [o for o in shown if o.get("name") == "stderr"], "warnings or a progress bar were kept"
    text = json.dumps(shown)
    assert not re.search(r"/tmp/|\\r|Warning:|it/s\]", text), "a temporary path, a warning or a progress bar was kept"


@by_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= 300 * KB


def test_the_first_page_is_short_and_plain():
    lines = [
        line
        for cell in cells(ROOT / "nbs/01_llava_in_one_notebook.ipynb")
        for line in source(cell).splitlines()
        if line.strip()
    ]
    assert len(lines) <= 150 and not [line for line in lines if line.startswith("class ")]


def test_notebooks_are_small_together():
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= 6 * 1024 * KB


# The project's text


def project_files() -> list[Path]:
    "Files that git tracks or would; without git, all but what .gitignore names"
    listed = (
        subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    if listed and listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        ignored = {".git", "__pycache__", "build", "dist", "runs", ".pytest_cache", ".ipynb_checkpoints", ".venv"}
        paths = [
            p for p in ROOT.rglob("*") if not ignored & set(p.relative_to(ROOT).parts) and ".egg-info" not in str(p)
        ]
    return [p for p in paths if p.is_file() and (ROOT / "shared") not in p.parents]


def test_no_file_names_a_machine():
    places = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", r"\.\./sha" + "red", "/tm" + "p/w", "/ho" + "me/")))
    text = [
        p
        for p in project_files()
        if p.suffix not in {".zip", ".gz", ".png", ".webp", ".model", ".npz", ".safetensors"}
        and p.name != "tokenizer.json"
    ]
    named = {str(p.relative_to(ROOT)): places.search(p.read_text(encoding="utf-8", errors="ignore")) for p in text}
    assert not {name: hit.group() for name, hit in named.items() if hit}


def test_a_wheel_built_again_is_the_same_to_the_byte(tmp_path):
    built = []
    for k in range(2):
        folder = tmp_path / str(k)
        folder.mkdir()
        shutil.copytree(ROOT / "llava_nb", folder / "llava_nb", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        subprocess.run(
            [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", str(folder)],
            check=True,
            capture_output=True,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
        )
        built.append(next((folder / "dist").glob("*.whl")).read_bytes())
    assert built[0] == built[1]
