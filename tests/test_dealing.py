"""Dealing a step to rows by cost: the same step, whoever computes it, and nobody waits."""

import numpy as np
import pytest
from torch.utils.data import Dataset

from llava_nb.fast.meter import RowCost, row_cost
from llava_nb.llava import llava_config, meta_llava, shape_of, tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.objective import token_weights
from llava_nb.packing import RowBalancer, balance_rows, check_max_tokens, rows_of_step
from llava_nb.run.checks import architecture
from llava_nb.sampler import Plan, mix665k_sample
from llava_nb.trainer import LlavaTrainingArguments, PlanSampler, plan_sampler, several_rows
from llava_nb.vision import vision_config

SAMPLE, COST = mix665k_sample(), RowCost(attention=2e-5, image=9)


@pytest.mark.parametrize("n,rows", [(0, 3), (1, 4), (7, 3), (128, 8)])
def test_every_record_is_dealt_once(n, rows):
    costs = np.random.default_rng(n).integers(1, 2000, n)
    dealt = balance_rows(costs, rows)
    assert len(dealt) == rows and sorted(np.concatenate(dealt).tolist()) == list(range(n))
    assert all((np.diff(row) > 0).all() for row in dealt)


@pytest.mark.parametrize("rows", [2, 8])
def test_records_of_one_picture_lie_in_one_row_unless_that_row_would_make_the_others_wait(rows):
    rng = np.random.default_rng(rows)
    costs, pictures = rng.integers(500, 1500, 64), np.where(rng.random(64) < 0.7, rng.integers(0, 30, 64), -1)
    dealt = balance_rows(costs, rows, pictures, image=100)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(64))
    assert sum(len(set(pictures[row]) - {-1}) for row in dealt) == len(
        set(pictures) - {-1}
    )  # the tower's work of the step
    load = [costs[row].sum() - 100 * (np.sum(pictures[row] >= 0) - len(set(pictures[row]) - {-1})) for row in dealt]
    assert max(load) < 1.1 * np.mean(load)
    alone = balance_rows(costs, rows, np.zeros(64, int), image=100)
    load = [costs[row].sum() - 100 * (len(row) - 1) for row in alone]
    assert (
        sorted(np.concatenate(alone).tolist()) == list(range(64))
        and min(map(len, alone))
        and max(load) < 1.5 * np.mean(load)
    )


def test_a_picture_that_every_record_shows_does_not_defeat_max_tokens():
    plan = Plan("random", np.full(64, 100), batch_size=16, world_size=2)
    dealer = RowBalancer(np.full(64, 110.0), np.zeros(64, int), image=10)
    assert len(rows_of_step(plan.global_batch(0), plan.lengths, dealer, ranks=2, max_tokens=400)) == 2 * 4


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_ranks_wait_less_than_two_percent_on_the_mixture(micro_steps):
    plan, costs = (
        Plan("modality", SAMPLE["tokens"], SAMPLE["image"], batch_size=16, world_size=8),
        COST.of(SAMPLE["tokens"], SAMPLE["image"]),
    )
    computed = waited = 0.0
    for k in range(len(plan.drawn.body)):
        rows = np.array(
            [
                costs[plan.global_batch(k)[row]].sum()
                for row in balance_rows(costs[plan.global_batch(k)], 8 * micro_steps)
            ]
        ).reshape(micro_steps, 8)
        computed += rows.sum()
        waited += 8 * rows.max(1).sum()
    assert 1 - computed / waited < 0.02


@pytest.mark.parametrize("world,micro_steps", [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)])
def test_a_dealt_step_has_the_records_and_weights_of_the_reference(world, micro_steps):
    "In the short steps at the end too, where a row without a record gets one of weight 0."
    supervised = SAMPLE["supervised"][:200]
    plan = Plan(
        "modality", SAMPLE["tokens"][:200], SAMPLE["image"][:200], batch_size=4, world_size=world, accumulation=2
    )
    samplers = [
        PlanSampler(plan, supervised, rank=r, dealer=RowBalancer(COST.of(plan.lengths)), rows=micro_steps)
        for r in range(world)
    ]
    for k in range(plan.steps):
        chunks = plan.micro_batches(k)
        expected = {
            int(i): w
            for c, ws in zip(chunks, token_weights("reference", [supervised[c].tolist() for c in chunks]))
            for i, w in zip(c, ws)
        }
        steps = [s.step(k) for s in samplers]
        assert all(len(s) == micro_steps and all(s) for s in steps)
        found = [(i, w) for s in steps for row in s for i, w in row if w]
        assert dict(found) == pytest.approx({i: w for i, w in expected.items() if w}) and len(found) == len(dict(found))
    assert {len(list(s)) for s in samplers} == {plan.steps} == {len(s) for s in samplers}


def test_max_tokens_chooses_the_fewest_rows_of_each_step():
    """One fewer for each rank would not fit; ranks have as many; steps differ."""
    plan, costs = (
        Plan("modality", SAMPLE["tokens"], SAMPLE["image"], batch_size=16, world_size=2, seed=3),
        COST.of(SAMPLE["tokens"]),
    )
    dealer, lengths, counts = RowBalancer(costs), SAMPLE["tokens"], set()
    for k in range(plan.steps):
        step = plan.global_batch(k)
        longest = lambda rows: max(int(lengths[step[row]].sum()) for row in rows)
        rows = rows_of_step(step, lengths, dealer, ranks=2, max_tokens=6000)
        assert len(rows) % 2 == 0 and sorted(np.concatenate(rows)) == list(range(len(step)))
        assert longest(rows) <= 6000 and (len(rows) == 2 or longest(dealer(step, len(rows) - 2)) > 6000)
        counts.add(len(rows) // 2)
    assert len(counts) > 1


def test_a_record_that_is_longer_than_a_row_is_named_at_once():
    lengths, worst = SAMPLE["tokens"], int(SAMPLE["tokens"].argmax())
    plan = Plan("modality", lengths, SAMPLE["image"], batch_size=16)
    message = f"max_tokens 100: record {worst} alone has {lengths[worst]} tokens; raise max_tokens to at least that, or lower model_max_length"
    for refuse in (
        lambda: check_max_tokens(lengths, 100),
        lambda: PlanSampler(plan, SAMPLE["supervised"], max_tokens=100),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
    with pytest.raises(ValueError, match="max_tokens 100: record .* alone has"):
        rows_of_step(plan.global_batch(0), lengths, RowBalancer(COST.of(lengths)), max_tokens=100)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_have_as_many_rows_in_a_step_and_share_its_records(world):
    plan = Plan(
        "modality", SAMPLE["tokens"][:300], SAMPLE["image"][:300], batch_size=8, world_size=world, accumulation=2
    )
    samplers = [
        PlanSampler(
            plan, SAMPLE["supervised"][:300], rank=r, dealer=RowBalancer(COST.of(plan.lengths)), max_tokens=4096
        )
        for r in range(world)
    ]
    counts = []
    for steps in zip(*samplers):
        assert len({len(rows) for rows in steps}) == 1 and all(row for rows in steps for row in rows)
        assert max(int(plan.lengths[[i for i, _ in row]].sum()) for rows in steps for row in rows) <= 4096
        counts.append(len(steps[0]))
        held = [i for rows in steps for row in rows for i, w in row if w]
        assert len(held) == len(set(held)) and set(held) <= set(plan.global_batch(len(counts) - 1).tolist())
    assert len(set(counts)) > 1


def test_max_tokens_leaves_the_steps_alone(tmp_path):
    class Data(Dataset):
        lengths, has_image, word_lengths, supervised = (
            SAMPLE[k][:320] for k in ("tokens", "image", "words", "supervised")
        )
        pictures = np.where(has_image, np.arange(320) // 2, -1)

    args = lambda **more: LlavaTrainingArguments(
        output_dir=tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=2, report_to="none", **more
    )
    as_counted, by_tokens = (plan_sampler(a, Data(), COST) for a in (args(), args(max_tokens=4096)))
    assert len(by_tokens.step(1)) > 2 == len(
        as_counted.step(1)
    ) and by_tokens.plan.steps == as_counted.plan.steps == len(by_tokens)
    step = lambda sampler: {i: w for row in sampler.step(1) for i, w in row}
    assert step(by_tokens) == step(as_counted)
    assert several_rows(by_tokens, 3) and not several_rows(plan_sampler(args(max_tokens=60_000), Data(), COST), 3)


def test_the_cost_of_a_7b_model():
    "attention: 32 layers x 4,096 / 6.48e9 weights; a picture: the 0.2906e9 weights of the layers that run, at 576 positions, forward only."
    text, tower = architecture("lmsys/vicuna-7b-v1.5"), vision_config(architecture("openai/clip-vit-large-patch14-336"))
    found = row_cost(shape_of(meta_llava(llava_config(text, tower, 32000))))
    assert found.attention == pytest.approx(32 * 4096 / 6.476e9, rel=0.01) and found.image == pytest.approx(
        0.2906e9 * 576 / (3 * 6.476e9), rel=0.02
    )
    assert row_cost(shape_of(tiny_llava(tiny_tokenizer()))).attention == pytest.approx(
        2 * 64 / (2 * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 128)), rel=1e-6
    )
