"""A small run for tests that launch `train.py` itself: its records, pictures and model, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, TrainerState

from llava_nb.checkpoint import save_llava
from llava_nb.fast.zero import free_port
from llava_nb.llava import PROJECTOR_FILE, tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.safe.integrity import MADE_WITH, PLACE, begin_checkpoint, commit_checkpoint
from llava_nb.safe.state import Training, save_state

ROOT = Path(__file__).resolve().parent.parent
RECORDS, STEPS, TIMEOUT = 96, 20, 240


def make_world(where: Path, dropout: float = 0.0) -> Path:
    """Records, pictures and a llava-hf folder for a run; `dropout` in its attention makes every step depend on the random states."""
    rng, records = np.random.default_rng(0), []
    for k in range(RECORDS):
        words = " ".join(f"word{rng.integers(50)}" for _ in range(rng.integers(2, 12)))
        record = {
            "id": str(k),
            "conversations": [{"from": "human", "value": f"What is {k}?"}, {"from": "gpt", "value": words}],
        }
        if rng.random() < 0.35:
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(where / f"{k}.png")
            record["image"] = f"{k}.png"
            record["conversations"][0]["value"] = "<image>\nWhat is this?"
        records.append(record)
    (where / "records.json").write_text(json.dumps(records))
    tokenizer = tiny_tokenizer()
    model = tiny_llava(tokenizer, seed=3)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    model.config.text_config.attention_dropout = dropout
    save_llava(model, where / "start", tokenizer, processor)
    return where


def config(world: Path, name: str, **changes) -> tuple[Path, dict]:
    """A configuration file for the small run."""
    settings = {
        "model": str(world / "start"),
        "data_path": str(world / "records.json"),
        "image_folder": str(world),
        "output_dir": str(world / name),
        "template": "v1",
        "image_aspect_ratio": "pad",
        "model_max_length": 256,
        "stage": 2,
        "sampler": "random",
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "projector_lr": 2e-4,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 10,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
    } | changes
    file = world / f"{name}.json"
    file.write_text(json.dumps(settings))
    return file, settings


def captions(world: Path) -> Path:
    """The records with pictures, as captions for stage 1."""
    records = json.loads((world / "records.json").read_text())
    kept = [
        {
            "id": r["id"],
            "image": r["image"],
            "conversations": [{"from": "human", "value": "<image>"}, r["conversations"][1]],
        }
        for r in records
        if "image" in r
    ]
    (world / "captions.json").write_text(json.dumps(kept))
    return world / "captions.json"


def command(file: Path, ranks: int, *flags: str, program: Path = ROOT / "llava_nb" / "train.py") -> dict:
    """How train.py is started: by Python alone, or by the launcher for 1 or 2 ranks."""
    bin_dir = Path(sys.executable).parent
    start = (
        [sys.executable]
        if ranks == 0
        else [str(bin_dir / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    return {"args": [*start, str(program), str(file), *flags], "env": env, "text": True}


def run(file: Path, ranks: int, *flags: str) -> subprocess.CompletedProcess:
    """Run train.py. A hang is a failure, not a wait."""
    return subprocess.run(**command(file, ranks, *flags), capture_output=True, timeout=TIMEOUT)


def launch(file: Path, ranks: int, *flags: str) -> list[float]:
    """Run train.py to its end and return its losses."""
    done = run(file, ranks, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return losses(Path(json.loads(file.read_text())["output_dir"]))


def started(file: Path, ranks: int, step: int, **how) -> subprocess.Popen:
    """A run that has just logged a step."""
    process = subprocess.Popen(**command(file, ranks, **how), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.split()[:1] == ["step"] and int(line.split()[1].split("/")[0]) >= step:
            return process
    raise AssertionError("the run ended before it logged a step")


def small_checkpoint(folder: Path, step: int, sealed: bool = True) -> Path:
    """A checkpoint of stage 1 with one layer, and all that a resume reads; marked as being written until it is sealed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin_checkpoint(folder)
    torch.manual_seed(step)
    layer = torch.nn.Linear(3, 2)
    named = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"multi_modal_projector": torch.nn.ModuleDict({"linear_1": layer})})}
    )
    optimizer = torch.optim.SGD(named.parameters(), lr=0.1)
    save_state(folder, Training(named, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)), step)
    save_file({f"linear_1.{k}": v.detach().clone() for k, v in layer.named_parameters()}, folder / PROJECTOR_FILE)
    TrainerState(global_step=step, save_steps=1.0, log_history=[{"loss": 1.5, "step": step}]).save_to_json(
        str(folder / PLACE)
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {}, "vision_config": {}}))
    (folder / MADE_WITH).write_text(json.dumps({"global_batch": 4}))
    if sealed:
        commit_checkpoint(folder)
    return folder


def losses(run: Path) -> list[float]:
    newest = max(run.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return [h["loss"] for h in json.loads((newest / "trainer_state.json").read_text())["log_history"] if "loss" in h]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            found |= {k: f.get_tensor(k) for k in f.keys()}
    return found


def farthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def verdicts(file: Path, capsys, *flags: str) -> dict[str, tuple[int, str]]:
    """What doctor, dry run and run say of a configuration, in this process: exit code, and the first line of the refusal."""
    from llava_nb import train

    said = {}
    for name, argv in {
        "doctor": ["doctor", str(file)],
        "dry run": [str(file), "--dry_run"],
        "run": [str(file)],
    }.items():
        capsys.readouterr()
        code = train.main([*argv, *flags])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        said[name] = code, next((line.rstrip(":") for line in err.splitlines() if line.startswith("llava_nb: ")), "")
    return said


def verdict(file: Path, capsys, *flags: str) -> tuple[int, str]:
    """The one verdict of all three."""
    said = verdicts(file, capsys, *flags)
    assert len(set(said.values())) == 1, said
    return said["run"]
