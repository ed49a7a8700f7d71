"""What a checkpoint costs: writing it, making it durable, hashing it, and looking at it again before a run goes on.

    python bench/seal.py                    SmolLM2-135M's shape, 2.2 GB
    python bench/seal.py --layers 2         a smaller one

One process, float32 weights, their master copy and AdamW's two moments, through the functions that a run uses. Hashing is timed by sealing
again, when everything is on the disk already; what the first seal takes beyond that is the disk's.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before transformers asks

import argparse
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from plan import cpu_name
from transformers import LlamaConfig, LlamaForCausalLM

from llava_nb.safe.integrity import MANIFEST, commit_checkpoint, verify_checkpoint
from llava_nb.safe.state import Training, save_state


def training(layers: int) -> Training:
    "A model and an optimizer that has made a step."
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0))


def timed(what) -> float:  # seconds
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def once(t: Training, folder: Path) -> dict[str, float]:  # seconds, and the bytes
    "Save, seal, seal again, look."

    def save():
        t.model.save_pretrained(folder)
        save_state(folder, t, 1)

    found = {"written": timed(save), "durable and hashed": timed(lambda: commit_checkpoint(folder))}
    (folder / MANIFEST).unlink()
    found["hashed"] = timed(lambda: commit_checkpoint(folder))
    found["looked at"] = timed(lambda: verify_checkpoint(folder))
    found["bytes"] = sum(p.stat().st_size for p in folder.iterdir())
    shutil.rmtree(folder)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be timed; by default a temporary one")
    given = parser.parse_args()
    t = training(given.layers)
    with tempfile.TemporaryDirectory(dir=given.folder) as here:
        runs = [once(t, Path(here) / f"checkpoint-{k}") for k in range(given.repeats)]
    m = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
    whole, rate = m["written"] + m["durable and hashed"], m["bytes"] / m["hashed"] / 1e9
    print(
        f"{date.today()}, {cpu_name()}, torch {torch.__version__}; a checkpoint of {m['bytes'] / 1e9:.2f} GB, median of {given.repeats}\n"
    )
    print("| | seconds | of the save |\n|---|---|---|")
    for name, seconds in (
        ("written", m["written"]),
        ("made durable", m["durable and hashed"] - m["hashed"]),
        ("hashed, the seal", m["hashed"]),
        ("**a sealed save**", whole),
    ):
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} |")
    print(
        f"| looked at when a run goes on | {m['looked at']:.2f} | |\n\nHashing: {rate:.2f} GB/s, so 12.3 GB, a rank's part of eight at 7B, in {12.3 / rate:.1f} s."
    )


if __name__ == "__main__":
    main()
