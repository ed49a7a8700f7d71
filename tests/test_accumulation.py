"""A step is the same however its rows are cut, and gradients of 16 bits add up without losing what they add; without DeepSpeed a run trains, too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import config, make_world, run, weights

HALF = {
    "bf16": True,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "projector_lr": 1.0,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "save_strategy": "steps",
    "save_steps": 1,
}
# like a machine where it was never installed: no module to be found, no distribution to be read
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "deepspeed" else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context=None):
        return (d for d in (super().find_distributions(context) if context else super().find_distributions()) if d.metadata["Name"] != "deepspeed")
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
runpy.run_path({network!r})
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def state_of(world: Path, name: str, ranks: int = 0, **changes) -> list[dict]:
    """What a run has logged."""
    file, settings = config(world, name, **changes)
    done = run(file, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [
        h
        for h in json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["log_history"]
        if "loss" in h
    ]


@pytest.mark.parametrize("zero", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_norms_are_the_same_for_any_cut_of_a_step(world, zero):
    """Four rows of one record, two of two, one of four; with a norm to clip at that nothing reaches, so that it is logged. The objective counts tokens: the reference's own mean depends on the cut."""
    found = {}
    for size, steps in ((1, 4), (2, 2), (4, 1)):
        asked = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 3,
            "save_strategy": "no",
            "max_grad_norm": 1e6,
            "objective": "token",
            "zero": zero,
        }
        found[size] = [(h["loss"], h["grad_norm"]) for h in state_of(world, f"cut{size}_{zero}", **asked)]
    assert len(found[1]) == 3 and all(norm > 0.1 for _, norm in found[1])
    for size in (2, 4):
        for ours, other in zip(found[1], found[size]):
            assert ours == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_of_16_bits_add_up_better_in_float32(world, zero):
    """One step of 32 rows at rate 1: what it changes is the gradient. Beside it, the same in float32, and in bf16 as DeepSpeed does it by itself."""
    own = world / f"own{zero}.json"
    own.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": zero},
                "bf16": {"enabled": "auto"},
                "zero_allow_untested_optimizer": True,
                "data_types": {"grad_accum_dtype": "bf16"},
            }
        )
    )
    kinds = {"exact": {"bf16": False}, "ours": {"zero": zero}, "theirs": {"deepspeed": str(own)}}
    changed = {}
    for kind, changes in kinds.items():
        state_of(world, f"{kind}{zero}", **HALF | changes)
        changed[kind] = masters(world / f"{kind}{zero}" / "checkpoint-1")
    error = {
        kind: sum(float((changed[kind][name] - exact).square().sum()) for name, exact in changed["exact"].items())
        ** 0.5
        for kind in ("ours", "theirs")
    }
    assert error["ours"] < 0.9 * error["theirs"], error


def masters(checkpoint: Path) -> dict:
    """The float32 copies that one rank keeps of what it trains."""
    return {name: value.float() for name, value in weights(checkpoint).items() if name.startswith("master/")}


@pytest.fixture
def without_deepspeed(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        WITHOUT.format(network=str(Path(__file__).parent / "no_network" / "sitecustomize.py"))
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))


def test_without_deepspeed_a_run_on_one_rank_trains(world, without_deepspeed):
    script = "import importlib.metadata as m, importlib.util as u; print(u.find_spec('deepspeed'), [d for d in m.distributions() if d.metadata['Name'] == 'deepspeed'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "[]"], done.stderr
    assert len(state_of(world, "alone", max_steps=2, save_strategy="no")) == 2


def test_without_deepspeed_zero_is_one_line(world, without_deepspeed):
    for flags in (["--zero", "2"], ["--zero", "2", "--dry_run"]):
        done = run(config(world, "refused", max_steps=2)[0], 0, *flags)
        assert (
            done.returncode == 2
            and done.stderr.count("\n") == 1
            and "DeepSpeed is not installed" in done.stderr
            and "pip install deepspeed" in done.stderr
        ), done.stderr
