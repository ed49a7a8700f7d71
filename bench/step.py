"""Real tokens a second and peak memory of training steps: this kit, the same kit padded, and stock transformers.

    python bench/step.py                # some minutes on two cores
    python bench/step.py --steps 10     # closer to an epoch's mean

All train on the same records: the micro-batches of 16 that LLaVA's grouping draws from the modelled mixture, lengths divided
by 8, with a language model of SmolLM2-135M's shape (random weights), a small CLIP, bf16 autocast and AdamW.

    ours     one packed row, attention per record, loss in chunks at learned positions
    padded   the same code on the padded batch, as the reference lays it out: all logits, then the learned ones
    stock    transformers' own forward with `labels` on the padded batch (its SDPA, its loss); not its Trainer or length grouping

Each runs in a process of its own, in turn, and the medians of all its steps are compared.
"""
import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
VOCABULARY, VARIANTS = 49_152, ("ours", "padded", "stock")


def model_of_smollm2_shape():
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from llava_nb.llava import build_llava, freeze
    from llava_nb.masking import tiny_tokenizer
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    tower = CLIPVisionConfig(hidden_size=192, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=126, patch_size=14)
    model = build_llava(AutoModelForCausalLM.from_config(text), AutoModel.from_config(tower), tiny_tokenizer())
    freeze(model, 2)
    return model.train()


def records(model, step: int) -> list[dict]:
    """The 16 records of one micro-batch of the plan over the modelled lengths, an eighth as long."""
    import numpy as np
    import torch

    from llava_nb.masking import IGNORE_INDEX
    from llava_nb.sampler import Plan, mix665k_sample
    drawn = mix665k_sample()
    plan = Plan("modality", np.asarray(drawn["tokens"], np.int64), np.asarray(drawn["image"], bool), batch_size=16, world_size=8)
    features, out = model.config.image_seq_length, []
    generator = torch.Generator().manual_seed(step)
    for i in plan.micro_batches(step)[0]:
        n, learned, image = int(drawn["tokens"][i]) // 8, max(1, int(drawn["supervised"][i]) // 8), bool(drawn["image"][i])
        ids = torch.randint(5, 2000, (max(n, features * image + learned + 1),), generator=generator)
        if image: ids[:features] = model.config.image_token_id
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - learned, ids, IGNORE_INDEX)
        out.append({"input_ids": ids, "labels": labels, "pixel_values": torch.zeros(3, 126, 126) if image else None})
    return out


def loss_of(variant: str, model, samples: list[dict]):
    """The loss of one micro-batch, and how many positions were computed for it."""
    from llava_nb.objective import padded_loss, row_loss
    from llava_nb.packing import collate_packed, collate_padded
    shape, rows = (3, 126, 126), (model.config.llava_nb["text_vocab_size"], model.config.image_token_id)
    if variant == "ours":
        row = collate_packed(samples, shape)
        return row_loss(model, row, *rows), row["input_ids"].numel()
    batch = collate_padded(samples, shape)
    if variant == "padded": return padded_loss(model, batch, *rows), batch["input_ids"].numel()
    pictures = {} if batch["blank"] else {"pixel_values": batch["pixel_values"]}
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False, **pictures).loss, batch["input_ids"].numel()


def run(variant: str, steps: int) -> dict:
    """One warm-up and `steps` timed steps of forward, backward and AdamW."""
    import torch
    model, times, losses, real, positions = model_of_smollm2_shape(), [], [], [], []
    if variant == "stock": model.set_attn_implementation({"text_config": "sdpa"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for step in range(steps + 1):
        samples = records(model, step)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16): loss, computed = loss_of(variant, model, samples)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        if not step: continue
        times.append(time.perf_counter() - start); losses.append(float(loss.detach())); positions.append(computed)
        real.append(sum(len(s["input_ids"]) for s in samples))
    return {"speeds": [n / t for n, t in zip(real, times)], "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "losses": losses, "padding": 1 - sum(real) / sum(positions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS); parser.add_argument("--steps", type=int, default=3); parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    if args.variant: return print(json.dumps(run(args.variant, args.steps)))
    found = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeat):
        for variant, results in found.items():
            out = subprocess.run([sys.executable, __file__, "--variant", variant, "--steps", str(args.steps)], capture_output=True, text=True, check=True)
            results.append(json.loads(out.stdout.splitlines()[-1]))
    speed = {v: statistics.median(s for r in rs for s in r["speeds"]) for v, rs in found.items()}
    memory = {v: statistics.median(r["peak_mb"] for r in rs) for v, rs in found.items()}
    print(f"{platform.machine()}, {platform.system()}, {args.repeat} runs of {args.steps} steps each")
    print(f"{'':10}{'real tokens/s':>15}{'ours faster':>13}{'peak memory':>14}{'padding':>9}{'losses apart':>14}")
    for v in VARIANTS:
        apart = max(abs(a - b) for a, b in zip(found[v][0]["losses"], found["ours"][0]["losses"]))
        print(f"{v:10}{speed[v]:>15,.0f}{speed['ours'] / speed[v]:>12.2f}x{memory[v]:>11,.0f} MB{found[v][0]['padding']:>9.1%}{apart:>14.1e}")


if __name__ == "__main__":
    main()
