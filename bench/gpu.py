"""A full fine-tune of LLaVA-1.5's shapes on one GPU: this kit, the same kit padded, and stock transformers.

    python bench/gpu.py                           7B where 16 bytes a parameter fit, else 1B; without a GPU a toy
    python bench/gpu.py --shape 1b --steps 40
    python bench/gpu.py --recompute full cheap    this kit's row once for each; the others take the first
    python bench/gpu.py --variants ours --loss-kernel liger     the loss by liger-kernel; bench/loss.py times it alone

Sought on an H200: padded takes 1.7 times as long, 55 % strict MFU on 7B and 40 % on 1B by the datasheet's rate, no
waiting for data.

Steps of 16 records of one modality, of all the sizes that an epoch has: random ids in the modelled lengths of
llava_v1_5_mix665k, a picture decoded and resized anew for every record that has one. Random weights; bf16 weights and
gradients with AdamW on float32 copies, 16 bytes a parameter (float32 throughout on a CPU). The learning rate is 0:
AdamW's work is done in full and the weights stay, so that all variants see the same ones and their losses can be
compared.

    ours     packed rows that the step's records are dealt to, attention per record, loss in chunks at learned positions
    padded   the same code on padded batches, as the reference lays them out; attention with a dense mask, by SDPA
    stock    transformers' own forward with `labels` on the padded batches: its SDPA, its loss; like the others without
             the tower's last layer

LLaVA's own script unpads for FlashAttention-2, so its attention skips padding and these two do not: at 7B attention is
under 2 % of the decoder's operations. This is the kit's model, rows and loss with an optimizer of this file, without
Trainer, DeepSpeed and tokenizer: `bench/h200.sh` has train.py's own meter beside it.

Each takes the fewest micro-steps with which no row or batch is larger than --max-tokens, padding included. `--rows
step` chooses them for every step by itself, as train.py does; `--rows run` takes the largest number for all steps.
Blocks of steps take turns on one model, the second round in reverse order; each has its share of --minutes; a block
first does its largest and its first step untimed.

Needs torch, transformers, numpy and Pillow of the kit's dependencies, no hub. A machine without a network takes what it
lacks as wheels: `python bench/wheels.py` elsewhere.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from device import Sampled  # noqa: I001
from PIL import Image
from plan import cpu_name
from step import VARIANTS  # which puts the repository on the path
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil

from llava_nb.fast.attention import BACKENDS, register_attention, use_attention
from llava_nb.fast.cross_entropy import LOSS_KERNELS, use_loss_kernel
from llava_nb.fast.meter import Meter, device_rates, row_cost, work_of
from llava_nb.fast.recompute import RECOMPUTE, set_recompute
from llava_nb.fast.zero import bytes_per_rank
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import freeze, llava_config, meta_llava, parts, prepare, shape_of
from llava_nb.masking import IGNORE_INDEX
from llava_nb.objective import padded_loss, row_loss
from llava_nb.optim import parameter_groups
from llava_nb.packing import RowBalancer, collate_packed, collate_padded, rows_of_step
from llava_nb.sampler import Plan, mix665k_sample

CUDA, DEVICE = torch.cuda.is_available(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARCHITECTURES = Path(__file__).resolve().parent.parent / "llava_nb" / "data" / "architectures"
BATCH, VOCABULARY, IMAGE_ID = (
    16,
    32_064,
    32_000,
)  # Vicuna's 32,000 rows, `<image>`, and rows up to a multiple of 64; all enter every variant's softmax

EVEN = [n for n in range(1, BATCH + 1) if BATCH % n == 0]


@dataclass(frozen=True)
class Shape:
    "How a size differs from LLaVA-1.5-7B."

    text: dict = field(default_factory=dict)
    tower: dict = field(default_factory=dict)
    shorter: int = 1  # lengths are divided by this
    recompute: str = "none"  # what the backward pass computes again
    max_tokens: int = 16_384  # of a row


SHAPES = {
    "toy": Shape(
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56),
        shorter=32,
        max_tokens=512,
    ),
    "1b": Shape(
        dict(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
    ),  # TinyLlama-1.1B
    "7b": Shape(recompute="cheap", max_tokens=8_192),
}


def configuration(shape: Shape):
    "The model's configuration, without a hub."
    read = lambda name, changes: AutoConfig.for_model(
        **json.loads((ARCHITECTURES / f"{name}.json").read_text()) | changes
    )  # noqa: E731
    return llava_config(
        read("vicuna-7b-v1.5", shape.text | {"vocab_size": VOCABULARY}),
        read("clip-vit-large-patch14-336", shape.tower),
        IMAGE_ID,
    )


def model_state(config) -> int:
    "Bytes of weights, gradients and optimizer state."
    size = {name: sum(p.numel() for p in ps) for name, ps in parts(meta_llava(config)).items()}
    return int(sum(bytes_per_rank(size["language model"] + size["projector"], size["vision tower"], 1, 0).values()))


def built(config, dtype: torch.dtype):
    "A model with random weights, made on the device, as stage 2 trains it."
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.config.llava_nb = {"text_vocab_size": VOCABULARY, "image_seq_len": config.image_seq_length}
    freeze(prepare(model), 2)
    return model.train()


class CopyAdamW:
    "AdamW on float32 copies of the weights, some parameters at a time: float32 gradients never exist all at once."

    def __init__(self, params: list, lr: float, at_a_time: int = 16):
        cut = [params[k : k + at_a_time] for k in range(0, len(params), at_a_time)]
        copies = [[p.detach().to(torch.float32, copy=True) for p in some] for some in cut]
        self.groups = [
            (some, own, torch.optim.AdamW(own, lr=lr, weight_decay=0.0, fused=True)) for some, own in zip(cut, copies)
        ]

    @torch.no_grad()
    def step(self) -> None:
        for params, copies, adamw in self.groups:
            for p, c in zip(params, copies):
                c.grad = None if p.grad is None else p.grad.float()
                p.grad = None
            adamw.step()
            adamw.zero_grad()
            for p, c in zip(params, copies):
                p.copy_(c)


def picture(folder: Path) -> Path:
    "A JPEG of 640 x 480, as large as most of the mixture's."
    coarse = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(coarse).resize((640, 480), Image.BICUBIC).save(folder / "picture.jpg", quality=90)
    return folder / "picture.jpg"


@dataclass
class Mixture:
    "Records of the mixture's lengths, and the plan of their steps."

    config: object  # of the model
    shorter: int  # lengths are divided by this
    picture: Path  # of every record that has one

    def __post_init__(self):
        drawn = mix665k_sample()
        self.has_image, self.learned = drawn["image"], np.maximum(drawn["supervised"] // self.shorter, 1)
        self.lengths = np.maximum(
            drawn["tokens"] // self.shorter, self.config.image_seq_length * self.has_image + self.learned + 1
        )
        self.plan, self.cut = Plan("modality", self.lengths, self.has_image, batch_size=BATCH), {}
        side = self.config.vision_config.image_size
        self.transform = ImageTransform(
            CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), "pad"
        )

    def spread(self, n: int) -> list[int]:
        "Full steps that stand for an epoch: sorted by tokens, one from the middle of each of `n` parts."
        steps = sorted(range(len(self.plan.drawn.body)), key=lambda k: self.work(k).tokens)
        return [steps[int((j + 0.5) / n * len(steps))] for j in range(n)]

    def padded(self, k: int, n: int) -> list[np.ndarray]:
        "Step k in n padded batches."
        if n not in self.cut:
            self.cut[n] = replace(self.plan, batch_size=BATCH // n, accumulation=n)
        return [c for c in self.cut[n].micro_batches(k) if len(c)]

    def fits(self, k: int, n: int, max_tokens: int) -> bool:
        return max(len(c) * self.lengths[c].max() for c in self.padded(k, n)) <= max_tokens

    def work(self, k: int):
        return work_of(
            self.plan.global_batch(k),
            self.lengths,
            self.learned,
            np.where(self.has_image, np.arange(len(self.lengths)), -1),
        )

    def record(self, i: int, weight: float) -> dict:
        ids = torch.randint(5, IMAGE_ID, (int(self.lengths[i]),), generator=torch.Generator().manual_seed(int(i)))
        if self.has_image[i]:
            ids[: self.config.image_seq_length] = IMAGE_ID
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - int(self.learned[i]), ids, IGNORE_INDEX)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": self.transform(self.picture) if self.has_image[i] else None,
            "weight": weight,
        }


class Steps(Dataset):
    "Item k: the micro-batches of step k, laid out as a variant takes them."

    def __init__(
        self,
        mixture: Mixture,
        variant: str,
        costs: np.ndarray,
        max_tokens: int,
        attention: str,
        recompute: str,
        by_step: bool,
    ):
        self.mixture, self.dealer, self.packed, self.attention = (
            mixture,
            RowBalancer(costs),
            variant == "ours",
            "sdpa" if variant == "stock" else attention,
        )
        self.variant, self.recompute, self.max_tokens = variant, recompute, max_tokens
        self.collate = partial(collate_packed if self.packed else collate_padded, image_shape=mixture.transform.shape)
        self.fixed = None if by_step else self.micro_steps()

    def micro_steps(self) -> int:  # of every step, so that the largest fits
        if self.packed:
            return max(len(self.cut(self.mixture.plan.global_batch(k))) for k in range(self.mixture.plan.steps))
        return next(
            n for n in EVEN if all(self.mixture.fits(k, n, self.max_tokens) for k in range(self.mixture.plan.steps))
        )

    def rows(self, k: int) -> list[np.ndarray]:
        if not self.packed:
            return padded_batches(self.mixture, k, self.max_tokens, self.fixed or 1)
        batch = self.mixture.plan.global_batch(k)
        return [batch[row] for row in self.cut(batch, self.fixed or 1) if len(row)]

    def cut(self, batch: np.ndarray, least: int = 1) -> list[np.ndarray]:
        "A step's packed rows as the Trainer cuts them on one rank."
        return rows_of_step(batch, self.mixture.lengths, self.dealer, 1, least, self.max_tokens)

    def positions(self, k: int) -> int:
        sizes = [self.mixture.lengths[row] for row in self.rows(k)]
        return int(sum(n.sum() if self.packed else len(n) * n.max() for n in sizes))

    def __getitem__(self, k: int) -> list[dict]:
        weight = 1 / self.mixture.work(k).supervised
        return [self.collate([self.mixture.record(i, weight) for i in row]) for row in self.rows(k)]


def padded_batches(mixture: Mixture, k: int, max_tokens: int, least: int = 1) -> list[np.ndarray]:
    "The same step in the fewest batches, `least` at least, none larger than `max_tokens`, padding included."
    for n in (n for n in EVEN if n >= least):
        if mixture.fits(k, n, max_tokens):
            return mixture.padded(k, n)
    raise ValueError(f"--max-tokens {max_tokens}: a record alone has {mixture.lengths.max()} tokens")


def loss_of(variant: str, model, batch: dict, learned: int) -> torch.Tensor:
    "A micro-batch's part of the loss of a step with so many learned tokens."
    rows, pictures = (VOCABULARY, IMAGE_ID), len(batch["picture_of"])
    if variant == "ours":
        return row_loss(model, batch | {"tower": pictures > 0}, *rows)
    if variant == "padded":
        return padded_loss(model, batch, *rows)
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")} | (
        {"pixel_values": batch["pixel_values"][batch["picture_of"]]} if pictures else {}
    )
    return model(**given, num_items_in_batch=learned, use_cache=False).loss


def placed(batch: dict, dtype: torch.dtype) -> dict:
    "On the device, pixels in the model's precision, as an engine hands them over."
    return {k: v.to(DEVICE, dtype if k == "pixel_values" else v.dtype, non_blocking=True) for k, v in batch.items()}


@dataclass
class Timed:
    "One step."

    seconds: float  # with waiting
    waited: float  # for data
    loss: float
    peak: int  # bytes


def block(
    model, optimizer: CopyAdamW, steps: Steps, order: list[int], workers: int, deadline: float
) -> dict[int, Timed]:
    "Train on these steps, two of them untimed before; ends early at the deadline."
    model.set_attn_implementation({"text_config": steps.attention})
    set_recompute(model, steps.recompute)
    warm, found = [max(order, key=steps.positions), order[0]], {}
    batches = iter(DataLoader(steps, batch_size=None, sampler=warm + order, num_workers=workers, pin_memory=CUDA))
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for n, k in enumerate(warm + order):
        begun = time.perf_counter()
        if begun > deadline:
            break
        rows, loss = next(batches), 0.0
        waited = time.perf_counter() - begun
        for row in rows:
            part = loss_of(steps.variant, model, placed(row, model.dtype), steps.mixture.work(k).supervised)
            part.backward()
            loss = loss + part.detach()
        optimizer.step()
        loss = float(loss)
        if CUDA:
            torch.cuda.synchronize()
        if n >= len(warm):
            found[k] = Timed(
                time.perf_counter() - begun, waited, loss, torch.cuda.max_memory_allocated() if CUDA else 0
            )
    return found


def rounds(
    model, steps: dict[str, Steps], order: list[int], workers: int, deadline: float
) -> tuple[dict[str, dict[int, Timed]], dict[str, dict]]:
    "Two rounds of blocks, half of the steps each; the device's readings. What runs out of memory is left out."
    optimizer, found, read = (
        CopyAdamW([p for g in parameter_groups(model, lr=0.0) for p in g["params"]], lr=0.0),
        {v: {} for v in steps},
        {},
    )
    turns = [
        (v, half)
        for names, half in zip((list(steps), list(steps)[::-1]), (order[::2], order[1::2]))
        if half
        for v in names
    ]
    for n, (v, half) in enumerate(turns):
        if v not in found:
            continue
        share = time.perf_counter() + (deadline - time.perf_counter()) / (len(turns) - n)
        try:
            with Sampled() as device:
                found[v] |= block(model, optimizer, steps[v], half, workers, share)
            read[v] = device.found
        except torch.OutOfMemoryError:
            print(f"{v}: out of memory; lower --max-tokens, or --recompute full")
            del found[v]
            model.zero_grad()
    return found, read


def profiled(model, steps: Steps, order: list[int], file: Path) -> list[dict]:
    "Two steps under torch's profiler: the whole to a file, what takes longest as rows."
    from torch.profiler import ProfilerActivity, profile

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    rows = [steps[k] for k in order[:2]]
    with profile(activities=kinds) as seen:
        for k, step in zip(order, rows):
            for row in step:
                loss_of(steps.variant, model, placed(row, model.dtype), steps.mixture.work(k).supervised).backward()
            optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
    seen.export_chrome_trace(str(file))
    own = "self_device_time_total" if CUDA else "self_cpu_time_total"
    longest = sorted(seen.key_averages(), key=lambda e: -getattr(e, own, 0))[:40]
    return [{"name": e.key[:120], "ms": getattr(e, own, 0) / 1e3, "calls": e.count} for e in longest]


def head_of(first: str, meter: Meter) -> list[str]:
    "What the columns of `row_of` are."
    rates = [f"strict MFU, {name}" for name in meter.rates]
    return [
        "",
        "real tokens/s",
        "quartiles",
        f"{first} is faster by",
        "over all steps",
        *rates,
        "waiting for data",
        "peak memory",
        "power",
        "SM clock",
        "padding",
        "micro-steps",
        "loss",
        "losses apart",
    ]


def row_of(v: str, columns: dict[str, dict], device: dict, steps: Steps, common: list[int], meter: Meter) -> list[str]:
    "A variant's row over some steps; the first variant is what it is compared with."
    own, first, work = columns[v], next(iter(columns.values())), [steps.mixture.work(k) for k in common]
    seconds, tokens = own["seconds"], np.array([w.tokens for w in work])
    used = [np.median([meter.read(w, s)[f"mfu_{name}"] for w, s in zip(work, seconds)]) for name in meter.rates]
    padding = 1 - tokens.sum() / sum(map(steps.positions, common))
    readings = {"power_w": "W", "sm_mhz": "MHz"}
    taken = [f"{device[name]:,.0f} {unit}" if name in device else "not taken" for name, unit in readings.items()]
    quartiles = "{:,.0f} to {:,.0f}".format(*np.quantile(tokens / seconds, (0.25, 0.75)))
    return [
        v,
        f"{np.median(tokens / seconds):,.0f}",
        quartiles,
        f"{np.median(seconds / first['seconds']):.2f}x",
        f"{seconds.sum() / first['seconds'].sum():.2f}x",
        *(f"{u:.2%}" for u in used),
        f"{own['waited'].sum() / seconds.sum():.1%}",
        f"{own['peak'].max() / 1e9:.1f} GB" if CUDA else "not taken",
        *taken,
        f"{padding:.1%}",
        f"{np.mean([len(steps.rows(k)) for k in common]):.1f}",
        f"{own['loss'].mean():.6f}",
        f"{abs(own['loss'] - first['loss']).max():.1e}",
    ]


def table(found: dict[str, dict[int, Timed]], read: dict[str, dict], steps: dict[str, Steps], meter: Meter) -> str:
    "Markdown, a row a variant, over the steps that all have done."
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    if not common:
        raise SystemExit("no step was done by all variants: give more --minutes, or lower --max-tokens")

    def column(done: dict[int, Timed], name: str):
        return np.array([getattr(done[k], name) for k in common])

    columns = {v: {f.name: column(done, f.name) for f in fields(Timed)} for v, done in found.items()}
    head = head_of(next(iter(found)), meter)
    lines = [head, ["---"] * len(head), *(row_of(v, columns, read.get(v, {}), steps[v], common, meter) for v in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def variants(args, shape: Shape) -> list[tuple[str, str, str]]:  # name of the row, variant, recompute
    how = args.recompute or [shape.recompute]
    return [
        row
        for v in args.variants
        for row in ([(v if len(how) == 1 else f"{v}, {h}", v, h) for h in how] if v == "ours" else [(v, v, how[0])])
    ]


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument(
        "--max-tokens",
        type=int,
        help="of a row, or of a padded batch with its padding; by default 16,384, of 7B 8,192, of the toy 512",
    )
    p.add_argument(
        "--rows", choices=("step", "run"), default="step", help="micro-steps chosen for each step, or once for all"
    )
    p.add_argument(
        "--recompute",
        nargs="+",
        choices=RECOMPUTE,
        help="what the backward pass computes again; by default cheap at 7B, else none",
    )
    p.add_argument("--attention", choices=("auto", *BACKENDS), default="auto", help="of packed rows")
    p.add_argument("--loss-kernel", choices=LOSS_KERNELS, default="chunked", help="of packed rows")
    p.add_argument("--workers", type=int, default=8 if CUDA else 0, help="that prepare data")
    p.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="after so many, stop and print what there is: a command of 10 has room to begin and to end",
    )
    p.add_argument("--json", type=Path, help="a file for every step's figures")
    p.add_argument("--trace", type=Path, help="a file (.json.gz) for two more steps under torch's profiler")
    return p


def fitting(p: argparse.ArgumentParser, wanted: str | None) -> str:  # a key of SHAPES
    "The shape that was asked for, or the largest that this GPU holds."
    room = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
    name = wanted or next((n for n in ("7b", "1b") if model_state(configuration(SHAPES[n])) < 0.9 * room), "toy")
    held = model_state(configuration(SHAPES[name]))
    if CUDA and held > 0.9 * room:
        p.error(f"{name} holds {held / 1e9:.0f} GB before any activation, this GPU {room / 1e9:.0f} GB in all")
    return name


def described(args, name: str, model, meter: Meter) -> list[str]:
    "What was measured, where and how."
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads of {cpu_name()}"
    size, dtype = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
    return [
        f"{date.today():%d %B %Y}",
        where,
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"`{' '.join(['python bench/gpu.py', *sys.argv[1:]])}`",
        f"{name} ({size / 1e6:,.1f}M parameters, {dtype})",
        f"loss {args.loss_kernel}",
        f"recompute {' and '.join(args.recompute or [SHAPES[name].recompute])}",
        f"at most {args.max_tokens or SHAPES[name].max_tokens:,} tokens a micro-step, chosen by {args.rows}",
        *(f"{n} {r / 1e12:,.2f} TFLOP/s" for n, r in meter.rates.items()),
    ]


def main() -> None:
    p, start = arguments(), time.perf_counter()
    args = p.parse_args()
    name = fitting(p, args.shape)
    shape, config, dtype = SHAPES[name], configuration(SHAPES[name]), torch.bfloat16 if CUDA else torch.float32
    rates, model = device_rates(DEVICE, dtype), built(config, dtype)
    backend, refused = use_attention(model, args.attention, DEVICE, dtype)
    use_loss_kernel(model, args.loss_kernel, DEVICE, dtype)
    meter, attention = Meter(shape_of(model), stage=2, ranks=1, rates=rates), register_attention(backend)
    with tempfile.TemporaryDirectory() as folder:
        mixture = Mixture(config, shape.shorter, picture(Path(folder)))
        costs = row_cost(meter.shape).of(mixture.lengths, mixture.has_image)
        own = costs, args.max_tokens or shape.max_tokens, attention
        steps = {row: Steps(mixture, v, *own, how, args.rows == "step") for row, v, how in variants(args, shape)}
        order = mixture.spread(args.steps)
        found, read = rounds(model, steps, order, args.workers, start + 60 * args.minutes)
        done, minutes = min(map(len, found.values()), default=0), (time.perf_counter() - start) / 60
        about = [*described(args, name, model, meter), f"attention {backend}"]
        about += [f"{done} steps of {BATCH} records", f"{minutes:.1f} min"]
        notes = [f"attention {b} was not taken: {why}" for b, why in refused.items()]
        told = {"about": about, "table": table(found, read, steps, meter), "notes": notes, "device": read}
        print(", ".join(about), told["table"], *notes, sep="\n\n", flush=True)
        told["steps"] = {v: {str(k): asdict(t) for k, t in done.items()} for v, done in found.items()}
        if args.json:
            args.json.write_text(json.dumps(told, indent=1))
        if args.trace:
            told["longest"] = profiled(model, next(iter(steps.values())), order, args.trace)
        if args.json:
            args.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
