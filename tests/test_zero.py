"""DeepSpeed's configuration: the reference's settings, explicit clipping, nothing that replaces optimizer or schedule."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

import llava_nb
from llava_nb.fast.zero import (
    accumulate_in_float32,
    bytes_per_rank,
    deepspeed_config,
    fetch_whole_layers,
    read_deepspeed_config,
)
from llava_nb.run.checks import dry_model
from llava_nb.run.config import ModelConfig
from llava_nb.trainer import LlavaTrainingArguments


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_offload_moves_memory_and_changes_nothing_else(stage, offload):
    config = deepspeed_config(stage, max_grad_norm=0.5, offload=offload)
    assert "optimizer" not in config and "scheduler" not in config and config["gradient_clipping"] == 0.5
    assert config["zero_force_ds_cpu_optimizer"] is False  # or accelerate would swap in another Adam
    zero = config["zero_optimization"]
    assert ("offload_optimizer" in zero) == offload and ("offload_param" in zero) == (offload and stage == 3)
    kept = {k: v for k, v in zero.items() if not k.startswith("offload")}
    assert kept == deepspeed_config(stage)["zero_optimization"]


def test_settings_are_the_references():
    zero = deepspeed_config(3)["zero_optimization"]
    assert (
        zero["stage3_gather_16bit_weights_on_model_save"] is True
        and zero["overlap_comm"]
        and zero["contiguous_gradients"]
    )
    assert (zero["sub_group_size"], zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (
        10**9,
    ) * 3
    assert {
        zero[k] for k in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    } == {"auto"}


def test_clipping_is_explicit_and_none_by_default(tmp_path):
    assert deepspeed_config(2)["gradient_clipping"] == 0.0 == LlavaTrainingArguments(output_dir=tmp_path).max_grad_norm
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert read_deepspeed_config(tmp_path / "zero.json")["gradient_clipping"] == 0.0
    (tmp_path / "zero.json").write_text(json.dumps({"gradient_clipping": 0.3}))
    assert read_deepspeed_config(tmp_path / "zero.json", 1.0)["gradient_clipping"] == 0.3


@pytest.mark.parametrize(
    "stage, micro_steps, half, expected",
    [
        (2, 4, True, "fp32"),
        (3, 2, True, "fp32"),
        (2, 1, True, None),
        (3, 4, False, None),
        (1, 4, True, None),
        (0, 4, True, None),
    ],
)
def test_gradients_of_several_rows_add_up_in_float32_where_the_engine_can(stage, micro_steps, half, expected):
    config = deepspeed_config(stage)
    accumulate_in_float32(config, micro_steps, half)
    assert config.get("data_types", {}).get("grad_accum_dtype") == expected


def test_a_json_decides_by_itself_how_gradients_add_up():
    own, none = (
        {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
        {"bf16": {"enabled": True}},
    )
    for config in (own, none):
        before = json.dumps(config)
        accumulate_in_float32(config, 8, True)
        assert json.dumps(config) == before


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_a_file_that_replaces_optimizer_or_schedule_is_refused(tmp_path, key):
    (tmp_path / "zero.json").write_text(json.dumps({key: {"type": "x"}}))
    with pytest.raises(ValueError, match=f"zero.json: the key '{key}'"):
        read_deepspeed_config(tmp_path / "zero.json")


def test_sampler_follows_the_stage(tmp_path):
    assert (
        LlavaTrainingArguments(output_dir=tmp_path, stage=1).sampler == "random"
        and LlavaTrainingArguments(output_dir=tmp_path, stage=2).sampler == "modality"
    )


def test_bytes_add_up():
    whole = bytes_per_rank(7e9, 0, 1, 0)
    assert sum(whole.values()) == 16 * 7e9
    assert sum(bytes_per_rank(7e9, 0, 8, 3).values()) == 2 * 7e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs keep DeepSpeed's default")
def test_layers_are_fetched_whole_unless_the_json_says_otherwise():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2, 16)])})
    own, none, two = (
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Mine"]}}},
        {"bf16": {"enabled": True}},
        deepspeed_config(2),
    )
    for config in (own, none, two):
        before = json.dumps(config)
        fetch_whole_layers(config, model)
        assert json.dumps(config) == before
    fetch_whole_layers(config := deepspeed_config(3), model)
    assert config["zero_optimization"]["leaf_module"] == {"classes": ["TransformerEncoderLayer"]}


def test_a_models_shapes_are_read_whole_while_zero_3_is_on():
    "The checks of a run look at them after its ranks have joined."
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig(deepspeed_config(3))
    assert is_deepspeed_zero3_enabled()
    found = dry_model(
        ModelConfig(language_model="lmsys/vicuna-7b-v1.5", vision_tower="openai/clip-vit-large-patch14-336")
    )
    assert sum(p.numel() for p in found.parameters()) > 7e9 and not any(hasattr(p, "ds_id") for p in found.parameters())
    del alive


INSIDE = (
    r"ds_\w+|_hp_mapping|hp_fragment_address|lp_fragment_address|fp32_partitioned_groups_flat|single_partition_of_fp32_groups|"
    r"grad_position|sub_group_to_group_id|grad_partitions_flat_buffer|averaged_gradients|all_grad_tensors|micro_step_id|"
    r"has_overflow|check_grad_overflow|overflow|loss_scaler|swap_optimizer|global_samples|GatheredParameters|Init|"
    r"(is|set)_gradient_accumulation_boundary|_hf_deepspeed_config_weak_ref"
)


def reached_into(source: str) -> set[str]:
    """Names of DeepSpeed's inside that a module uses: attributes, and what getattr and its kin are asked for; the import itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found.add(getattr(node.args[1], "value", ""))
        elif isinstance(node, ast.Import):
            found |= {"ds_import" for a in node.names if a.name.split(".")[0] == "deepspeed"}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {"ds_import"} if node.module.split(".")[0] == "deepspeed" else set()
    return {name for name in found if re.fullmatch(INSIDE, str(name))}


def test_only_two_modules_of_fast_know_deepspeeds_inside():
    package = Path(llava_nb.__file__).parent
    found = {str(p.relative_to(package)): reached_into(p.read_text(encoding="utf-8")) for p in package.rglob("*.py")}
    assert {name for name, names in found.items() if names} == {"fast/engine.py", "fast/zero.py"}, {
        k: v for k, v in found.items() if v
    }
    assert len(found["fast/engine.py"]) > 15 and found["fast/zero.py"] == {"ds_import"}
    assert (
        reached_into("n = getattr(p, 'ds_numel', 0)")
        and reached_into("import deepspeed.runtime.zero")
        and not reached_into("s = 'dtype overflows'")
    )
