"""The sampler: the reference's orders index for index, and what a plan promises."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_nb.sampler import (
    Plan,
    Remainder,
    cut,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    mix665k_sample,
    split_to_even_chunks,
    waste,
)

GOLDENS = Path(os.environ.get("GOLDENS") or Path(__file__).parent / "goldens")
GOLD = json.loads((GOLDENS / "sampler.json").read_text())
SEED, LENGTHS = GOLD["seed_before_each_call"], GOLD["lengths"]
CALLS = [(case, kind) for case, kinds in GOLD["cases"].items() for kind in kinds]


def sizes(case: str) -> tuple[int, int]:
    "Batch size and number of chunks of a case such as `bs2_w4`."
    return tuple(map(int, re.fullmatch(r"bs(\d+)_w(\d+)", case).groups()))


@pytest.fixture
def seeded():
    "A function that seeds torch's global generator as the goldens' run did; the state is put back."
    state = torch.get_rng_state()
    yield lambda: torch.manual_seed(SEED)
    torch.set_rng_state(state)


@pytest.mark.parametrize("case,kind", CALLS)
def test_reference_functions_equal_goldens(case, kind, seeded):
    seeded()
    if kind == "plain":
        order = get_length_grouped_indices(np.abs(LENGTHS), *sizes(case))
    else:
        order = get_modality_length_grouped_indices(LENGTHS, *sizes(case), torch.Generator() if kind == "mp" else None)
    assert order.tolist() == GOLD["cases"][case][kind]


@pytest.mark.parametrize("case,kind", [c for c in CALLS if c[1] != "plain"])
def test_compat_plan_equals_goldens(case, kind):
    "Through the plan, with owned generators: `mp` is several ranks, `sp` one rank that accumulates."
    batch, chunks = sizes(case)
    world, accumulation = (chunks, 1) if kind == "mp" else (1, chunks)
    plan = Plan("compat", np.abs(LENGTHS), None, LENGTHS, batch, world, accumulation, seed=SEED)
    assert plan.order.tolist() == GOLD["cases"][case][kind]
    assert np.concatenate([plan.global_batch(k) for k in range(plan.steps)]).tolist() == GOLD["cases"][case][kind]


SIGNED = [5, -3, 9, 2, -8, 7, 1, -4, 6, 3, -2, 8, 4, -6, 10, 12, -1, 11]
VECTORS = [  # further outputs of the reference, after torch.manual_seed(42), generator None
    ([-abs(x) for x in SIGNED], 2, 2, [6, 7, 14, 15, 16, 10, 3, 8, 12, 5, 4, 11, 9, 13, 2, 17, 1, 0]),
    ([abs(x) for x in SIGNED], 2, 2, [15, 6, 14, 7, 8, 16, 10, 3, 4, 5, 11, 12, 17, 9, 2, 13, 0, 1]),
    ([3, -2, 5], 4, 2, [0, 1, 2]),
    ([1, 2, 3, 4, -1, -2, -3, -4], 2, 1, [3, 2, 6, 5, 0, 1, 4, 7]),
]


@pytest.mark.parametrize("lengths,batch,chunks,expected", VECTORS)
def test_reference_vectors(lengths, batch, chunks, expected):
    state = torch.get_rng_state()
    torch.manual_seed(42)
    got = get_modality_length_grouped_indices(lengths, batch, chunks).tolist()
    torch.set_rng_state(state)
    assert got == expected
    plan = Plan("compat", np.abs(lengths), None, lengths, batch, 1, chunks, seed=42)
    assert plan.order.tolist() == expected
    assert np.concatenate([plan.global_batch(k) for k in range(plan.steps)]).tolist() == expected


def naive_chunks(indices, lengths, n):
    if len(indices) % n:
        return [indices[i::n] for i in range(n)]
    chunks, load = [[] for _ in range(n)], [0] * n
    for i in indices:
        j = load.index(min(load))
        chunks[j].append(i)
        load[j] = load[j] + lengths[i] if len(chunks[j]) < len(indices) // n else float("inf")
    return chunks


def naive_grouped(lengths, batch, chunks, generator):
    order, size, out = torch.randperm(len(lengths), generator=generator).tolist(), batch * chunks, []
    for start in range(0, len(order), size):
        megabatch = sorted(order[start : start + size], key=lambda i: lengths[i], reverse=True)
        for chunk in naive_chunks(megabatch, lengths, chunks):
            out += chunk
    return out


def naive_modality(lengths, batch, chunks, inner, outer):
    "The reference's description word for word, in plain lists."
    if all(x > 0 for x in lengths) or all(x < 0 for x in lengths):
        return naive_grouped(lengths, batch, chunks, outer)
    size, kept, rest = batch * chunks, [], []
    for sign in (1, -1):
        group = [i for i, x in enumerate(lengths) if sign * x > 0]
        order = [group[i] for i in naive_grouped([sign * lengths[i] for i in group], batch, chunks, inner)]
        mega = [order[i : i + size] for i in range(0, len(order), size)]
        kept += mega[:-1]
        rest += mega[-1]
    return [i for k in torch.randperm(len(kept), generator=outer).tolist() for i in kept[k]] + sorted(rest)


@pytest.mark.parametrize("seed", range(60))
def test_arrays_equal_the_naive_algorithm(seed):
    rng, gen = random.Random(seed), lambda s: torch.Generator().manual_seed(s)
    n, batch, chunks = rng.randint(2, 90), rng.randint(1, 5), rng.randint(1, 6)
    text = rng.choice([0.0, 0.1, 0.5, 1.0])
    lengths = [rng.randint(1, 12) * (-1 if rng.random() < text else 1) for _ in range(n)]
    expected = naive_modality(lengths, batch, chunks, gen(seed), gen(seed + 1))
    assert get_modality_length_grouped_indices(lengths, batch, chunks, gen(seed + 1), gen(seed)).tolist() == expected
    by_length = sorted(range(n), key=lambda i: -lengths[i])
    assert [c.tolist() for c in split_to_even_chunks(by_length, lengths, chunks)] == naive_chunks(
        by_length, lengths, chunks
    )


@pytest.mark.parametrize("world", [1, 2])
def test_compat_generators_run_on_from_epoch_to_epoch(world):
    inner = torch.Generator().manual_seed(7)
    outer = torch.Generator() if world > 1 else inner
    plan = Plan("compat", np.abs(LENGTHS), None, LENGTHS, batch_size=2, world_size=world, accumulation=2, seed=7)
    for epoch in range(3):
        assert plan.for_epoch(epoch).order.tolist() == naive_modality(LENGTHS, 2, 2 * world, inner, outer)


# what a plan promises, over modes, sizes and ways to cut


def records(n: int, share_text: float = 0.3, seed: int = 0):
    "Tokens, image flags and signed words of `n` records."
    rng = np.random.default_rng(seed)
    image, tokens = rng.random(n) >= share_text, rng.integers(5, 400, n)
    words = np.maximum(1, tokens // 2)
    return tokens, image, np.where(image, words, -words)


MODES = ["random", "modality", "compat"]
SHAPES = [(500, 4, 2, 2), (61, 3, 2, 1), (64, 4, 4, 1), (7, 4, 2, 2), (1, 2, 2, 1), (256, 8, 1, 4), (33, 1, 3, 2)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n,batch,world,accumulation", SHAPES)
@pytest.mark.parametrize("share_text", [0, 0.3, 1])
def test_every_index_once(mode, n, batch, world, accumulation, share_text):
    plan = Plan(mode, *records(n, share_text), batch, world, accumulation)
    assert np.array_equal(np.sort(plan.order), np.arange(n))
    per_rank = [[] for _ in range(world)]
    for step in range(plan.steps):
        chunks = plan.micro_batches(step)
        assert len(chunks) == world * accumulation and max(map(len, chunks)) <= batch
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
        if len(plan.global_batch(step)) >= world:
            assert all(len(c) for c in chunks[:world])
        assert np.array_equal(np.concatenate(chunks), plan.global_batch(step))
        for j, c in enumerate(chunks):
            per_rank[j % world] += c.tolist()
    assert sum(map(len, per_rank)) == n and len(set().union(*per_rank)) == n


@pytest.mark.parametrize("mode", MODES)
def test_step_k_needs_no_walk(mode):
    inputs = records(500)
    walked = Plan(mode, *inputs, 4, 2, 2)
    steps = [walked.micro_batches(k) for k in range(walked.steps)]
    for k in random.Random(0).sample(range(walked.steps), 8):
        fresh = Plan(mode, *inputs, 4, 2, 2).micro_batches(k)
        assert all(np.array_equal(a, b) for a, b in zip(fresh, steps[k], strict=True))
    assert np.array_equal(Plan(mode, *inputs, 4, 2, 2).order, np.concatenate([c for s in steps for c in s]))


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_leaves_the_global_generators_alone(mode):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Plan(mode, *records(200), 4, 2).for_epoch(2).order
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(1)
    a = Plan(mode, *records(200), 4, 2).order
    torch.manual_seed(2)
    assert np.array_equal(a, Plan(mode, *records(200), 4, 2).order)
    torch.set_rng_state(before)


def test_what_is_handed_out_cannot_change_the_plan():
    plan = Plan("random", *records(64), 4, 2)
    first = plan.global_batch(0).tolist()
    plan.global_batch(0)[:] = -1
    assert plan.global_batch(0).tolist() == first


@pytest.mark.parametrize("n", [500, 512, 37])
def test_modality_steps_are_pure_and_balanced(n):
    tokens, image, words = records(n)
    plan = Plan("modality", tokens, image, words, 4, 2, 2)
    for k in range(plan.steps):
        assert len(set(image[plan.global_batch(k)].tolist())) == 1
        loads = [tokens[c].sum() for c in plan.micro_batches(k)]
        if len(plan.global_batch(k)) == plan.global_batch_size:
            assert max(loads) - min(loads) <= tokens[plan.global_batch(k)].max()
    full = [plan.global_batch_size] * plan.remainder.full_steps
    assert [len(plan.global_batch(k)) for k in range(plan.steps)] == full + list(plan.remainder.tail)


@pytest.mark.parametrize("mode", ["random", "modality"])
def test_global_batches_do_not_depend_on_the_world_size(mode):
    "Same global batch, any cut: the same chunks when the batch size stays, the same records when it does not."
    plans = [Plan(mode, *records(500), b, w, a) for b, w, a in ((4, 2, 1), (4, 1, 2), (8, 1, 1), (2, 4, 1), (1, 2, 4))]
    assert np.array_equal(plans[0].order, plans[1].order)
    for k in range(plans[0].steps):
        assert len({tuple(sorted(p.global_batch(k).tolist())) for p in plans}) == 1


def test_compat_ties_the_megabatch_order_to_the_number_of_processes_only():
    "Several ranks: the same order however many; one rank: the reference's other generator."
    a, b, one = (Plan("compat", *records(500), 4, w, g).order for w, g in ((4, 1), (2, 2), (1, 4)))
    assert np.array_equal(a, b) and not np.array_equal(a, one)


@pytest.mark.parametrize("mode", MODES)
def test_seed_and_epoch_change_the_order(mode):
    order = lambda seed, epoch: tuple(Plan(mode, *records(500), 4, 2, seed=seed).for_epoch(epoch).order)
    assert len({order(s, e) for s in range(3) for e in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_compat_keeps_the_reference_s_mixed_end():
    tokens, image, words = records(500)
    plan = Plan("compat", tokens, image, words, 4, 2, 2)
    rest = np.concatenate([plan.global_batch(k) for k in range(plan.remainder.full_steps, plan.steps)])
    assert np.array_equal(rest, np.sort(rest)) and 2 <= len(rest) <= 2 * plan.global_batch_size
    assert (plan.remainder.image, plan.remainder.text) == (image[rest].sum(), (~image[rest]).sum())
    for k in range(plan.remainder.full_steps):
        assert len(set(image[plan.global_batch(k)].tolist())) == 1


def test_remainders():
    t = np.full(10, 5)
    assert Plan("modality", t, np.arange(10) < 7, None, 4, 4).remainder == Remainder(0, (7, 3), 7, 3)
    assert Plan("modality", t, np.arange(10) < 8, None, 4, 2).remainder == Remainder(1, (2,), 0, 2)
    assert Plan("modality", np.full(16, 5), np.arange(16) < 8, None, 4, 2).remainder == Remainder(2, (), 0, 0)
    assert Plan("random", t, None, None, 4, 2).remainder == Remainder(1, (2,), 2, 0)
    signed = np.where(np.arange(16) < 8, 5, -5)
    assert Plan("compat", np.full(16, 5), None, signed, 4, 2).remainder == Remainder(
        0, (8, 8), 8, 8
    )  # full, and taken out all the same


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(mode="length"), "unknown sampler mode 'length'.*modality, random, compat"),
        (dict(has_image=None), "needs has_image"),
        (dict(mode="compat", word_lengths=None), "needs word_lengths"),
        (dict(lengths=[3, 0, 5]), r"lengths\[1\] is 0 \(1 of 3"),
        (dict(lengths=[3, 4, -5]), r"lengths\[2\] is -5"),
        (dict(mode="compat", word_lengths=[3, -4, 0]), r"word_lengths\[2\] is 0"),
        (dict(lengths=[], has_image=[], word_lengths=[]), "no records"),
        (dict(has_image=[True]), "has_image has 1 values, lengths has 3"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(world_size=-1), "world_size=-1"),
        (dict(seed=-1), "seed=-1"),
        (dict(epoch=-1), "epoch=-1"),
    ],
)
def test_wrong_input_is_named(change, message):
    inputs = dict(mode="modality", lengths=[3, 4, 5], has_image=[True, True, False], word_lengths=[3, 4, -5])
    with pytest.raises(ValueError, match=message):
        Plan(**inputs | change)


def test_zero_words_are_refused_by_the_reference_function_and_ignored_where_unused():
    with pytest.raises(ValueError, match=r"lengths\[2\] is 0"):
        get_modality_length_grouped_indices([5, -3, 0], 1, 2)
    assert Plan("modality", [3, 4], [True, True], [0, 4]).steps == 1


@pytest.mark.parametrize("step", [-1, 4])
def test_a_step_out_of_range_is_named(step):
    with pytest.raises(IndexError, match=f"step {step}: this epoch has steps 0 to 3"):
        Plan("random", *records(64), 4, 4).global_batch(step)


def test_waste_on_the_sample():
    "Packed rows have no padding, and a balanced plan hardly waits; the order of the four is the published one."
    d = mix665k_sample()
    tokens, image = d["tokens"], d["image"]
    words = np.where(image, d["words"], -d["words"])
    chunks = {m: cut(Plan(m, tokens, image, words, 16, 8).order, 16, 8) for m in MODES}
    pad, wait = {m: waste(c, tokens, 8) for m, c in chunks.items()}, waste(chunks["modality"], tokens, 8, packed=True)
    assert pad["compat"][0] < pad["random"][0] and pad["compat"][1] < pad["random"][1]
    assert wait[0] == 0 and wait[1] < 0.01
    assert waste([np.array([0, 1]), np.array([], int)], np.array([3, 1]), 2) == (1 - 4 / 6, 1 - 4 / 12)


def test_a_large_epoch_is_planned_quickly():
    "665,298 records; the limit is far above what bench/plan.py measures."
    import time

    d = mix665k_sample()
    tokens, image = np.resize(d["tokens"], 665_298), np.resize(d["image"], 665_298)
    start = time.process_time()
    assert len(Plan("modality", tokens, image, None, 16, 8).order) == 665_298
    assert time.process_time() - start < 2
