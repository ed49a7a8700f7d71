"""The book alone: with store, safe, run, demo and the program absent it imports, trains a tiny model in both stages, saves it and talks to it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEHIND = ("store", "safe", "run", "demo", "train.py")

PROGRAM = """
import importlib, json, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration
import llava_nb
from llava_nb.chat import Chat
from llava_nb.conversation import get_template
from llava_nb.dataset import LlavaDataset
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import freeze, load_projector, tiny_llava
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.trainer import LlavaTrainer, LlavaTrainingArguments

here = Path(sys.argv[1])
assert Path(llava_nb.__file__).is_relative_to(here)
for module in (here / "llava_nb").glob("[a-z]*.py"):
    importlib.import_module(f"llava_nb.{module.stem}")
turn = lambda who, text: {"from": who, "value": text}
for name in ("red", "blue"): Image.new("RGB", (40, 30), name).save(here / f"{name}.png")
asked = [{"id": str(k), "image": f"{name}.png", "conversations": [turn("human", "<image>\\nColour?"), turn("gpt", f"{name}.")]}
         for k, name in enumerate(["red", "blue"] * 4)]
said = [{"id": f"t{k}", "conversations": [turn("human", "Say yes."), turn("gpt", "Yes.")]} for k in range(4)]
processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})

def trained(stage, template, records, projector=None):
    tokenizer = tiny_tokenizer()
    model = tiny_llava(tokenizer)
    if projector: load_projector(model, projector)
    freeze(model, stage)
    model.config.llava_nb |= {"template": template, "image_aspect_ratio": "pad"}
    encoder = Encoder(tokenizer, model.config.image_token_id, model.config.image_seq_length, max_length=256)
    data = LlavaDataset(records, get_template(template), encoder, ImageTransform(processor, "pad"), here)
    out = str(here / f"stage{stage}")
    args = LlavaTrainingArguments(output_dir=out, stage=stage, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=20 * stage, learning_rate=1e-2,
                                  projector_lr=1e-2, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = LlavaTrainer(model, args, data, tokenizer, processor)
    trainer.train()
    trainer.save_model(out)
    return out, [h["loss"] for h in trainer.state.log_history if "loss" in h], model, tokenizer

first, losses, _, _ = trained(1, "plain", asked)
assert losses[-1] < losses[0] and not list(Path(first).glob("model*.safetensors")), losses
second, losses, model, tokenizer = trained(2, "v1", asked + said, projector=first)
assert losses[-1] < losses[0] / 2, losses
again = LlavaForConditionalGeneration.from_pretrained(second)
assert sum(p.numel() for p in again.parameters()) > 100_000
answer = Chat(model, tokenizer, processor).ask("Colour?", image=here / "red.png")
behind = [m for m in sys.modules if m.startswith(("llava_nb.store", "llava_nb.safe", "llava_nb.run", "llava_nb.demo", "llava_nb.train."))]
print(json.dumps({"answer": answer, "behind": behind}))
"""


def test_the_book_trains_with_all_behind_it_absent(tmp_path):
    shutil.copytree(ROOT / "llava_nb", tmp_path / "llava_nb", ignore=shutil.ignore_patterns("__pycache__", *BEHIND))
    left = {p.name for p in (tmp_path / "llava_nb").iterdir()}
    assert not left & set(BEHIND) and {"trainer.py", "llava.py", "base", "fast"} <= left
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"answer": "red.", "behind": []}


def test_a_newcomer_sees_llava_first():
    "The folder `nbs/` shows the book alone: at most 14 numbered notebooks, each number once"
    numbers = [p.name[:2] for p in (ROOT / "nbs").glob("[0-9]*.ipynb")]
    assert sorted(numbers) == [f"{k:02}" for k in range(1, len(numbers) + 1)] and len(numbers) <= 14
