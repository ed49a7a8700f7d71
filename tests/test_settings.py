"""Settings that once got through: each is one line and exit code 2 before anything is built, or means what the reference means."""

import json

import pytest
from PIL import Image

from llava_nb import train
from llava_nb.base import trust
from llava_nb.conversation import get_template
from llava_nb.dataset import encode
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.run import settings
from llava_nb.safe import disk_space

PARTS = {
    "language_model": "lmsys/vicuna-7b-v1.5",
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "projector": "random",
}
REFERENCE = {
    "model_name_or_path": "lmsys/vicuna-7b-v1.5",
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "pretrain_mm_mlp_adapter": "out/mm_projector.bin",
    "version": "v1",
}
TEXT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
PICTURE = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def written(folder, settings: dict) -> str:
    (folder / "run.json").write_text(json.dumps(settings))
    return str(folder / "run.json")


WRONG = {
    "takes one value": {"learning_rate": [1e-5, 2e-5]},
    "not its content": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "needs `zero`": {"offload": True},
    "per_device_train_batch_size 0": {"per_device_train_batch_size": 0},
    "gradient_accumulation_steps 0": {"gradient_accumulation_steps": 0},
    "threads 0": {"threads": 0},
    "max_tokens 0": {"max_tokens": 0},
    "hang_timeout -1": {"hang_timeout": -1},
    "is a file; name a folder": {"output_dir": __file__},
    "no room for text": {"model_max_length": 576},
    "llava_nb: vision_feature_layer 99: 'clip_vision_model' has hidden states -25 to 24; choose": {
        "vision_feature_layer": 99
    },
    "samplers of its own": {"group_by_length": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_setting_is_refused_in_a_dry_run_too(message, tmp_path, capsys):
    assert train.main([written(tmp_path, PARTS | WRONG[message]), "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_zero_and_a_deepspeed_file_exclude_each_other_and_offload_is_named(tmp_path, capsys):
    for name, content, message in (
        ("ds.json", {}, "either `zero` or"),
        ("zero3_offload.json", {"optimizer": {}}, "--zero 3 --offload True"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        more = {"zero": 3} if name == "ds.json" else {}
        assert (
            train.main([written(tmp_path, PARTS | more | {"deepspeed": str(tmp_path / name)}), "--dry_run"]) == 2
            and message in capsys.readouterr().err
        )


def test_a_projector_that_cannot_be_read_is_found_in_a_dry_run(tmp_path, capsys):
    (tmp_path / "mm_projector.bin").write_bytes(b"x")
    for projector, message in (
        (tmp_path / "mm_projector.bin", "not safetensors"),
        (tmp_path, "no projector.safetensors"),
    ):
        assert train.main([written(tmp_path, PARTS | {"projector": str(projector)}), "--dry_run"]) == 2
        err = capsys.readouterr().err
        assert message in err and str(projector) in err and err.count("\n") == 1


def test_a_command_in_the_reference_s_names_gets_the_reference_s_defaults(tmp_path):
    run = train.parse([written(tmp_path, REFERENCE), "--dry_run"])
    assert (run.settings["sampler"], run.data.image_aspect_ratio, run.model.projector) == ("random", "square", "out")
    assert (
        train.parse(
            [
                written(tmp_path, REFERENCE | {"group_by_modality_length": True, "image_aspect_ratio": "pad"}),
                "--dry_run",
            ]
        ).settings["sampler"]
        == "modality"
    )
    assert train.parse([written(tmp_path, PARTS), "--dry_run"]).data.image_aspect_ratio == "pad"


def test_a_file_with_a_byte_order_mark_and_null_values(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(PARTS | {"deepspeed": None, "dry_run": True}), encoding="utf-8-sig")
    assert train.parse([str(tmp_path / "run.json")]).run.dry_run


def test_a_dry_run_counts_steps_and_tokens_as_the_run_will(tmp_path, capsys, monkeypatch):
    """Ten pictures and ten texts in steps of eight: two of each, not three in all."""
    (tmp_path / "r.json").write_text(json.dumps([PICTURE, TEXT] * 10))
    tokenizer = tiny_tokenizer()
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    argv = [
        written(
            tmp_path,
            PARTS
            | {
                "data_path": str(tmp_path / "r.json"),
                "image_folder": str(tmp_path),
                "per_device_train_batch_size": 8,
                "num_train_epochs": 1,
            },
        ),
        "--dry_run",
    ]
    load = trust.load
    monkeypatch.setattr(
        trust, "load", lambda kind, *a, **k: tokenizer if kind.__name__ == "AutoTokenizer" else load(kind, *a, **k)
    )
    monkeypatch.setattr(disk_space, "check_room", lambda *a: None)  # the disk of this machine is not the point
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    encoder, template = Encoder(tokenizer, len(tokenizer), 576, 2048), get_template("v1")
    mean = sum(len(encode(r, template, encoder).input_ids) for r in (PICTURE, TEXT)) / 2
    assert "4 of 8 records" in out and f"20 records, {mean:,.0f} tokens each (all of them checked and counted)" in out


def test_a_reporter_that_is_not_installed_is_a_note():
    notes = []
    assert (
        settings._reporters("nowhere", notes) == "none"
        and len(notes) == 1
        and settings._reporters(None, notes) == "none"
        and settings._reporters("tensorboard", notes) == "tensorboard"
    )


FILES = {  # a DeepSpeed JSON, and what is said of it; None: it is taken
    "batch": (
        {"train_batch_size": 32},
        "train_batch_size 32, but the settings say 1 ranks x per_device_train_batch_size 4 x gradient_accumulation_steps 2 = 8",
    ),
    "micro": ({"train_micro_batch_size_per_gpu": 16}, "but the settings say per_device_train_batch_size 4"),
    "steps": ({"gradient_accumulation_steps": 1}, "but the settings say gradient_accumulation_steps 2"),
    "clipping": ({"gradient_clipping": 1.0}, "but the settings say max_grad_norm 0"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled True, but the settings say --bf16 False"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled True"),
    "checkpointing": ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use --recompute"),
    "amp": ({"amp": {"enabled": True}}, "use --bf16 True"),
    "typing error": ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
    "unknown": ({"quantum": 1}, "no such key is known here"),
    "stage": ({"zero_optimization": {"stage": 7}}, "is no ZeRO stage"),
    "list": ([1], "is a JSON object"),
    "optimizer": ({"optimizer": {"type": "AdamW"}}, "the key 'optimizer'"),
    "elastic": ({"elasticity": {"enabled": True}}, "the global batch stays"),
    "auto": ({"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}, None),
    "equal": (
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": False},
        },
        None,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_deepspeed_file_may_repeat_the_settings_and_not_contradict_them(name, tmp_path, capsys):
    """In a dry run, as in a run."""
    content, said = FILES[name]
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content if isinstance(content, dict) else content))
    code = train.main(
        [
            written(
                tmp_path,
                PARTS | {"deepspeed": str(file), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            ),
            "--dry_run",
        ]
    )
    err = capsys.readouterr().err
    assert (code, err) == (0, "") if said is None else code == 2 and said in err and err.count("\n") == 1
