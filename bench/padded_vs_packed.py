"""Time and peak memory of one training step, padded as the reference batches it and packed as this kit does.

    python bench/padded_vs_packed.py            # about four minutes on two cores

The same 16 records of one reference micro-batch, lengths of the modelled LLaVA mixture divided by 8, a language model of
SmolLM2-135M's shape with random weights and a small CLIP; each layout in a process of its own, interleaved, medians.
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
VOCABULARY = 49_152


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


def run(layout: str, steps: int) -> dict:
    """One warm-up and `steps` timed steps of forward and backward; prints JSON."""
    from llava_nb.objective import padded_loss, row_loss
    from llava_nb.packing import collate_packed, collate_padded
    collate, loss_of = {"padded": (collate_padded, padded_loss), "packed": (collate_packed, row_loss)}[layout]
    model, times, losses, positions = model_of_smollm2_shape(), [], [], 0
    for step in range(steps + 1):
        batch = collate(records(model, step), image_shape=(3, 126, 126))
        start = time.perf_counter()
        loss = loss_of(model, batch, model.config.llava_nb["text_vocab_size"], model.config.image_token_id)
        loss.backward(); model.zero_grad()
        if step: times.append(time.perf_counter() - start); losses.append(float(loss.detach())); positions += batch["input_ids"].numel()
    return {"seconds": statistics.median(times), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "losses": losses, "positions": positions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=("padded", "packed")); parser.add_argument("--steps", type=int, default=3); parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    if args.layout: return print(json.dumps(run(args.layout, args.steps)))
    results = {"padded": [], "packed": []}
    for _ in range(args.repeat):
        for layout, found in results.items():
            out = subprocess.run([sys.executable, __file__, "--layout", layout, "--steps", str(args.steps)], capture_output=True, text=True, check=True)
            found.append(json.loads(out.stdout.splitlines()[-1]))
    median = {layout: {k: statistics.median(r[k] for r in rs) for k in ("seconds", "peak_mb", "positions")} for layout, rs in results.items()}
    apart = max(abs(a - b) for a, b in zip(results["padded"][0]["losses"], results["packed"][0]["losses"]))
    print(f"{platform.processor() or platform.machine()}, {platform.system()}; losses apart by {apart:.1e}")
    print(f"{'':10}{'step':>10}{'peak memory':>15}{'positions':>12}")
    for layout, m in median.items(): print(f"{layout:10}{m['seconds']:>9.2f}s{m['peak_mb']:>12.0f} MB{m['positions']:>12}")
    print(f"{'ratio':10}" + "".join(f"{median['padded'][k] / median['packed'][k]:>{w}.2f}x" for k, w in (("seconds", 9), ("peak_mb", 14), ("positions", 11))))


if __name__ == "__main__":
    main()
