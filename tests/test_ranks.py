"""Two ranks through the launcher and train.py: ZeRO-2 and ZeRO-3 train what one process trains, in either stage, stopped or not.

The small run is made so that it holds every case that has broken LLaVA runs: steps in which one rank has pictures and the
other has none (both ways round), steps without any picture, accumulation, four parameter groups with weight decay.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import RECORDS, STEPS, TIMEOUT, captions, config, farthest, launch, losses, make_world, weights
from transformers import LlamaConfig, LlamaForCausalLM

from llava_nb.conversation import get_template
from llava_nb.dataset import encode
from llava_nb.fast.meter import row_cost
from llava_nb.llava import load_llava, shape_of
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.packing import RowBalancer, rows_of_step
from llava_nb.run.efficientnet import save_from_wheel
from llava_nb.sampler import Plan
from llava_nb.trainer import PlanSampler


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def single(world):
    """One process without DeepSpeed over the same global batches."""
    return launch(config(world, "single", gradient_accumulation_steps=4)[0], 0)


@pytest.fixture(scope="module")
def zero3(world):
    return launch(config(world, "zero3", zero=3)[0], 2)


@pytest.fixture(scope="module")
def plan(world):
    """Which record lies in which step, and what each costs."""
    encoder, records = Encoder(tiny_tokenizer(), 2048, 16, 256), json.loads((world / "records.json").read_text())
    lengths = np.array([len(encode(r, get_template("v1"), encoder).input_ids) for r in records])
    has_image = np.array(["image" in r for r in records])
    costs = row_cost(shape_of(load_llava(world / "start"))).of(lengths, has_image)
    return Plan(
        "random", lengths, has_image=has_image, batch_size=1, world_size=2, accumulation=2, seed=42
    ), RowBalancer(costs)


def test_the_small_run_holds_every_case(plan):
    """Pictures on one rank only (both ways round), on both, on none, and whole steps without any."""
    plan, dealer = plan
    has_image = plan.has_image
    ranks = [PlanSampler(plan, np.ones(RECORDS, int), rank=r, dealer=dealer) for r in (0, 1)]
    steps = [
        [[any(has_image[i] for i, _ in row) for row in sampler.step(k)] for sampler in ranks] for k in range(STEPS)
    ]
    assert {pair for a, b in steps for pair in zip(a, b)} == {
        (True, False),
        (False, True),
        (False, False),
        (True, True),
    }
    assert any(not any(a + b) for a, b in steps[1:])


def test_zero3_equals_one_process(world, single, zero3):
    assert len(zero3) == STEPS and zero3 == pytest.approx(single, abs=1e-5)
    assert farthest(weights(world / "single"), weights(world / "zero3")) < 1e-6


def test_zero2_equals_one_process_with_rows_cut_by_tokens(world, single, plan):
    """`max_tokens` has each rank take its records in one row, where the configuration says two micro-steps."""
    plan, dealer = plan
    assert {
        len(rows_of_step(plan.global_batch(k), plan.lengths, dealer, ranks=2, max_tokens=400))
        for k in range(plan.steps)
    } == {2}
    assert launch(config(world, "zero2", zero=2, max_tokens=400)[0], 2) == pytest.approx(single, abs=1e-5)
    assert farthest(weights(world / "single"), weights(world / "zero2")) < 1e-6


def test_steps_of_one_modality_without_the_tower_and_recomputation_change_nothing_under_zero3(world):
    """Text-only steps leave the tower out on both ranks; layers are partly or wholly computed again."""
    plain = launch(config(world, "modality", sampler="modality", gradient_accumulation_steps=4)[0], 0)
    for how in ("cheap", "full"):
        assert launch(
            config(world, f"modality_{how}", sampler="modality", zero=3, recompute=how)[0], 2
        ) == pytest.approx(plain, abs=1e-5)
        assert farthest(weights(world / "modality"), weights(world / f"modality_{how}")) < 1e-6


def test_parts_are_put_together_under_zero3(world):
    """A language model and the kit's own tower as folders; the tower is asked for its features while ZeRO-3 is alive."""
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(world / "llm")
    tokenizer.save_pretrained(world / "llm")
    save_from_wheel(world / "tower")
    parts = {
        "model": None,
        "language_model": str(world / "llm"),
        "vision_tower": str(world / "tower"),
        "projector": "random",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    assert len(launch(config(world, "parts", **parts, zero=3, max_steps=2, save_steps=1)[0], 1)) == 2


def test_zero3_resumes_with_equal_losses(world, zero3):
    file, _ = config(world, "zero3", zero=3)
    whole, exported = losses(world / "zero3"), weights(world / "zero3")
    assert launch(file, 2, "--resume", str(world / "zero3" / "checkpoint-10")) == whole
    assert farthest(exported, weights(world / "zero3")) == 0


def test_zero3_exports_what_plain_transformers_loads(world, zero3):
    """In a process that never imports llava_nb, with the logits of ours."""
    code = f"""
import json, sys, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
model = LlavaForConditionalGeneration.from_pretrained({str(world / "zero3")!r}).eval()
processor = AutoProcessor.from_pretrained({str(world / "zero3")!r}, backend="pil")
inputs = processor(text="USER: <image>\\nWhat? ASSISTANT:", images=Image.new("RGB", (50, 70), "teal"), return_tensors="pt")
torch.save([dict(inputs), model(**inputs).logits], {str(world / "logits.pt")!r})
assert not any(m.split(".")[0] == "llava_nb" for m in sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=world, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=TIMEOUT
    )
    inputs, logits = torch.load(world / "logits.pt", weights_only=True)
    ours = load_llava(world / "zero3").eval()
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, logits)
    assert ours.config.llava_nb["template"] == "v1" and ours.config.llava_nb["image_aspect_ratio"] == "pad"


def test_stage_1_under_zero2_and_its_projector_in_stage_2(world):
    """Stage 1 on two ranks, resumed with equal losses; its projector enters a partitioned stage 2."""
    file, settings = config(
        world,
        "stage1",
        zero=2,
        stage=1,
        projector_lr=None,
        template="plain",
        data_path=str(captions(world)),
        image_aspect_ratio="square",
        learning_rate=1e-3,
    )
    whole = launch(file, 2)
    folder = Path(settings["output_dir"])
    assert (folder / "projector.safetensors").is_file() and not list(folder.glob("model*.safetensors"))
    before = weights(folder)
    assert launch(file, 2, "--resume", str(folder / "checkpoint-10")) == whole
    assert farthest(before, weights(folder)) == 0
    assert (
        max(p.stat().st_size for p in (folder / "checkpoint-10").iterdir() if p.name != "tokenizer.json") < 200_000
    )  # the frozen model is not in it
    stage2, _ = config(
        world,
        "stage2",
        zero=3,
        projector=str(folder),
        max_steps=1,
        learning_rate=0.0,
        projector_lr=0.0,
        weight_decay=0.0,
        save_steps=1,
    )
    launch(stage2, 2)
    after = {
        k.removeprefix("multi_modal_projector."): v
        for k, v in weights(world / "stage2").items()
        if "multi_modal_projector" in k
    }
    assert farthest(before, after) == 0
