"""Settings: every flag of the reference has its meaning, is refused with a reason, or says once that it has none."""

import json
import os

import pytest

from llava_nb import train
from llava_nb.run import config
from llava_nb.run.config import DataConfig, read_settings
from llava_nb.run.translate import UNSUPPORTED, translate
from llava_nb.safe.reliable_trainer import ReliableTrainingArguments

MEANT = {  # the reference's flags (ModelArguments, DataArguments, TrainingArguments) and removed transformers names -> ours
    ("model_name_or_path", "lmsys/vicuna-7b-v1.5"): {"language_model": "lmsys/vicuna-7b-v1.5"},
    ("version", "v1"): {"template": "v1"},
    ("version", "plain"): {"template": "plain"},
    ("tune_mm_mlp_adapter", "True"): {"stage": 1},
    ("tune_mm_mlp_adapter", "False"): {},
    ("vision_tower", "a/b"): {"vision_tower": "a/b"},
    ("mm_vision_select_layer", "-2"): {"vision_feature_layer": "-2"},
    ("pretrain_mm_mlp_adapter", "p.bin"): {"projector": "p.bin"},
    ("mm_projector_type", "linear"): {"projector_type": "linear"},
    ("mm_vision_select_feature", "patch"): {"vision_feature_select_strategy": "default"},
    ("mm_vision_select_feature", "cls_patch"): {"vision_feature_select_strategy": "full"},
    ("mm_use_im_start_end", "False"): {},
    ("mm_use_im_patch_token", "False"): {},
    ("freeze_mm_mlp_adapter", "False"): {},
    ("lora_enable", "False"): {},
    ("bits", "16"): {},
    ("data_path", "x.json"): {"data_path": "x.json"},
    ("image_folder", "x"): {"image_folder": "x"},
    ("image_aspect_ratio", "pad"): {"image_aspect_ratio": "pad"},
    ("model_max_length", "2048"): {"model_max_length": "2048"},
    ("mm_projector_lr", "2e-5"): {"projector_lr": "2e-5"},
    ("optim", "adamw_torch"): {"optim": "adamw_torch"},
    ("group_by_modality_length", "True"): {"sampler": "modality"},
    ("group_by_modality_length", "False"): {"sampler": "random"},
    ("remove_unused_columns", "False"): {"remove_unused_columns": "False"},
    ("evaluation_strategy", "no"): {"eval_strategy": "no"},
    ("warmup_ratio", "0.03"): {"warmup_steps": "0.03"},
    ("resume_from_checkpoint", "c"): {"resume": "c"},
    ("deepspeed", "./scripts/zero2.json"): {"zero": 2},
    ("deepspeed", "./scripts/zero3.json"): {"zero": 3},
    ("deepspeed", "./scripts/zero3_offload.json"): {"zero": 3, "offload": True},
}
NOTED = {
    "attn_implementation": "flash_attention_2",
    "tune_vision_tower_from_layer": "12",
    "tokenizer_use_fast": "False",
    "do_train": "True",
    "video_fps": "1",
    "lazy_preprocess": "True",
    "is_multimodal": "True",
    "freeze_backbone": "False",
    "cache_dir": "x",
    "mpt_attn_impl": "triton",
    "double_quant": "True",
    "quant_type": "nf4",
    "lora_r": "64",
    "lora_alpha": "16",
    "lora_dropout": "0.05",
    "lora_weight_path": "",
    "lora_bias": "none",
}
REFUSED = {
    "mm_use_im_start_end": "True",
    "mm_use_im_patch_token": "True",
    "freeze_mm_mlp_adapter": "True",
    "freeze_backbone": "True",
    "lora_enable": "True",
    "bits": "4",
}
KNOWN = config.field_names(*config.CONFIGS, ReliableTrainingArguments)


@pytest.mark.parametrize("flag, value", MEANT)
def test_a_flag_of_the_reference_means_ours(flag, value):
    ours, notes = translate({flag: value})
    assert ours == MEANT[flag, value] and not notes and set(ours) <= set(KNOWN)


@pytest.mark.parametrize("flag", NOTED)
def test_a_flag_without_meaning_says_so_once(flag):
    ours, notes = translate({flag: NOTED[flag]})
    assert ours == {} and len(notes) == 1 and notes[0].startswith(f"--{flag} means nothing here: ")


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_asks_for_another_training_is_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag} {REFUSED[flag]} is not supported: .*|--{flag} .* stage 2"):
        translate({flag: REFUSED[flag]})


def test_frozen_backbone_is_what_stage_1_does():
    assert translate({"freeze_backbone": "True", "tune_mm_mlp_adapter": "True"})[0] == {"stage": 1}


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_a_deepspeed_file_that_is_there_is_read_and_not_translated(name, tmp_path):
    (tmp_path / name).write_text("{}")
    assert translate({"deepspeed": str(tmp_path / name)})[0] == {"deepspeed": str(tmp_path / name)}


@pytest.mark.parametrize(
    "argv, settings",
    [
        (["--local_rank", "0"], {}),
        (["--local_rank=1"], {}),
        (["--local-rank", "0"], {}),
        (["--local-rank=3"], {}),
        (["--bf16", "--save_steps=5"], {"bf16": "True", "save_steps": "5"}),
        (["--vision_feature_layer", "-2"], {"vision_feature_layer": "-2"}),
        (["--learning-rate", "1e-3"], {"learning_rate": "1e-3"}),
        (["--apply_exif", "False"], {"apply_exif": "False"}),
    ],
)
def test_how_flags_are_written(argv, settings):
    assert read_settings(argv) == settings


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 1, "bf16": True}))
    file = str(tmp_path / "a.json")
    for argv in ([file, "--learning_rate", "2"], ["--learning_rate", "2", file]):
        assert read_settings(argv) == {"learning_rate": "2", "bf16": True}
    assert read_settings(["--dry_run", file]) == {"learning_rate": 1, "bf16": True, "dry_run": "True"}


def test_several_data_files_in_words_and_a_configuration_behind_them(tmp_path):
    for name, text in {
        "a.json": "[]",
        "b.jsonl": '{"id": 1, "model": "x", "conversations": []}',
        "run.json": '{"model": "x"}',
    }.items():
        (tmp_path / name).write_text(text)
    a, b, run = (str(tmp_path / name) for name in ("a.json", "b.jsonl", "run.json"))
    for argv in (
        ["--data_path", a, b, run],
        [run, "--data_path", a, b],
        [f"--data-path={a}", b, run],
        ["--data_path", a, b, "--model", "x"],
    ):
        assert read_settings(argv) == {"model": "x", "data_path": [a, b]}
    assert read_settings(["--data_path", a, run]) == {"model": "x", "data_path": a}
    assert read_settings(["--eval_data_path", a, "nowhere.json", "--bf16"]) == {
        "eval_data_path": [a, "nowhere.json"],
        "bf16": "True",
    }


def test_commas_part_paths_where_no_such_file_exists(tmp_path):
    for name in ("a.json", "b.json", "a.json,b", "red, green.json"):
        (tmp_path / name).write_text("[]")
    a, b, both, comma = (str(tmp_path / name) for name in ("a.json", "b.json", "a.json,b", "red, green.json"))
    far = "memory://x,y"
    for given, wanted in (
        (a, [a]),
        (f"{a},{b}", [a, b]),
        (f"{a}, {b},", [a, b]),
        (comma, [comma]),
        ([a, comma], [a, comma]),
        ([f"{a},{b}", comma], [a, b, comma]),
        (both, [both]),
        (far, [far]),
        (f"{a},{far}", [a, far]),
        (f"{far},{far}", [far, far]),
        ("no1.json,no2.json", ["no1.json", "no2.json"]),
        (",".join([a] * 100), [a] * 100),
        (None, None),
        ("", None),
        (",", None),
        ([], None),
    ):
        assert DataConfig(data_path=given).data_path == DataConfig(eval_data_path=given).eval_data_path == wanted
    assert DataConfig(f"{a},~/b.json").data_path == [a, os.path.expanduser("~/b.json")]


@pytest.mark.parametrize(
    "content, message", [(b"[1]", "is a list"), (b"\xff\xfe", "not UTF-8"), (b"{", "not JSON, line 1")]
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        read_settings([str(tmp_path / "a.json")])


# Commands of other programs, as their scripts have them

COMMON = """--data_path a.json --image_folder images --vision_tower openai/clip-vit-large-patch14-336 --mm_vision_select_layer -2 --bf16 True --output_dir out --num_train_epochs 1
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 3000 --save_total_limit 1
--learning_rate 1e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 8192 --gradient_checkpointing True
--dataloader_num_workers 16 --lazy_preprocess True --run_name mine --deepspeed scripts/zero3.json --model_name_or_path lmsys/vicuna-7b-v1.5 --dry_run"""
NEXT = (
    COMMON
    + """ --version v1 --pretrain_mm_mlp_adapter=/checkpoints/projectors/base/mm_projector.bin --mm_tunable_parts=mm_vision_tower,mm_mlp_adapter,mm_language_model --mm_vision_tower_lr=2e-6
--mm_projector_type mlp2x_gelu --mm_use_im_start_end False --mm_use_im_patch_token False --group_by_modality_length True --image_aspect_ratio anyres_max_9 --image_grid_pinpoints (1x1),...,(6x6)
--mm_patch_merge_type spatial_unpad --torch_compile True --torch_compile_backend inductor --dataloader_drop_last True --frames_upbound 32 --video_folder videos --attn_implementation sdpa"""
)
TINY = (
    COMMON
    + """ --is_multimodal True --conv_version phi --vision_tower2  --connector_type mlp2x_gelu --image_aspect_ratio square --attn_implementation flash_attention_2 --training_recipe common
--tune_type_llm full --tune_type_vision_tower frozen --tune_vision_tower_from_layer 0 --tune_type_connector full --group_by_modality_length True --pretrained_model_path random --tokenizer_use_fast False"""
)
LORA = (
    COMMON
    + """ --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --version v1 --pretrain_mm_mlp_adapter ./checkpoints/pretrain/mm_projector.bin --mm_projector_type mlp2x_gelu
--mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bits 4"""
)


def test_a_command_of_llava_next_is_answered_once_with_all_that_stands_in_its_way(capsys):
    assert train.main(NEXT.split()) == 2
    err = capsys.readouterr().err
    for flag in (
        "mm_tunable_parts",
        "mm_vision_tower_lr",
        "image_aspect_ratio anyres_max_9",
        "image_grid_pinpoints",
        "mm_patch_merge_type spatial_unpad",
        "torch_compile True",
        "torch_compile_backend",
        "dataloader_drop_last",
        "video_folder",
    ):
        assert err.count(f"  --{flag}") == 1, flag
    for flag in ("--frames_upbound", "--attn_implementation", "--lazy_preprocess"):
        assert flag in err.split("besides")[1], flag
    for flag in ("mm_projector_type", "run_name", "version", "group_by_modality_length", "pretrain_mm_mlp_adapter"):
        assert f"--{flag}" not in err, flag
    assert "mm_mlp_adapter,mm_language_model" in err and "Traceback" not in err


def test_what_is_left_of_it_is_taken(capsys):
    gone = (
        "mm_vision_tower_lr",
        "image_grid_pinpoints",
        "mm_patch_merge_type",
        "torch_compile",
        "dataloader_drop_last",
        "video_folder",
    )
    kept = [
        part
        for part in NEXT.replace("mm_vision_tower,", "").replace("anyres_max_9", "pad").split("--")
        if not part.startswith(gone)
    ]
    assert train.main("--".join(kept).split()) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 1 and "--frames_upbound" in out and "stage 2:" in out


def test_a_command_of_tinyllava_is_translated(capsys):
    argv = [word for line in TINY.splitlines() for word in line.split(" ") if word or "vision_tower2" in line]
    run = train.parse(argv)
    assert (run.stage, run.data.template, run.model.projector_type, run.model.projector, run.settings["sampler"]) == (
        2,
        "v1",
        "mlp2x_gelu",
        "random",
        "modality",
    )
    assert (
        train.parse(
            [
                a.replace("full", "frozen")
                if a == "full" and argv[k - 1] == "--tune_type_llm"
                else a.replace("phi", "pretrain")
                for k, a in enumerate(argv)
            ]
        ).stage
        == 1
    )
    assert len(run.notes) == 1 and "--tune_vision_tower_from_layer" in run.notes[0]


def test_a_lora_command_is_answered_once(capsys):
    assert train.main(LORA.split()) == 2
    err = capsys.readouterr().err
    assert (
        err.count("is not supported: all weights are trained") == 2
        and "--lora_r, --lora_alpha" in err
        and "mm_projector_lr" not in err
    )


@pytest.mark.parametrize(
    "asked, stage",
    [
        ("mm_mlp_adapter", 1),
        ("mm_mlp_adapter,mm_language_model", 2),
        ("mm_language_model, mm_mlp_adapter", 2),
        ("", None),
    ],
)
def test_parts_that_are_trained_are_a_stage(asked, stage):
    assert translate({"mm_tunable_parts": asked})[0].get("stage") == stage


@pytest.mark.parametrize("flag", UNSUPPORTED)
def test_a_flag_that_changes_nothing_is_taken_and_any_other_value_refused(flag):
    for value in UNSUPPORTED[flag][0]:
        assert translate({flag: value}) == ({}, [])
    with pytest.raises(ValueError, match=f"^--{flag}.* is not supported: .*; leave it out$"):
        translate({flag: "something else"})


@pytest.mark.parametrize(
    "flag, value",
    [
        ("tune_type_llm", "lora"),
        ("connector_type", "qformer"),
        ("mm_tunable_parts", "mm_vision_tower"),
        ("mm_tunable_parts", "mm_language_model"),
        ("image_aspect_ratio", "highres"),
        ("unfreeze_language_model", "True"),
        ("tune_entire_model", "True"),
        ("use_dora", "true"),
    ],
)
def test_a_value_that_asks_for_another_training_is_refused(flag, value):
    more = {"tune_mm_mlp_adapter": "True"} if flag == "unfreeze_language_model" else {}
    with pytest.raises(ValueError, match=f"--{flag} "):
        translate({flag: value} | more)


def test_names_that_transformers_has_given_up():
    assert translate(
        {
            "per_gpu_train_batch_size": 4,
            "per_gpu_eval_batch_size": 2,
            "past_index": -1,
            "fp16_backend": "auto",
            "include_tokens_per_second": True,
        }
    )[0] == {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    with pytest.raises(ValueError, match="--push_to_hub_token is not supported: nothing is sent"):
        translate({"push_to_hub_token": "hf_secret"})
