"""The meter against counts by hand, for LLaVA-1.5 7B and 13B."""
import numpy as np
import pytest
import torch

from llava_nb.llava import llava_config, meta_llava
from llava_nb.fast.meter import Meter, Work, matmul_rate, shape_of, work_of
from llava_nb.sampler import Plan
from llava_nb.run.checks import architecture
from llava_nb.trainer import PlanSampler
from llava_nb.vision import vision_config

TOWER = 23 * (4 * 1024 ** 2 + 2 * 1024 * 4096) + 1024 * 3 * 14 * 14 + 577 * 1024       # CLIP-L/14-336: layers but the last, whose output nobody reads, patches, positions
HAND = {"7b": (32, 4096, 11008), "13b": (40, 5120, 13824)}                              # layers, width, MLP width


def shape(size: str):
    text = architecture(f"lmsys/vicuna-{size}-v1.5")
    text.vocab_size = 32064
    return shape_of(meta_llava(llava_config(text, vision_config(architecture("openai/clip-vit-large-patch14-336")), 32000)))


@pytest.mark.parametrize("size", HAND)
def test_operations_equal_hand_counts(size):
    layers, width, mlp = HAND[size]
    decoder, projector = layers * (4 * width ** 2 + 3 * width * mlp), 1024 * width + width ** 2
    found, work = shape(size), Work(samples=3, tokens=2000, supervised=150, images=2, pairs=800 ** 2 + 900 ** 2 + 300 ** 2)
    expected = {"decoder": 6 * decoder * 2000, "head": 6 * 32064 * width * 150, "attention": 6 * layers * width * work.pairs,
                "projector": 6 * projector * 2 * 576, "tower": 2 * TOWER * 2 * 576}
    assert found.flops(work) == pytest.approx(expected, rel=1e-3)
    frozen = found.flops(work, stage=1)
    assert frozen["decoder"] == 4 * decoder * 2000 and frozen["head"] == 4 * 32064 * width * 150 and frozen["projector"] == found.flops(work)["projector"]


def test_nothing_is_counted_for_padding_or_unlearned_logits():
    found = shape("7b")
    a, b = Work(2, 1000, 100, 0, 500 ** 2 * 2), Work(2, 1000, 100, 0, 500 ** 2 * 2)
    assert found.flops(a) == found.flops(b) and found.flops(Work(2, 1000, 0, 0, 0))["head"] == 0


def test_utilisation_is_operations_over_the_rate_of_all_ranks():
    work = Work(16, 13_000, 2_000, 15, 13_000 * 850)
    needed = sum(shape("7b").flops(work).values())
    reading = Meter(shape("7b"), 2, ranks=4, rates={"datasheet": 989e12}).read(work, seconds=2.0, waited=.5)
    assert reading["mfu_datasheet"] == pytest.approx(needed / 2 / 4 / 989e12, abs=1e-4)
    assert reading["tokens_per_second"] == 6_500 and reading["supervised_per_second"] == 1_000 and reading["samples_per_second"] == 8 and reading["data_wait"] == .25


def test_the_work_of_steps_is_the_work_of_their_records_over_epochs():
    rng = np.random.default_rng(0)
    lengths, supervised, has_image = rng.integers(5, 90, 50), rng.integers(1, 5, 50), rng.random(50) < .7
    sampler = PlanSampler(Plan("modality", lengths, has_image, batch_size=4, world_size=2, seed=1), supervised)
    steps = sampler.plan.steps
    whole = work_of(np.arange(50), lengths, supervised, np.where(has_image, np.arange(50), -1))
    assert sampler.work(0, steps) == sampler.work(steps, 2 * steps) == whole
    assert sampler.work(0, 3) + sampler.work(3, steps + 2) == sampler.work(0, steps + 2)


def test_measuring_the_machine_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert matmul_rate("cpu", torch.float32, size=64) > 0
    assert torch.equal(before, torch.get_rng_state())
