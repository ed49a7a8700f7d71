"""The plan of a run, for models that fit no test machine, without weights and without a network."""

import json
import socket
from pathlib import Path

import pytest

from llava_nb import train

CONFIGS = Path(train.__file__).parent / "data" / "configs"
PARTS = [
    "--language_model",
    "lmsys/vicuna-13b-v1.5",
    "--vision_tower",
    "openai/clip-vit-large-patch14-336",
    "--projector",
    "random",
    "--dry_run",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked the network"))


@pytest.mark.parametrize(
    "size, stage, numbers",
    [
        (
            "7b",
            "pretrain",
            ["6,738.94M  frozen", "20.98M  trains", "303.51M  frozen", "2,181 of 256", "8 ranks x 32 x 1"],
        ),
        (
            "7b",
            "finetune",
            ["6,738.94M  trains", "20.98M  trains", "303.51M  frozen", "5,198 of 128", "8 ranks x 16 x 1"],
        ),
        (
            "13b",
            "pretrain",
            ["13,016.52M  frozen", "31.47M  trains", "303.51M  frozen", "2,181 of 256", "8 ranks x 32 x 1"],
        ),
        (
            "13b",
            "finetune",
            ["13,016.52M  trains", "31.47M  trains", "303.51M  frozen", "5,198 of 128", "8 ranks x 16 x 1"],
        ),
    ],
)
def test_published_recipes_on_eight_ranks(size, stage, numbers, capsys, monkeypatch):
    monkeypatch.setattr(train.zero, "world_size", lambda: 8)
    assert train.main([str(CONFIGS / f"llava_v1_5_{size}_{stage}.json"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for number in numbers:
        assert number in out, number
    warm = 66 if stage == "pretrain" else 156
    assert (
        f"warm-up {warm} steps; step 0: 0.00e+00, step {warm}: {'1.00e-03' if stage == 'pretrain' else '2.00e-05'}"
        in out
        and "estimated" in out
    )


def test_the_projector_has_groups_of_its_own(capsys):
    assert train.main([*PARTS, "--learning_rate", "2e-5", "--mm_projector_lr", "1e-4", "--weight_decay", "0.1"]) == 0
    groups = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  group")]
    assert (
        len(groups) == 4
        and sum("lr 0.0001" in g for g in groups) == 2
        and sum("weight decay 0.1" in g for g in groups) == 2
    )


def test_records_at_hand_are_counted(tmp_path, capsys):
    record = {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        "image": "a.png",
    }
    (tmp_path / "r.json").write_text(json.dumps([record] * 37))
    assert (
        train.main(
            [
                *PARTS,
                "--data_path",
                str(tmp_path / "r.json"),
                "--per_device_train_batch_size",
                "4",
                "--num_train_epochs",
                "2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "37 records" in out and "estimated from words" in out and "20 of 4 records" in out


def test_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*PARTS, "--output_dir", "out"]) == 0 and not list(tmp_path.iterdir())


BAD = {
    "learning_rate": ["--learning_rate", "abc"],
    "invalid int value: '2.5'": ["--max_steps", "2.5"],
    "--bf16": ["--bf16", "maybe"],
    "--stage": ["--stage", "two"],
    "--projector_lr": ["--projector_lr", "x"],
    "template 'vicuna' is unknown; known are v1": ["--template", "vicuna"],
    "template 'v0' is unknown": ["--version", "v0"],
    "sampler 'len' is unknown; use one of modality": ["--sampler", "len"],
    "objective 'mean' is unknown; use one of reference": ["--objective", "mean"],
    "zero 7 is unknown": ["--zero", "7"],
    "eval_strategy": ["--evaluation_strategy", "sometimes"],
    "go together; one is missing": ["--eval_strategy", "steps"],
    "`eval_data_path`": ["--eval_data_path", "x.json"],
    "deepspeed: nowhere.json does not exist": ["--deepspeed", "nowhere.json"],
    "SchedulerType": ["--lr_scheduler_type", "sine"],
    "a/b: its config.json is neither": ["--vision_tower", "a/b"],
    "did you mean 'weight_decay'": ["--weight_decoy", "0"],
}


@pytest.mark.parametrize("message", BAD)
def test_a_dry_run_refuses_what_a_run_would(message, capsys):
    assert train.main([*PARTS, *BAD[message]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("llava_nb: ")
