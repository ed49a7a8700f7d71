"""bench/h200.sh on toy shapes, and the wheels it brings: rehearsed, so that it works the day there is a GPU."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import psutil
import pytest
from packaging.utils import parse_wheel_filename
from runs import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import wheels  # noqa: E402

FIELDS = {"stage", "ok", "why", "seconds", "limit", "headline", "device"}


def rehearsed(out: Path, *words: str, code: int = 0, **env: str) -> dict[str, dict]:
    "The stages' JSON by name, checked against the summary."
    env = {
        **os.environ,
        "OUT": str(out),
        "WHEELS": str(out / "none"),
        "SITE": str(out / "site"),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    done = subprocess.run(
        ["bash", ROOT / "bench" / "h200.sh", "--toy", *words], env=env, capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    found = {t["stage"]: json.loads((out / f"{t['stage']}.json").read_text()) for t in summary["stages"]}
    for t in summary["stages"]:
        assert (
            t.items() <= found[t["stage"]].items()
            and set(t) == FIELDS
            and f"{t['stage']} " in done.stdout
            and t["ok"] == (not t["why"])
        )
    assert summary["table"] in done.stdout and sorted(p.name for p in out.iterdir() if p.is_file()) == sorted(
        [*(f"{name}.json" for name in found), "summary.json"]
    )
    assert not [p for p in psutil.process_iter() if p.pid != os.getpid() and _out_of(p) == str(out)], (
        "a stage left a process"
    )
    return found


def _out_of(p: psutil.Process) -> str | None:
    try:
        return p.environ().get("OUT")
    except psutil.Error:
        return None


def test_a_stage_over_its_limit_is_ended_and_named_and_the_next_one_runs(tmp_path):
    found = rehearsed(tmp_path, "machine", "kernels", "--limit", "machine=1", "--limit", "kernels=90", code=1)
    assert found["machine"]["why"] == "ended after its 1 s" and found["machine"]["seconds"] < 10
    assert (
        found["kernels"]["ok"]
        and found["kernels"]["found"]["attention"]["toy, sdpa"]["forward"]["ms"] > 0
        and "sdpa" in found["kernels"]["headline"]
    )
    assert (
        found["kernels"]["found"]["loss"]["chunked"]["ms"] > 0
        and found["kernels"]["found"]["attention"]["toy, flash"]["objection"]
    )


def test_stages_for_which_no_time_is_left_are_named(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "h200.py", "--toy", "--out", tmp_path, "--minutes", "0.05", "bench1b"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and "not begun: the 0.05 minutes were over"
        in json.loads((tmp_path / "summary.json").read_text())["stages"][0]["why"]
    )


def test_a_stage_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "h200.py", "--out", tmp_path, "kernel"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no such stage: kernel; there are machine, kernels" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["1", "2"])
def test_every_stage_leaves_what_it_has_found(part, tmp_path):
    found = rehearsed(tmp_path, part)
    assert len(found) <= 7  # with the summary, eight files
    if part == "1":
        runs = found["tiny"]["found"]["runs"]
        assert set(runs) == {"CPU", "no engine", "ZeRO-2", "ZeRO-3"} and all(
            len(r["losses"]) == 6 and r["farthest"] <= 1e-4 for r in runs.values()
        )
        assert found["resume"]["found"]["runs"]["as it comes, dropout 0.1"]["weights apart"] == 0
        assert len(found["tests"]["found"]["cases"]) > 40 and "0 failed" in found["tests"]["headline"]
    for name, stage in found.items():
        if name.startswith("train"):
            assert (
                len(stage["found"]["history"]) == 3
                and stage["found"]["median"]["tokens_per_second"] > 0
                and "data_wait" in stage["found"]["median"]
            )
        if "7b" in name or "1b" in name:
            assert "tokens/s" in stage["headline"] and "MFU" in stage["headline"]


@pytest.mark.slow
def test_a_stage_that_fails_stops_nothing_and_says_why(tmp_path):
    found = rehearsed(tmp_path, "tiny", "resume", "bench1b", "--model", "/nonexistent", code=1)
    assert (
        "/nonexistent" in found["tiny"]["why"]
        and "0 of 6 steps" in found["tiny"]["why"]
        and "/nonexistent" in found["resume"]["why"]
        and found["bench1b"]["ok"]
    )


# The wheels


def made(folder: Path, name: str, version: str, *requires: str) -> None:
    "A wheel with metadata and nothing else."
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(
            f"{name}-{version}.dist-info/METADATA",
            "\n".join(
                [
                    "Metadata-Version: 2.1",
                    f"Name: {name}",
                    f"Version: {version}",
                    *(f"Requires-Dist: {r}" for r in requires),
                ]
            )
            + "\n",
        )


def test_what_no_wheel_and_no_package_there_meets_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "kit", lambda: [])
    made(
        tmp_path,
        "one",
        "1.0",
        "two>=2",
        "torch>=2.12",
        "numpy>=2",
        "einops>=99",
        'three; extra == "more"',
        'four; python_version < "3.12"',
        'five; sys_platform == "linux"',
    )
    made(tmp_path, "two", "1.9")
    assert [(who, str(r)) for who, r in wheels.unmet(tmp_path)] == [
        ("one", "two>=2"),
        ("one", "torch>=2.12"),
        ("one", 'five; sys_platform == "linux"'),
    ]
    made(tmp_path, "two", "2.1")
    with pytest.raises(ValueError, match="two versions of one package"):
        wheels.unmet(tmp_path)


def gathered(into: Path, python: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # which takes the network away
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "wheels.py", "--into", into, "--python", python],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0 and "every requirement met" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheels_fit_the_machine_and_need_nothing_more(tmp_path):
    gathered(tmp_path, "3.12")
    files = sorted(tmp_path.iterdir())
    assert sum(f.stat().st_size for f in files) < wheels.LIMIT and wheels.unmet(tmp_path) == []
    names = {parse_wheel_filename(f.name)[0] for f in files}
    assert {
        "deepspeed",
        "transformers",
        "liger-kernel",
        "pydantic",
        "pydantic-core",
        "hjson",
        "pillow",
    } <= names and "torch" not in names
    for f in files:
        tags = parse_wheel_filename(f.name)[3]
        assert any(t.interpreter in ("py3", "cp312") or t.abi == "abi3" for t in tags) and any(
            t.platform == "any" or "manylinux" in t.platform and "x86_64" in t.platform for t in tags
        ), f.name
    assert next(f for f in files if f.name.startswith("deepspeed")).name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_wheels_are_installed_where_deepspeed_is_missing(tmp_path):
    "An environment with all that is here but DeepSpeed and what it needs alone."
    gathered(tmp_path / "wheels", f"{sys.version_info.major}.{sys.version_info.minor}")
    venv.create(tmp_path / "env")
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for entry in Path(next(p for p in sys.path if p.endswith("site-packages"))).iterdir():
        if not entry.name.lower().startswith(("deepspeed", "hjson", "py_cpuinfo_", "liger")):
            (packages / entry.name).symlink_to(entry)
    env = {"PYTHON": str(tmp_path / "env" / "bin" / "python"), "PYTHONPATH": ""}
    without = rehearsed(tmp_path / "without", "machine", code=1, **env)["machine"]
    assert without["why"] == "deepspeed is not installed" and without["found"]["matmul_tflops"]["float32"] > 0
    found = rehearsed(tmp_path / "with", "machine", WHEELS=str(tmp_path / "wheels"), **env)["machine"]["found"]
    assert (
        all(where.startswith(str(tmp_path / "with" / "site")) for where in found["where"].values())
        and found["versions"]["deepspeed"] == wheels.pinned()["deepspeed"]
    )
