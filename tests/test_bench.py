"""bench/gpu.py and bench/loss.py at toy size, so that they work the day there is a GPU. Nothing here depends on how fast they run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def rows(markdown: str) -> dict[str, dict[str, str]]:
    "The rows of the table in a text by their first cell, the cells by their heading."
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}


def printed(script: str, *flags: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, ROOT / "bench" / script, *flags], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def table(): return rows(printed("gpu.py", "--shape", "toy", "--steps", "2"))


def test_every_variant_has_its_row(table):
    assert list(table) == ["ours", "padded", "stock"]
    for row in table.values(): assert float(row["real tokens/s"].replace(",", "")) > 0 and float(row["strict MFU, measured"].strip("%")) > 0
    assert table["ours"]["padding"] == "0.0%" and float(table["padded"]["padding"].strip("%")) > 0


def test_the_variants_losses_are_equal(table):
    losses = [float(row["loss"]) for row in table.values()]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4) and 5 < losses[0] < 15        # random weights: near log(32,064)
    assert all(float(row["losses apart"]) < 1e-4 for row in table.values())


def test_every_loss_that_runs_here_is_timed_and_gives_the_same():
    said = printed("loss.py", "--positions", "64", "--rows", "500", "--width", "32", "--repeats", "1", "--rounds", "1")
    found = rows(said)
    assert {"chunked", "all logits"} <= set(found) and ("liger" in found or "\nliger: " in said)
    for row in found.values(): assert float(row["forward and backward"].removesuffix(" ms").replace(",", "")) > 0 and float(row["losses apart"]) < 1e-5
