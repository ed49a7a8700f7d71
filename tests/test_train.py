"""The entry point: the reference's command lines, errors in one line, dry runs without a network, and a run from parts to an evaluation loss."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llava_nb import train
from llava_nb.masking import tiny_tokenizer
from llava_nb.run.translate import MEANINGLESS, RENAMED, TRANSLATED, UNSUPPORTED, translate
from llava_nb.safe.reliable_trainer import ReliableTrainingArguments

ROOT = Path(__file__).resolve().parent.parent
COMMON = """--model_name_or_path {llm} --vision_tower {tower} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
--mm_use_im_patch_token False --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no
--save_strategy steps --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb"""
PRETRAIN = (
    COMMON
    + """ --deepspeed ./scripts/zero2.json --version plain --data_path {captions} --image_folder {images} --tune_mm_mlp_adapter True
--output_dir {out}/pretrain --per_device_train_batch_size 32 --save_steps 24000 --learning_rate 1e-3"""
)
FINETUNE = (
    COMMON
    + """ --deepspeed ./scripts/zero3.json --version v1 --data_path {talks} --image_folder {images} --pretrain_mm_mlp_adapter {out}/pretrain
--image_aspect_ratio pad --group_by_modality_length True --output_dir {out}/finetune --per_device_train_batch_size 16 --save_steps 50000 --learning_rate 2e-5"""
)
PUBLISHED = {
    "llm": "lmsys/vicuna-13b-v1.5",
    "tower": "openai/clip-vit-large-patch14-336",
    "captions": "captions.json",
    "talks": "mix665k.json",
    "images": "images",
    "out": "checkpoints",
}


def words(command: str, **paths) -> list[str]:
    return command.format(**paths).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny language model and tower as folders of their own, captions, conversations and pictures."""
    where = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(text).save_pretrained(where / "llm")
    tokenizer.save_pretrained(where / "llm")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(where / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        where / "tower"
    )
    captions = []
    for k in range(8):
        Image.new("RGB", (30, 20 + k), (30 * k, 90, 200)).save(where / f"{k}.png")
        captions.append(
            {
                "id": k,
                "image": f"{k}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe."},
                    {"from": "gpt", "value": f"A shade, number {k}."},
                ],
            }
        )
    talks = (
        captions
        + [{"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}]
        * 4
    )
    for name, records in {"captions": captions, "talks": talks}.items():
        (where / f"{name}.json").write_text(json.dumps(records))
    return where


def paths(world: Path) -> dict:
    return {
        "llm": world / "llm",
        "tower": world / "tower",
        "captions": world / "captions.json",
        "talks": world / "talks.json",
        "images": world,
        "out": world / "out",
    }


@pytest.mark.parametrize("command, stage", [(PRETRAIN, 1), (FINETUNE, 2)])
def test_published_command_lines_dry_run_without_a_network(command, stage, capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked the network"))
    assert train.main(words(command, **PUBLISHED) + ["--dry_run"]) == 0
    out = capsys.readouterr().out
    assert (
        "language model   13,016" in out
        and "projector            31.47M" in out
        and "vision tower        303.51M" in out
    )
    assert (
        f"stage {stage}:" in out
        and "estimated" in out
        and ("plain, images square" if stage == 1 else "v1, images pad") in out
    )
    assert out.count("lazy_preprocess") == 1


def test_published_command_lines_train(world, capsys):
    """Stage 1 and stage 2 as published, paths replaced, one step each, on parts put together by the run."""
    extra = ["--max_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--deepspeed", "None"]
    assert train.main(words(PRETRAIN, **paths(world)) + extra) == 0
    assert (world / "out" / "pretrain" / "projector.safetensors").is_file()
    assert train.main(words(FINETUNE, **paths(world)) + extra) == 0
    out = capsys.readouterr().out
    assert "chat:" in out and "target tokens/s" in out and (world / "out" / "finetune" / "model.safetensors").is_file()
    saved = json.loads((world / "out" / "finetune" / "config.json").read_text())
    assert saved["llava_nb"]["template"] == "v1" and saved["llava_nb"]["image_aspect_ratio"] == "pad"


def test_configuration_round_trip_evaluation_and_tensorboard(world, capsys):
    settings = {
        "language_model": str(world / "llm"),
        "vision_tower": str(world / "tower"),
        "projector": "random",
        "data_path": str(world / "talks.json"),
        "image_folder": str(world),
        "eval_data_path": str(world / "captions.json"),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "output_dir": str(world / "eval"),
        "report_to": "tensorboard",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    (world / "run.json").write_text(json.dumps(settings))
    assert train.main([str(world / "run.json")]) == 0
    state = json.loads((world / "eval" / "trainer_state.json").read_text())
    assert [h["eval_loss"] for h in state["log_history"] if "eval_loss" in h]
    steps = [h for h in state["log_history"] if "loss" in h]
    assert len(steps) == 2 and all(
        h["tokens_per_second"] > h["supervised_per_second"] > 0
        and 0 < h["mfu_measured"] < 1.5
        and 0 <= h["data_wait"] <= 1
        and h["peak_memory_gb"] > 0
        for h in steps
    )
    assert list((world / "eval").rglob("events.out.tfevents*"))
    assert (
        train.parse([str(world / "eval" / "config_resolved.json")]).settings
        == train.parse([str(world / "run.json")]).settings
    )


BAD = {
    "did you mean 'learning_rate'": ["--model", "a/b", "--learning_rat", "1"],
    "no such configuration file": ["nowhere.json"],
    "does not exist": ["--model", "/nowhere"],
    "go together": ["--language_model", "a/b", "--projector", "random"],
    "give either": ["--model", "a/b", "--language_model", "a/b", "--vision_tower", "a/b"],
    "projector of stage 1": ["--language_model", "a/b", "--vision_tower", "a/b"],
    "belongs to stage 1": ["--model", "a/b", "--template", "plain"],
    "set `learning_rate`": ["--model", "a/b", "--stage", "1", "--projector_lr", "1e-4"],
    "stage 3": ["--model", "a/b", "--stage", "3"],
    "not supported": ["--model", "a/b", "--mm_use_im_start_end", "True"],
    "--image_aspect_ratio anyres is not supported": ["--model", "a/b", "--image_aspect_ratio", "anyres"],
    "`data_path` is missing": ["--model", "a/b"],
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_configuration_is_one_line_and_exit_2(message, capsys):
    assert train.main(BAD[message] + ["--data_path", __file__] * ("data_path" not in message)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("llava_nb: ")


def test_bad_values_files_and_templates_are_one_line_and_exit_2(world, tmp_path, capsys):
    good = [
        "--model",
        "x",
        "--language_model",
        str(world / "llm"),
        "--vision_tower",
        str(world / "tower"),
        "--projector",
        "random",
        "--data_path",
        str(world / "talks.json"),
        "--image_folder",
        str(world),
        "--output_dir",
        str(tmp_path / "o"),
    ][2:]
    (tmp_path / "bad.json").write_text('{"a": ')
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}))
    for argv, message in (
        ([str(tmp_path / "bad.json")], "not JSON, line 1"),
        ([*good, "--learning_rate", "abc"], "learning_rate"),
        ([*good, "--template", "vicuna"], "is unknown; known are"),
        ([*good, "--deepspeed", str(tmp_path / "ds.json")], "optimizer"),
        ([*good, "--projector_type", "resampler"], "resampler"),
        ([*good, "--model_max_length", "4"], "no room for text"),
        ([*good, "--resume"], "nothing to resume"),
    ):
        assert train.main([*argv, "--report_to", "none"]) == (4 if "--resume" in argv else 2)
        assert message in (err := capsys.readouterr().err) and "Traceback" not in err, argv


def test_every_flag_of_the_reference_has_a_meaning():
    given = {w.removeprefix("--") for w in (PRETRAIN + FINETUNE).split() if w.startswith("--")}
    ours, _ = translate({k: "1" for k in RENAMED})
    known = train.config.field_names(*train.config.CONFIGS, ReliableTrainingArguments)
    assert set(ours) <= set(known) and given <= set(RENAMED) | set(TRANSLATED) | set(UNSUPPORTED) | set(
        MEANINGLESS
    ) | set(known)


@pytest.mark.parametrize(
    "recipe", ["llava_v1_5_7b_pretrain", "llava_v1_5_7b_finetune", "llava_v1_5_13b_pretrain", "llava_v1_5_13b_finetune"]
)
def test_shipped_recipes_dry_run(recipe, capsys):
    assert (
        train.main(
            [
                str(ROOT / "llava_nb" / "data" / "configs" / f"{recipe}.json"),
                "--dry_run",
                "--gradient_accumulation_steps",
                "8",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert ("2,181 of 256" if "pretrain" in recipe else "5,198 of 128") in out and (
        "31.47M" if "13b" in recipe else "20.98M"
    ) in out


@pytest.mark.parametrize("command", [["llava_nb/train.py"], ["-m", "llava_nb.train"], ["--console"]])
def test_ways_to_start(command):
    args = [
        "--language_model",
        "lmsys/vicuna-7b-v1.5",
        "--vision_tower",
        "openai/clip-vit-large-patch14-336",
        "--stage",
        "1",
        "--dry_run",
        "--local_rank=0",
    ]
    start = [str(Path(sys.executable).parent / "llava_nb")] if command == ["--console"] else [sys.executable, *command]
    done = subprocess.run(
        [*start, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and "6,7" in done.stdout, done.stderr
    assert done.stderr.count("Traceback") == 0


@pytest.mark.slow
def test_torchrun_starts_it():
    args = [
        "--language_model",
        "lmsys/vicuna-7b-v1.5",
        "--vision_tower",
        "openai/clip-vit-large-patch14-336",
        "--stage",
        "1",
        "--dry_run",
    ]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "1", "llava_nb/train.py", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "projector" in done.stdout, done.stderr
