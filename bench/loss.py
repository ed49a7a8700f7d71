"""The loss of learned tokens from their hidden states, forward and backward, by every kernel that this machine has: time and peak memory.

    python bench/loss.py                                      a head of 32,000 x 4,096 in bf16 on a GPU, of 49,152 x 576 in float32 on a CPU
    python bench/loss.py --positions 16384 --rows 152064      a longer row, a larger vocabulary

    chunked      this kit's
    liger        liger-kernel's, `loss_kernel=liger`, where it is installed and there is a GPU
    torch        torch.nn.functional.linear_cross_entropy, in chunks of its choice; it knows no weight per token, so it cannot train a reference step
    all logits   logits of all positions, then cross-entropy

All tokens weigh the same here. Each kernel has a process of its own in each of the rounds, which go there and back; medians are of all repetitions.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from plan import cpu_name

from llava_nb.fast.cross_entropy import check_loss_kernel, linear_cross_entropy, text_logits, weighted_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def loss_by(kernel: str, hidden, head, targets, weights) -> torch.Tensor:
    "The mean cross-entropy."
    rows = len(head)
    if kernel == "all logits":
        return weighted_cross_entropy(text_logits(hidden @ head.T, rows, rows), targets, weights)
    if kernel == "torch":
        return F.linear_cross_entropy(hidden, head, targets, options=torch.nn.LinearCrossEntropyOptions())
    return linear_cross_entropy(hidden, head, None, targets, weights, rows, rows, kernel)


def peak() -> int:  # bytes so far
    return torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(kernel: str, args) -> dict:
    "In a process of its own: seconds of each repetition, bytes beyond hidden states and head, the loss."
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, head = (
        torch.randn(n, args.width, generator=generator, device=DEVICE, dtype=DTYPE).mul_(0.1).requires_grad_()
        for n in (args.positions, args.rows)
    )
    targets, weights = (
        torch.randint(0, args.rows, (args.positions,), generator=generator, device=DEVICE),
        torch.full((args.positions,), 1 / args.positions, device=DEVICE),
    )
    before, seconds = peak(), []
    for _ in range(args.repeats + 1):
        hidden.grad = head.grad = None
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = loss_by(kernel, hidden, head, targets, weights)
        loss.backward()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "bytes": peak() - before, "loss": float(loss.detach())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192 if CUDA else 2048, help="learned tokens")
    parser.add_argument("--rows", type=int, default=32_000 if CUDA else 49_152, help="of the vocabulary")
    parser.add_argument("--width", type=int, default=4096 if CUDA else 576, help="of a hidden state")
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kernel", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kernel:
        print(json.dumps(measure(args.kernel, args)))
        return
    liger = check_loss_kernel("liger", DEVICE, DTYPE)
    kernels = [
        "chunked",
        *([] if liger else ["liger"]),
        *(["torch"] if hasattr(F, "linear_cross_entropy") else []),
        "all logits",
    ]
    found = {k: [] for k in kernels}
    for turn in range(args.rounds):
        for k in kernels[:: -1 if turn % 2 else 1]:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--kernel", k], capture_output=True, text=True, env=os.environ
            )
            if done.returncode:
                raise SystemExit(f"{k}: {done.stderr[-2000:]}")
            found[k].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {k: statistics.median(s for r in rs for s in r["seconds"]) for k, rs in found.items()}
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads of {cpu_name()}"
    print(
        f"{date.today():%d %B %Y}, {where}, torch {torch.__version__}, `{' '.join(['python bench/loss.py', *sys.argv[1:]])}`, {args.positions:,} positions, head {args.rows:,} x {args.width:,} in {str(DTYPE).removeprefix('torch.')}\n"
    )
    print(
        "| | forward and backward | of chunked | peak memory beside hidden states and head | losses apart |\n|---|---|---|---|---|"
    )
    for k, rs in found.items():
        print(
            f"| {k} | {seconds[k] * 1e3:,.1f} ms | {seconds[k] / seconds['chunked']:.2f} | {max(r['bytes'] for r in rs) / 1e6:,.0f} MB | {abs(rs[0]['loss'] - found['chunked'][0]['loss']):.1e} |"
        )
    if liger:
        print(f"\nliger: {liger}")


if __name__ == "__main__":
    main()
