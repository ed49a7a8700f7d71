"""The look at gradients before a step: what it finds, and that it takes no memory of their size."""

import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT, TIMEOUT

from llava_nb.safe.guard import finite

WRONG = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_number_anywhere_is_found(dtype, wrong):
    made = [
        torch.randn(4096, dtype=dtype),
        torch.randn(30, 7, dtype=dtype).T,
        torch.tensor(1.0, dtype=dtype),
        torch.empty(0, dtype=dtype),
    ]
    assert finite(made) and finite([]) and finite(iter(made[-1:]))
    for t in made[:3]:
        for place in {0, t.numel() // 2, t.numel() - 1}:
            kept = t.clone()
            t[torch.unravel_index(torch.tensor(place), t.shape) if t.ndim else ()] = wrong
            assert not finite(made), (t.shape, place)
            t.copy_(kept)
    assert finite(made)


def test_the_largest_finite_numbers_pass():
    "A norm of these would be infinite."
    assert finite(
        [torch.full((9,), s * torch.finfo(d).max, dtype=d) for s in (1, -1) for d in (torch.float32, torch.bfloat16)]
    )


@pytest.fixture(scope="module")
def steps():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "engine_steps.py"], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_engine_refuses_every_wrong_number_before_a_weight_changes(steps):
    assert len(steps) == 9 and all(s["refused"] == [str(w) for w in WRONG] for s in steps), steps


def test_the_look_makes_nothing_of_the_gradients_size(steps):
    "ZeRO 1 and 2 look at a gradient at a time by themselves; what their look makes is theirs, and small too."
    assert all(s["more"] < 2_000 < s["gradients"] / 100 for s in steps), steps
