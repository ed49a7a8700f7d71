"""Time the plan of one epoch of llava_v1_5_mix665k: 665,298 records, 8 ranks x 16, one core.

    python bench/plan.py                  print the table
    python bench/plan.py --records 10000000   the same lengths, drawn again until there are so many
    python bench/plan.py --rows 1         packed rows a step that max_tokens asks for, step by step and one number for all
    python bench/plan.py --sample PATH    draw the 8,192 lengths that ship in llava_nb/data/mix665k_sample.npz

The numbers of records per source are the published ones. No length histogram is published, so the
lengths are modelled: every record of a source draws its turns and its tokens from gamma
distributions around the source's style, text-only ShareGPT from a log-normal one.
"""

import argparse
import platform
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch

from llava_nb.fast.meter import RowCost
from llava_nb.packing import RowBalancer, balance_rows, rows_of_step
from llava_nb.sampler import Plan, cut, waste

COST = RowCost(attention=2.0e-5, image=9)  # LLaVA-1.5-7B, see nbs/fast/07_meter.ipynb

SYSTEM, ROLES, IMAGE = 35, 9, 575  # system prompt; role words and EOS a turn; 576 features for one marker
MAX_LENGTH = 2048


class Source(NamedTuple):
    name: str
    records: int
    turns: float  # mean question-answer pairs a record
    turns_cv: float  # their coefficient of variation
    tokens: float  # mean tokens a pair
    tokens_cv: float
    prompt: int  # tokens of the fixed answer-format prompt
    per_word: float  # tokens a whitespace word: boxes are digits, prose is words
    learned: float  # share of the text that an answer holds


SOURCES = [
    Source("vqav2", 82_783, 5.35, 0.25, 10, 0.35, 12, 1.3, 0.20),
    Source("gqa", 72_140, 13.1, 0.35, 13, 0.20, 12, 1.3, 0.15),
    Source("okvqa", 8_998, 1, 0, 12, 0.30, 12, 1.3, 0.20),
    Source("ocrvqa", 80_000, 5, 0, 15, 0.35, 12, 1.4, 0.50),
    Source("aokvqa", 66_160, 1, 0, 34, 0.30, 13, 1.4, 0.03),
    Source("textcaps", 21_953, 1, 0, 60, 0.60, 15, 1.6, 0.25),
    Source("refcoco", 48_447, 6.5, 0.40, 38, 0.15, 0, 3.0, 0.20),
    Source("vg", 86_417, 9.5, 0.20, 41, 0.12, 0, 3.0, 0.50),
    Source("llava_conversation", 57_600, 4.2, 0.30, 62, 0.30, 1, 1.3, 0.75),
    Source("llava_detail", 23_240, 1, 0, 145, 0.30, 12, 1.3, 0.90),
    Source("llava_reasoning", 76_872, 1, 0, 190, 0.30, 1, 1.3, 0.87),
]
SHAREGPT = 40_688


def gamma(rng, mean, cv: float, size: int) -> np.ndarray:
    "`size` gamma draws of the given mean and coefficient of variation."
    return rng.gamma(cv**-2, mean * cv**2, size) if cv else np.full(size, float(mean))


def draw_source(rng, s: Source) -> dict[str, np.ndarray]:
    "Unrounded lengths of one picture source."
    turns = np.maximum(1, np.round(gamma(rng, s.turns, s.turns_cv, s.records)))
    text = s.tokens * turns * gamma(rng, 1.0, s.tokens_cv / 2, s.records)
    return dict(
        tokens=SYSTEM + s.prompt + text + ROLES * turns + IMAGE,
        words=(s.prompt + text) / s.per_word,
        supervised=text * s.learned + turns,
    )


def draw_text(rng) -> dict[str, np.ndarray]:
    "Unrounded lengths of the text-only source, ShareGPT."
    tokens = np.clip(rng.lognormal(np.log(1150), 0.75, SHAREGPT), 40, MAX_LENGTH)
    return dict(tokens=tokens, words=tokens / 1.35, supervised=tokens * 0.75)


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    "The whole mixture, shuffled: `tokens`, `words`, `supervised` int64, `image` bool, `source` int8."
    rng = np.random.default_rng(seed)
    parts = [draw_source(rng, s) for s in SOURCES] + [draw_text(rng)]
    source = np.repeat(np.arange(len(parts), dtype=np.int8), [len(p["tokens"]) for p in parts])
    order = rng.permutation(len(source))
    d = {k: np.round(np.concatenate([p[k] for p in parts])[order]) for k in parts[0]}
    d["tokens"] = np.minimum(d["tokens"], MAX_LENGTH)
    d["words"] = np.maximum(d["words"], 1)
    d["supervised"] = np.clip(d["supervised"], 2, d["tokens"] - 1)
    return {k: v.astype(np.int64) for k, v in d.items()} | dict(
        image=source[order] < len(SOURCES), source=source[order]
    )


def write_sample(path: str, n: int = 8192, seed: int = 0) -> None:
    "Save the first `n` records of the shuffled mixture in small integers."
    d = {k: v[:n] for k, v in draw(seed).items()}
    small = {k: v.astype(np.int16) if v.dtype == np.int64 else v for k, v in d.items()}
    note = (
        f"The first {n} of the 665,298 modelled record lengths of llava_v1_5_mix665k, shuffled with seed {seed}, "
        "as bench/plan.py draws them: python bench/plan.py --sample PATH. Counts a source are published, lengths are modelled."
    )
    np.savez_compressed(path, **small, sources=[s.name for s in SOURCES] + ["sharegpt"], note=note)


def median_time(f, repeats: int) -> float:
    "Median seconds of `f()`."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def dealt(plan: Plan, d: dict[str, np.ndarray], steps: int, ranks: int = 8) -> tuple[float, float]:
    "Share of the modelled cost that ranks wait when `steps` steps are dealt by cost, and seconds to deal one."
    costs, done, waited, seconds = COST.of(d["tokens"], d["image"]), 0.0, 0.0, []
    for k in np.linspace(0, plan.steps - 1, steps).astype(int):
        step = plan.global_batch(int(k))
        start = time.perf_counter()
        rows = balance_rows(costs[step], ranks)
        seconds.append(time.perf_counter() - start)
        full = [costs[step[row]].sum() for row in rows]
        done += sum(full)
        waited += ranks * max(full)
    return 1 - done / waited, statistics.median(seconds)


def rows_by_step(
    plan: Plan, d: dict[str, np.ndarray], max_tokens: int, every: int = 1
) -> tuple[float, float, int, float]:
    "Packed rows of a rank in a step and their mean tokens, chosen step by step; then the same number for all steps."
    dealer, steps = RowBalancer(COST.of(d["tokens"], d["image"])), range(0, plan.steps, every)
    counts, tokens = [], 0
    for k in steps:
        step = plan.global_batch(k)
        counts.append(len(rows_of_step(step, d["tokens"], dealer, plan.world_size, 1, max_tokens)) // plan.world_size)
        tokens += int(d["tokens"][step].sum())
    per_rank = tokens / plan.world_size
    return sum(counts) / len(counts), per_rank / sum(counts), max(counts), per_rank / (max(counts) * len(counts))


def print_rows(d: dict[str, np.ndarray], every: int) -> None:
    "The table of `--rows`."
    print(
        f"{len(d['tokens']):,} records, 128 a step, every {every}th step; packed rows of a rank in a step, and their mean tokens"
    )
    print(f"{'ranks':>5}{'max_tokens':>12}{'step by step':>22}{'one number for all':>24}{'forward passes':>16}")
    for ranks in (1, 8):
        plan = Plan("modality", d["tokens"], d["image"], batch_size=16, world_size=ranks, accumulation=8 // ranks)
        for limit in (4096, 8192, 16384):
            rows, length, most, before = rows_by_step(plan, d, limit, every)
            print(
                f"{ranks:>5}{limit:>12,}{rows:>10.2f} of {length:>8,.0f}{most:>12} of {before:>8,.0f}{most / rows:>14.2f} x"
            )


def cpu_name() -> str:
    "The processor's name where the system tells it."
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                (line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sample", metavar="PATH", help="write the small sample to PATH and stop")
    p.add_argument("--records", type=int, default=665_298)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument(
        "--rows",
        type=int,
        metavar="EVERY",
        help="packed rows that max_tokens asks for, over every EVERYth step, and stop",
    )
    args = p.parse_args()
    if args.sample:
        return write_sample(args.sample)
    torch.set_num_threads(1)
    d = draw()
    d = {k: np.resize(v, args.records) for k, v in d.items()}
    if args.rows:
        return print_rows(d, args.rows)
    signed = np.where(d["image"], d["words"], -d["words"])
    print(
        f"{len(signed):,} records, {d['tokens'].sum() / 1e6:.0f}M tokens, 8 ranks x 16, one thread, median of {args.repeats}"
    )
    print(f"{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}\n")
    print(
        f"{'mode':<10}{'steps':>7}{'one step':>12}{'whole epoch':>14}{'padding':>10}{'+ waiting':>11}{'packed + waiting':>18}{'dealt':>8}{'deal a step':>13}"
    )
    for mode in ("random", "compat", "modality"):

        def plan():
            return Plan(mode, d["tokens"], d["image"], signed, batch_size=16, world_size=8)

        jump = median_time(lambda: plan().micro_batches(3000), args.repeats)
        epoch = median_time(lambda: plan().order, args.repeats)
        chunks = cut(plan().order, 16, 8)
        pad, wait = waste(chunks, d["tokens"], 8)
        packed = waste(chunks, d["tokens"], 8, packed=True)[1]
        print(
            f"{mode:<10}{plan().steps:>7}{jump:>10.3f} s{epoch:>12.3f} s{pad:>10.1%}{wait:>11.1%}{packed:>18.1%}"
            + "{:>8.2%}{:>10.2f} ms".format(*(lambda w, s: (w, 1000 * s))(*dealt(plan(), d, 500)))
        )
    print(
        "\none step: a new plan asked for the micro-batches of step 3000.  whole epoch: a new plan asked for every index in order.\ndealt: ranks' waiting when a step's records go to eight rows by cost, on 500 steps; deal a step: the time that takes."
    )


if __name__ == "__main__":
    main()
