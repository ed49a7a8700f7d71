"""The evaluation loss is the mean over learned tokens however the records are cut, and the best checkpoint is what a run leaves."""

import json
from pathlib import Path

import pytest
from runs import config, farthest, make_world, run
from safetensors.torch import load_file
from transformers import TrainerState

from llava_nb import train
from llava_nb.safe.checkpoint_writer import CheckpointWriter, newest_sealed
from llava_nb.safe.evaluation import EvaluationSampler

SEEN = 13  # held-out records: no multiple of any batch size below
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "max_steps": 4,
    "learning_rate": 0.3,
    "projector_lr": 0.3,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    where = make_world(tmp_path_factory.mktemp("world"))
    (where / "held.json").write_text(json.dumps(json.loads((where / "records.json").read_text())[:SEEN]))
    return where


def evaluated(world: Path, name: str, ranks: int, *flags: str, **changes) -> tuple[list[float], str, Path]:
    """Losses of the evaluations of a run, what it said, and where it lies."""
    file, settings = config(world, name, eval_data_path=str(world / "held.json"), **changes)
    done = run(file, ranks, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = Path(settings["output_dir"])
    return (
        [
            h["eval_loss"]
            for h in json.loads((out / "trainer_state.json").read_text())["log_history"]
            if "eval_loss" in h
        ],
        done.stdout,
        out,
    )


def published(folder: Path) -> dict:
    """The model's weights of a result or a checkpoint, which has others beside them."""
    return load_file(folder / "model.safetensors")


def test_every_record_is_evaluated_once_and_ranks_have_as_many_rows():
    for records in range(1, 20):
        for size in (1, 3, 8):
            for ranks in (1, 2, 3):
                rows = [list(EvaluationSampler(records, size, rank, ranks)) for rank in range(ranks)]
                assert sorted(i for part in rows for (row,) in part for i, w in row if w) == list(range(records))
                assert {len(part) for part in rows} == {len(EvaluationSampler(records, size, 0, ranks))} and all(
                    row for part in rows for (row,) in part
                )


def test_the_loss_is_the_same_for_any_batch_size_and_number_of_ranks(world, capsys):
    asked = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "gradient_accumulation_steps": 4,
    }
    found = {}
    for size, ranks, zero in ((1, 0, None), (3, 0, None), (8, 0, None), (3, 2, 2), (8, 2, 3)):
        accumulation = 2 if ranks else 4
        losses, said, out = evaluated(
            world,
            f"eval{size}_{ranks}",
            ranks,
            **asked | {"gradient_accumulation_steps": accumulation, "per_device_eval_batch_size": size, "zero": zero},
        )
        assert said.count("evaluation after step 2: loss ") == 1 and f"{losses[-1]:.4f}" in said
        found[size, ranks] = losses[-1]
    assert max(found.values()) - min(found.values()) < 1e-6, found


@pytest.mark.parametrize("zero, ranks", [(None, 0), (2, 2), (3, 2)])
def test_the_best_checkpoint_is_the_result_and_is_kept(world, zero, ranks):
    """A rate that ruins the model: the first evaluation is the best, three checkpoints follow, two may stay."""
    losses, said, out = evaluated(world, f"best{zero}", ranks, **BEST, zero=zero)
    best = losses.index(min(losses)) + 1
    assert best < 3 and f"best: checkpoint-{best} has the least evaluation loss, {min(losses):.4f}" in said
    assert sorted(p.name for p in out.glob("checkpoint-*")) == sorted(
        {f"checkpoint-{best}", "checkpoint-3", "checkpoint-4"}
    )
    assert (
        farthest(published(out), published(out / f"checkpoint-{best}"))
        == 0
        < farthest(published(out), published(out / "checkpoint-4"))
    )


def test_the_best_checkpoint_is_known_after_a_resume_elsewhere(world):
    """Stage 2 from its last checkpoint, in a folder that was moved: the best is still the first."""
    losses, _, out = evaluated(world, "moved", 0, **BEST)
    there = out.rename(out.parent / "there")
    for name in ("MANIFEST.json", "model.safetensors", "trainer_state.json"):
        (there / name).unlink()
    settings = json.loads((world / "moved.json").read_text()) | {"output_dir": str(there)}
    (world / "there.json").write_text(json.dumps(settings))
    done = run(world / "there.json", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    best = losses.index(min(losses)) + 1
    assert (
        f"best: checkpoint-{best} " in done.stdout
        and farthest(published(there), published(there / f"checkpoint-{best}")) == 0
    )
    file = there / f"checkpoint-{best}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (there / "MANIFEST.json").unlink()
    (there / "model.safetensors").unlink()
    done = run(world / "there.json", 0)
    assert (
        done.returncode == 4
        and "the best checkpoint" in done.stderr
        and "cannot be read" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_save_that_failed_is_not_the_best(tmp_path):
    """The third step is the best, and the disk refuses its checkpoint: the first one stays the best."""

    def save(fails: bool = False):
        if fails:
            raise OSError("full")

    writer, state = CheckpointWriter(tmp_path, {}), TrainerState()
    state.global_step = state.best_global_step = 1
    state.best_metric = 2.0
    writer.write(state, save)
    state.global_step = 2
    writer.write(state, save)  # not better
    state.global_step = state.best_global_step = 3
    state.best_metric = 1.0
    writer.write(state, lambda: save(fails=True))
    assert (state.best_global_step, state.best_metric) == (1, 2.0) and newest_sealed(tmp_path) == 2


PARTS = [
    "--language_model",
    "lmsys/vicuna-7b-v1.5",
    "--vision_tower",
    "openai/clip-vit-large-patch14-336",
    "--projector",
    "random",
    "--dry_run",
    "--load_best_model_at_end",
    "True",
]


@pytest.mark.parametrize(
    "message, flags",
    [
        ("needs `eval_data_path`", []),
        ("eval_strategy is epoch, save_strategy steps", ["--eval_strategy", "epoch"]),
        ("multiple of eval_steps: 5 and 2", ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "5"]),
        ("multiple of eval_steps: 0.5 and 2", ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "0.5"]),
        (
            "greater_is_better True",
            ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--greater_is_better", "True"],
        ),
    ],
)
def test_every_checkpoint_must_have_been_evaluated(message, flags, capsys):
    evals = ["--eval_data_path", __file__] if flags else []
    assert train.main([*PARTS, *evals, *flags]) == 2 and message in capsys.readouterr().err
