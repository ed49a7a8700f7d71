"""Real tokens a second and peak memory of training steps: this kit, the same kit padded, stock transformers, and LLaVA's own code.

    python bench/step.py                # some minutes on two cores
    python bench/step.py --reference    # LLaVA's code too, in an environment that it makes in bench/.venv (or --reference FOLDER)
    python bench/step.py --steps 10     # closer to an epoch's mean
    python bench/step.py --precision bf16       # or float32; without this, the faster of the two on this machine

All train on the same records: the micro-batches of 16 that LLaVA's grouping draws from the modelled mixture, lengths divided
by 8, with a language model of SmolLM2-135M's shape (random weights), a small CLIP and AdamW, in float32 or with bf16 autocast.

    ours        one packed row, attention per record, loss in chunks at learned positions
    padded      the same code on the padded batch, as the reference lays it out: all logits, then the learned ones
    stock       transformers' own forward with `labels` on the padded batch (its SDPA, its loss); not its Trainer or length grouping
    reference   LLaVA's own model (`llava-torch` from PyPI, transformers 4.37.2, its SDPA, this torch) with the same weights and records:
                its collation, its splice at -200, its loss; not its Trainer, no activation checkpointing, as for the others

Each runs in a process of its own, in turn, and the medians of all its steps are compared. The softmax of the last two counts the
`<image>` row, one in 49,152, which moves a loss by 2e-5. On a machine without a GPU, PIP_FLAGS="--extra-index-url
https://download.pytorch.org/whl/cpu" spares the new environment gigabytes of CUDA.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
VOCABULARY, VARIANTS, REFERENCE = 49_152, ("ours", "padded", "stock"), "reference"
# PyPI's metadata names transformers 4.36.2 and torch 2.0.1; LLaVA's repository pins 4.37.2 for the same version. Torch is ours, so that only the code differs.
PACKAGES = ["transformers==4.37.2", "tokenizers==0.15.1", "accelerate==0.21.0", "numpy==1.26.4", "pillow"]
CODE = "llava-torch==1.2.2.post1"  # without its dependencies: gradio, bitsandbytes and the like are not trained with


def model_of_smollm2_shape(layers: int):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from llava_nb.llava import build_llava, freeze
    from llava_nb.masking import tiny_tokenizer

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    tower = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=126,
        patch_size=14,
    )
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
    plan = Plan(
        "modality", np.asarray(drawn["tokens"], np.int64), np.asarray(drawn["image"], bool), batch_size=16, world_size=8
    )
    features, out = model.config.image_seq_length, []
    generator = torch.Generator().manual_seed(step)
    for i in plan.micro_batches(step)[0]:
        n, learned, image = (
            int(drawn["tokens"][i]) // 8,
            max(1, int(drawn["supervised"][i]) // 8),
            bool(drawn["image"][i]),
        )
        ids = torch.randint(5, 2000, (max(n, features * image + learned + 1),), generator=generator)
        if image:
            ids[:features] = model.config.image_token_id
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - learned, ids, IGNORE_INDEX)
        out.append(
            {
                "input_ids": ids,
                "labels": labels,
                "pixel_values": torch.randn(3, 126, 126, generator=generator) if image else None,
            }
        )
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
    if variant == "padded":
        return padded_loss(model, batch, *rows), batch["input_ids"].numel()
    pictures = {"pixel_values": batch["pixel_values"][batch["picture_of"]]} if len(batch["picture_of"]) else {}
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
        **pictures,
    ).loss, batch["input_ids"].numel()


def write_reference(model, folder: Path, steps: int) -> None:
    """The model as a checkpoint that LLaVA's code reads, its tower as one of transformers 4, and the records of all steps."""
    import torch
    from safetensors.torch import save_file

    inner, text = model.model, model.config.text_config
    weights = {f"model.{k}": v for k, v in inner.language_model.state_dict().items()}
    weights |= {
        f"model.mm_projector.{k.replace('linear_1', '0').replace('linear_2', '2')}": v
        for k, v in inner.multi_modal_projector.state_dict().items()
    }
    tower = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in inner.vision_tower.state_dict().items()}
    config = text.to_dict() | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": text.rope_parameters["rope_theta"],
        "use_cache": False,
        "mm_vision_tower": str(folder / "tower"),
        "mm_hidden_size": inner.vision_tower.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "use_mm_proj": True,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_token_id": model.config.image_token_id,
    }
    for place, tensors, settings in (
        (folder / "model", weights, config),
        (folder / "tower", tower, inner.vision_tower.config.to_dict()),
    ):
        place.mkdir()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(settings))
    (folder / "tower" / "preprocessor_config.json").write_text(
        "{}"
    )  # LLaVA's tower asks for one; the pictures are tensors already
    torch.save([records(model, step) for step in range(steps + 1)], folder / "records.pt")


def read_reference(folder: Path):
    """LLaVA's own model as its `train.py` has it in stage 2 (the tower frozen), and the records."""
    import torch
    import transformers
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model, about = LlavaLlamaForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    model.get_vision_tower().load_model()
    if lacking := set(about["missing_keys"]) - {"lm_head.weight"}:
        raise ValueError(f"LLaVA's model lacks weights: {sorted(lacking)[:4]}")  # the head is the embedding
    print(
        f"llava-torch {version('llava-torch')}, transformers {transformers.__version__}, attention {model.config._attn_implementation}",
        file=sys.stderr,
    )
    return model.train(), torch.load(folder / "records.pt")


def reference_loss(model, samples: list[dict]):
    """The same for LLaVA's model: one -200 stands for a record's picture, a record without one brings zeros, as its dataset and collator have it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels, features = [], [], model.get_vision_tower().num_patches
    for s in samples:
        cut = features - 1 if s["pixel_values"] is not None else 0
        ids.append(s["input_ids"][cut:].masked_fill(s["input_ids"][cut:] == model.config.image_token_id, -200))
        labels.append(s["labels"][cut:])
    ids, labels = pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
    images = torch.stack(
        [torch.zeros(3, 126, 126) if s["pixel_values"] is None else s["pixel_values"] for s in samples]
    )
    out = model(input_ids=ids, attention_mask=ids.ne(0), labels=labels, images=images)
    return out.loss, out.logits.shape[0] * out.logits.shape[1]


def run(args) -> dict:
    """One warm-up and `steps` timed steps of forward, backward and AdamW."""
    import torch

    if args.variant == REFERENCE:
        model, drawn = read_reference(args.folder)
    else:
        model, drawn = model_of_smollm2_shape(args.layers), None
    if args.variant == "stock":
        model.set_attn_implementation({"text_config": "sdpa"})
    times, losses, real, positions = [], [], [], []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for step in range(args.steps + 1):
        samples = drawn[step] if drawn else records(model, step)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss, computed = reference_loss(model, samples) if drawn else loss_of(args.variant, model, samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not step:
            continue
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        positions.append(computed)
        real.append(sum(len(s["input_ids"]) for s in samples))
    return {
        "speeds": [n / t for n, t in zip(real, times)],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
        "padding": 1 - sum(real) / sum(positions),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def reference_python(folder: Path) -> Path | None:
    """The interpreter of LLaVA's environment, made when it is missing; None, and a line that says why, where it cannot be made."""
    python, torch = folder / "bin" / "python", f"torch=={version('torch').split('+')[0]}"

    def ready():
        return (
            python.exists()
            and not subprocess.run(
                [python, "-c", "from llava import LlavaLlamaForCausalLM"], capture_output=True
            ).returncode
        )

    if ready():
        return python
    pip = [python, "-m", "pip", "install", "-q", *shlex.split(os.environ.get("PIP_FLAGS", ""))]
    print(f"making LLaVA's environment in {folder}", file=sys.stderr)
    try:
        if sys.version_info >= (3, 13):
            raise OSError("transformers 4.37.2 needs Python 3.12 or older")
        for command in ([sys.executable, "-m", "venv", folder], [*pip, torch, *PACKAGES], [*pip, "--no-deps", CODE]):
            subprocess.run(command, capture_output=True, text=True, check=True)
        if not ready():
            raise OSError(f"{CODE} is there and cannot be imported")
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return print(
            f"without the reference: its environment cannot be made in {folder}: {next((line for line in lines if line.startswith('ERROR')), lines[-1])}"
        )
    return python


def measured(variant: str, python: Path | str, folder: Path) -> dict:
    """One run of one variant in a process of its own, with the options of this one."""
    out = subprocess.run(
        [python, __file__, *sys.argv[1:], "--variant", variant, "--folder", folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def report(found: dict[str, list[dict]], args) -> None:
    """The table."""
    speed = {v: statistics.median(s for r in rs for s in r["speeds"]) for v, rs in found.items()}
    memory = {v: statistics.median(r["peak_mb"] for r in rs) for v, rs in found.items()}
    print(
        f"{platform.machine()}, {platform.system()}, {args.precision}, {args.repeat} runs of {args.steps} steps each; "
        + "; ".join(sorted({f"torch {r['torch']}, {r['threads']} threads" for rs in found.values() for r in rs}))
    )
    print(
        f"{'':10}{'real tokens/s':>15}{'ours faster':>13}{'peak memory':>14}{'of ours':>9}{'padding':>9}{'losses apart':>14}"
    )
    for v in found:
        apart = max(abs(a - b) for a, b in zip(found[v][0]["losses"], found["ours"][0]["losses"]))
        print(
            f"{v:10}{speed[v]:>15,.0f}{speed['ours'] / speed[v]:>12.2f}x{memory[v]:>11,.0f} MB{memory[v] / memory['ours']:>8.2f}x{found[v][0]['padding']:>9.1%}{apart:>14.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="?",
        const=Path(__file__).parent / ".venv",
        metavar="FOLDER",
        help="LLaVA's own code too, in this environment",
    )
    parser.add_argument(
        "--precision", choices=("bf16", "float32"), help="bf16: autocast; float32: losses agree to its rounding"
    )
    parser.add_argument("--variant", choices=(*VARIANTS, REFERENCE, "write"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant == "write":
        return print(json.dumps(write_reference(model_of_smollm2_shape(args.layers), args.folder, args.steps)))
    if args.variant:
        return print(json.dumps(run(args)))
    if not args.precision:
        from llava_nb.fast.meter import bf16_is_faster

        args.precision = "bf16" if bf16_is_faster("cpu") else "float32"
        sys.argv += ["--precision", args.precision]
    pythons = dict.fromkeys(VARIANTS, sys.executable)
    if args.reference and (python := reference_python(args.reference.absolute())):
        pythons[REFERENCE] = python
    with tempfile.TemporaryDirectory() as folder:
        if REFERENCE in pythons:
            measured("write", sys.executable, folder)
        runs = [{v: measured(v, python, folder) for v, python in pythons.items()} for _ in range(args.repeat)]
    report({v: [r[v] for r in runs] for v in pythons}, args)


if __name__ == "__main__":
    main()
