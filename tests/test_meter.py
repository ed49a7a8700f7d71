"""The meter against counts by hand, for LLaVA-1.5 7B and 13B."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, MistralConfig, Qwen2Config

from llava_nb.fast.meter import Meter, Work, attended_pairs, matmul_rate, row_cost, work_of
from llava_nb.llava import llava_config, meta_llava, shape_of
from llava_nb.run.checks import architecture
from llava_nb.sampler import Plan
from llava_nb.trainer import PlanSampler
from llava_nb.vision import vision_config

TOWER = (
    23 * (4 * 1024**2 + 2 * 1024 * 4096) + 1024 * 3 * 14 * 14 + 577 * 1024
)  # CLIP-L/14-336: layers but the last, whose output nobody reads, patches, positions
HAND = {"7b": (32, 4096, 11008), "13b": (40, 5120, 13824)}  # layers, width, MLP width


def shape(size: str):
    text = architecture(f"lmsys/vicuna-{size}-v1.5")
    text.vocab_size = 32064
    return shape_of(
        meta_llava(llava_config(text, vision_config(architecture("openai/clip-vit-large-patch14-336")), 32000))
    )


@pytest.mark.parametrize("size", HAND)
def test_operations_equal_hand_counts(size):
    layers, width, mlp = HAND[size]
    decoder, projector = layers * (4 * width**2 + 3 * width * mlp), 1024 * width + width**2
    found, work = shape(size), Work(Counter([800, 900, 300]), supervised=150, images=2)
    expected = {
        "decoder": 6 * decoder * 2000,
        "head": 6 * 32064 * width * 150,
        "attention": 6 * layers * width * (800**2 + 900**2 + 300**2),
        "projector": 6 * projector * 2 * 576,
        "tower": 2 * TOWER * 2 * 576,
    }
    assert found.flops(work) == pytest.approx(expected, rel=1e-3)
    frozen = found.flops(work, stage=1)
    assert (
        frozen["decoder"] == 4 * decoder * 2000
        and frozen["head"] == 4 * 32064 * width * 150
        and frozen["projector"] == found.flops(work)["projector"]
    )


def test_nothing_is_counted_for_padding_or_unlearned_logits():
    found = shape("7b")
    records = Work(Counter([500, 500]))
    assert found.flops(records)["head"] == 0 and found.flops(records)["decoder"] == 6 * found.decoder * 1000


def test_utilisation_is_operations_over_the_rate_of_all_ranks():
    work = Work(Counter({850: 8, 775: 8}), 2_000, 15)
    needed = sum(shape("7b").flops(work).values())
    reading = Meter(shape("7b"), 2, ranks=4, rates={"datasheet": 989e12}).read(work, seconds=2.0, waited=0.5)
    assert reading["mfu_datasheet"] == pytest.approx(needed / 2 / 4 / 989e12, abs=1e-4)
    assert (
        reading["tokens_per_second"] == 6_500
        and reading["supervised_per_second"] == 1_000
        and reading["samples_per_second"] == 8
        and reading["data_wait"] == 0.25
    )


def test_the_work_of_steps_is_the_work_of_their_records_over_epochs():
    rng = np.random.default_rng(0)
    lengths, supervised, has_image = rng.integers(5, 90, 50), rng.integers(1, 5, 50), rng.random(50) < 0.7
    sampler = PlanSampler(Plan("modality", lengths, has_image, batch_size=4, world_size=2, seed=1), supervised)
    steps = sampler.plan.steps
    whole = work_of(np.arange(50), lengths, supervised, np.where(has_image, np.arange(50), -1))
    assert sampler.work(0, steps) == sampler.work(steps, 2 * steps) == whole
    assert sampler.work(0, 3) + sampler.work(3, steps + 2) == sampler.work(0, steps + 2)


def test_measuring_the_machine_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert matmul_rate("cpu", torch.float32, size=64) > 0
    assert torch.equal(before, torch.get_rng_state())


WINDOWED = {  # language model, its own settings, and how many of four layers have a window of 6 tokens
    "mistral": (MistralConfig, {"sliding_window": 6}, 4),
    "mistral without": (MistralConfig, {"sliding_window": None}, 0),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
    "qwen2": (Qwen2Config, {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 3}, 1),
    "qwen2 that does not use it": (Qwen2Config, {"sliding_window": 6, "use_sliding_window": False}, 0),
}
SMALL = dict(
    num_hidden_layers=4,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_layer_with_a_window_counts_the_keys_that_its_queries_see(name):
    kind, settings, windowed = WINDOWED[name]
    tower = vision_config(architecture("openai/clip-vit-large-patch14-336"))
    found = shape_of(meta_llava(llava_config(kind(**SMALL, **settings), tower, 63)))
    assert (found.layers, found.width, found.windowed) == (4, 32, windowed)
    keys = sum(
        2 * min(t - 0.5, 6) for t in range(1, 41)
    )  # query t of 40: half a key for itself, six of the window at most
    by_hand = 2 * 3 * 32 * ((4 - windowed) * 40**2 + windowed * keys)  # scores and values; forward and twice backward
    assert found.flops(Work(Counter([40])))["attention"] == by_hand
    decoder = found.flops(Work(Counter([1])))["decoder"]
    without = row_cost(found).of(np.array([40]))[0] - 40
    assert without == pytest.approx(by_hand / decoder)


def test_a_record_within_the_window_costs_what_it_costs_without_one():
    assert attended_pairs(np.array([3, 6, 7, 40]), 6).tolist() == [9, 36, 48, 40**2 - 34**2]
    assert attended_pairs(np.array([3, 6, 7, 40])).tolist() == [9, 36, 49, 1600]
