"""Settings: every flag of the reference has its meaning, is refused with a reason, or says once that it has none."""
import json

import pytest

from llava_nb import config, train
from llava_nb.config import read_settings, translate

MEANT = {   # the reference's flags (ModelArguments, DataArguments, TrainingArguments) and removed transformers names -> ours
    ("model_name_or_path", "lmsys/vicuna-7b-v1.5"): {"language_model": "lmsys/vicuna-7b-v1.5"}, ("version", "v1"): {"template": "v1"}, ("version", "plain"): {"template": "plain"},
    ("tune_mm_mlp_adapter", "True"): {"stage": 1}, ("tune_mm_mlp_adapter", "False"): {}, ("vision_tower", "a/b"): {"vision_tower": "a/b"},
    ("mm_vision_select_layer", "-2"): {"vision_feature_layer": "-2"}, ("pretrain_mm_mlp_adapter", "p.bin"): {"projector": "p.bin"}, ("mm_projector_type", "linear"): {"projector_type": "linear"},
    ("mm_vision_select_feature", "patch"): {"vision_feature_select_strategy": "default"}, ("mm_vision_select_feature", "cls_patch"): {"vision_feature_select_strategy": "full"},
    ("mm_use_im_start_end", "False"): {}, ("mm_use_im_patch_token", "False"): {}, ("freeze_mm_mlp_adapter", "False"): {}, ("lora_enable", "False"): {}, ("bits", "16"): {},
    ("data_path", "x.json"): {"data_path": "x.json"}, ("image_folder", "x"): {"image_folder": "x"}, ("image_aspect_ratio", "pad"): {"image_aspect_ratio": "pad"},
    ("model_max_length", "2048"): {"model_max_length": "2048"}, ("mm_projector_lr", "2e-5"): {"projector_lr": "2e-5"}, ("optim", "adamw_torch"): {"optim": "adamw_torch"},
    ("group_by_modality_length", "True"): {"sampler": "modality"}, ("group_by_modality_length", "False"): {"sampler": "random"}, ("remove_unused_columns", "False"): {"remove_unused_columns": "False"},
    ("evaluation_strategy", "no"): {"eval_strategy": "no"}, ("warmup_ratio", "0.03"): {"warmup_steps": "0.03"}, ("resume_from_checkpoint", "c"): {"resume": "c"},
    ("deepspeed", "./scripts/zero2.json"): {"zero": 2}, ("deepspeed", "./scripts/zero3.json"): {"zero": 3}, ("deepspeed", "./scripts/zero3_offload.json"): {"zero": 3, "offload": True},
}
NOTED = {"lazy_preprocess": "True", "is_multimodal": "True", "freeze_backbone": "False", "mm_patch_merge_type": "flat", "cache_dir": "x", "mpt_attn_impl": "triton", "double_quant": "True",
         "quant_type": "nf4", "lora_r": "64", "lora_alpha": "16", "lora_dropout": "0.05", "lora_weight_path": "", "lora_bias": "none"}
REFUSED = {"mm_use_im_start_end": "True", "mm_use_im_patch_token": "True", "freeze_mm_mlp_adapter": "True", "freeze_backbone": "True", "lora_enable": "True", "bits": "4"}
KNOWN = config.field_names(*config.CONFIGS, train.trainer.LlavaTrainingArguments)


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
    with pytest.raises(ValueError, match=f"--{flag} {REFUSED[flag]} is not supported: .*|--{flag} .* stage 2"): translate({flag: REFUSED[flag]})


def test_frozen_backbone_is_what_stage_1_does():
    assert translate({"freeze_backbone": "True", "tune_mm_mlp_adapter": "True"})[0] == {"stage": 1}


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_a_deepspeed_file_that_is_there_is_read_and_not_translated(name, tmp_path):
    (tmp_path / name).write_text("{}")
    assert translate({"deepspeed": str(tmp_path / name)})[0] == {"deepspeed": str(tmp_path / name)}


@pytest.mark.parametrize("argv, settings", [
    (["--local_rank", "0"], {}), (["--local_rank=1"], {}), (["--local-rank", "0"], {}), (["--local-rank=3"], {}), (["--bf16", "--save_steps=5"], {"bf16": "True", "save_steps": "5"}),
    (["--vision_feature_layer", "-2"], {"vision_feature_layer": "-2"}), (["--learning-rate", "1e-3"], {"learning_rate": "1e-3"}), (["--apply_exif", "False"], {"apply_exif": "False"}),
])
def test_how_flags_are_written(argv, settings):
    assert read_settings(argv) == settings


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 1, "bf16": True}))
    file = str(tmp_path / "a.json")
    for argv in ([file, "--learning_rate", "2"], ["--learning_rate", "2", file]): assert read_settings(argv) == {"learning_rate": "2", "bf16": True}
    assert read_settings(["--dry_run", file]) == {"learning_rate": 1, "bf16": True, "dry_run": "True"}


@pytest.mark.parametrize("content, message", [(b"[1]", "is a list"), (b"\xff\xfe", "not UTF-8"), (b"{", "not JSON, line 1")])
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: .*{message}"): read_settings([str(tmp_path / "a.json")])
