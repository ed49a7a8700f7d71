"""bench/gpu.py and bench/loss.py at toy size, so that they work the day there is a GPU. Nothing here depends on how fast they run."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def rows(markdown: str) -> dict[str, dict[str, str]]:
    "The rows of the table in a text by their first cell, the cells by their heading."
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}


def printed(script: str, *flags: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / script, *flags], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "What a run of the toy printed, and its folder."
    folder = tmp_path_factory.mktemp("gpu")
    return printed(
        "gpu.py",
        "--shape",
        "toy",
        "--steps",
        "2",
        "--recompute",
        "none",
        "full",
        "--json",
        str(folder / "steps.json"),
        "--trace",
        str(folder / "trace.json.gz"),
    ), folder


@pytest.fixture(scope="module")
def table(toy):
    return rows(toy[0])


def test_every_variant_has_its_row(table):
    assert list(table) == ["ours, none", "ours, full", "padded", "stock"]
    for row in table.values():
        assert float(row["real tokens/s"].replace(",", "")) > 0 and float(row["strict MFU, measured"].strip("%")) > 0
    for ours in list(table.values())[:2]:
        assert ours["padding"] == "0.0%"
    assert float(table["padded"]["padding"].strip("%")) > 0


def test_the_variants_losses_are_equal(table):
    losses = [float(row["loss"]) for row in table.values()]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-4) and 5 < losses[0] < 15  # random weights: near log(32,064)
    assert all(float(row["losses apart"]) < 1e-4 for row in table.values())


def test_every_step_and_a_trace_are_kept(toy, table):
    kept = json.loads((toy[1] / "steps.json").read_text())
    assert (
        list(kept["steps"]) == list(table)
        and all(len(steps) == 2 for steps in kept["steps"].values())
        and kept["table"] in toy[0]
    )
    assert kept["longest"][0]["ms"] >= kept["longest"][-1]["ms"] >= 0 and "traceEvents" in json.loads(
        gzip.decompress((toy[1] / "trace.json.gz").read_bytes())
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    "The toy's, with the modules of bench/ at hand."
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import gpu
    finally:
        sys.path.pop(0)
    return gpu, gpu.Mixture(gpu.configuration(gpu.SHAPES["toy"]), 32, gpu.picture(tmp_path_factory.mktemp("picture")))


def test_rows_are_the_fewest_of_each_step_or_of_the_run(mixture):
    gpu, mix = mixture
    made = {
        (v, by_step): gpu.Steps(mix, v, mix.lengths.astype(float), 200, "sdpa", "none", by_step)
        for v in ("ours", "padded")
        for by_step in (True, False)
    }
    order = mix.spread(12)
    counts = {key: [len(steps.rows(k)) for k in order] for key, steps in made.items()}
    for key, steps in made.items():
        for k in order:
            rows = steps.rows(k)
            assert sorted(np.concatenate(rows)) == sorted(mix.plan.global_batch(k))
            assert max(mix.lengths[r].sum() if key[0] == "ours" else len(r) * mix.lengths[r].max() for r in rows) <= 200
    for v in ("ours", "padded"):
        assert (
            len(set(counts[v, True])) > 1 == len(set(counts[v, False])) and max(counts[v, True]) <= counts[v, False][0]
        ), counts
    with pytest.raises(ValueError, match="max_tokens 20: record .* alone has"):
        gpu.Steps(mix, "ours", mix.lengths.astype(float), 20, "sdpa", "none", True).rows(order[-1])


def test_every_loss_that_runs_here_is_timed_and_gives_the_same():
    said = printed("loss.py", "--positions", "64", "--rows", "500", "--width", "32", "--repeats", "1", "--rounds", "1")
    found = rows(said)
    assert {"chunked", "all logits"} <= set(found) and ("liger" in found or "\nliger: " in said)
    for row in found.values():
        assert (
            float(row["forward and backward"].removesuffix(" ms").replace(",", "")) > 0
            and float(row["losses apart"]) < 1e-5
        )
