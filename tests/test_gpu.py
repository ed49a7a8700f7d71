"""What only a GPU can say: its kernels on its own numbers, its memory, its random states. Skipped without one."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, TIMEOUT, config, farthest, losses, make_world, weights
from test_model import SHAPE, loss_and_gradients, samples

from llava_nb import train
from llava_nb.fast.attention import BACKENDS, check_attention_backend, choose_attention, record_lengths, use_attention
from llava_nb.fast.cross_entropy import LOSS_KERNELS, check_loss_kernel, linear_cross_entropy
from llava_nb.fast.meter import matmul_rate
from llava_nb.fast.recompute import RECOMPUTE, set_recompute
from llava_nb.llava import freeze, tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.objective import row_loss
from llava_nb.packing import collate_packed
from llava_nb.safe import reliable_trainer
from llava_nb.safe.guard import finite
from llava_nb.safe.state import random_state, set_random_state

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEADS = {"1B": (32, 4, 64), "7B": (32, 32, 128), "shared keys": (32, 8, 128), "tiny": (4, 2, 16)}
NEEDS = {"flash": "flash_attn"}  # a package that may be missing


def needed(backend: str) -> str:
    "The back end, or a skip where its package is not installed."
    if backend in NEEDS and importlib.util.find_spec(NEEDS[backend]) is None:
        pytest.skip(f"{NEEDS[backend]} is not installed")
    return backend


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    "The norm of the difference, relative to that of what is expected."
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


@pytest.fixture(scope="module")
def model():
    found = tiny_llava(tiny_tokenizer())
    freeze(found, 2)
    return found.train().to(DEVICE)


def row_of(model, records: list[dict]) -> dict:
    row = collate_packed(records, SHAPE)
    return {k: v.to(DEVICE, model.dtype if k == "pixel_values" else v.dtype) for k, v in row.items()}


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_agrees_with_sdpa_in_bf16(backend, heads, window):
    assert check_attention_backend(needed(backend), DEVICE, torch.bfloat16, heads, window) == ""


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_fastest_kernel_is_taken_and_only_a_missing_package_is_refused(heads):
    backend, refused = choose_attention("auto", DEVICE, torch.bfloat16, heads)
    assert backend == "varlen" and not refused, refused


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize(
    "backend, dtype", [*itertools.product(BACKENDS, [torch.bfloat16]), ("flex", torch.float32), ("sdpa", torch.float32)]
)
def test_a_row_has_the_loss_and_the_gradients_of_its_separate_records(model, backend, dtype, how):
    model.to(dtype)
    use_attention(model, needed(backend), DEVICE, dtype)
    set_recompute(model, how)
    pool = [s | {"weight": 1 / 40} for s in samples(model, 5)]
    row, alone = (
        loss_and_gradients(model, row_loss, *rows)
        for rows in ([row_of(model, pool)], [row_of(model, [s]) for s in pool])
    )
    most = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert row[0] == pytest.approx(alone[0], rel=most)
    assert {n: e for n, g in row[1].items() if (e := apart(g, alone[1][n])) > most} == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_does_not_see_the_others(model, backend):
    model.to(torch.bfloat16)
    use_attention(model, needed(backend), DEVICE, torch.bfloat16)
    set_recompute(model, "none")
    row = row_of(model, samples(model, 4))
    lengths, other = record_lengths(row["position_ids"]), row["input_ids"].clone()
    last = torch.arange(other.shape[1], device=DEVICE) >= sum(lengths[:3])
    other[0, last & (other[0] != model.config.image_token_id)] = 7
    said = []
    with torch.no_grad():
        for ids in (row["input_ids"], other):
            logits = model(
                input_ids=ids, position_ids=row["position_ids"], pixel_values=row["pixel_values"], use_cache=False
            ).logits
            said.append(logits[0].split(lengths))
    assert [torch.equal(a, b) for a, b in zip(*said)] == [True] * 3 + [False]


@pytest.mark.parametrize("kernel", [*LOSS_KERNELS, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss_kernel_gives_the_loss_and_gradients_of_all_logits(kernel, dtype):
    if kernel == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    if kernel == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    if kernel in LOSS_KERNELS:
        assert check_loss_kernel(kernel, DEVICE, dtype) == ""
    g = torch.Generator(DEVICE).manual_seed(0)
    made = [torch.randn(n, 512, generator=g, device=DEVICE, dtype=dtype) * 0.1 for n in (3000, 32_000)]
    targets = torch.randint(0, 32_000, (3000,), generator=g, device=DEVICE)
    found = []
    for how in (kernel, "all"):
        hidden, head = (t.clone().requires_grad_() for t in made)
        if how == "all":
            loss = torch.nn.functional.cross_entropy(hidden.float() @ head.float().T, targets)
        elif how == "torch":
            loss = torch.nn.functional.linear_cross_entropy(hidden, head, targets)
        else:
            loss = linear_cross_entropy(
                hidden, head, None, targets, torch.full((3000,), 1 / 3000, device=DEVICE), 32_000, 32_000, how
            )
        loss.backward()
        found.append([loss.detach(), hidden.grad, head.grad])
    most = 2e-2 if dtype == torch.bfloat16 else 1e-3
    assert [apart(a, b) < most for a, b in zip(*found)] == [True] * 3, [apart(a, b) for a, b in zip(*found)]


def test_a_look_at_gradients_makes_nothing_of_their_size():
    gradient = torch.randn(1 << 26, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert finite([gradient])
    assert torch.cuda.max_memory_allocated() - before < gradient.nbytes / 50
    for wrong, place in itertools.product((float("nan"), float("inf"), -float("inf")), (0, -1)):
        kept = gradient[place].clone()
        gradient[place] = wrong
        assert not finite([gradient])
        gradient[place] = kept


def test_every_engine_refuses_every_wrong_number_before_a_weight_changes():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "engine_steps.py"], capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(steps) == 9 and all(
        s["refused"] == ["nan", "inf", "-inf"] and s["more"] < s["gradients"] / 100 for s in steps
    ), steps


def test_the_random_states_of_the_gpu_come_back():
    tensors, rest = random_state()
    drawn = torch.rand(9, device=DEVICE)
    assert "cuda" in tensors and not torch.equal(drawn, torch.rand(9, device=DEVICE))
    set_random_state(tensors, rest)
    assert torch.equal(drawn, torch.rand(9, device=DEVICE))


def test_measuring_the_machine_leaves_its_random_numbers_alone_and_bf16_is_faster():
    before = torch.cuda.get_rng_state()
    assert matmul_rate(DEVICE, torch.bfloat16, 4096) > matmul_rate(DEVICE, torch.float32, 4096)
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.1)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    "Runs of this process do not measure its rate: that takes a gigabyte."
    monkeypatch.setattr(reliable_trainer, "device_rates", lambda *given: {"measured": 1e12})


def run(world: Path, name: str, **changes) -> tuple[int, list[float]]:
    "train.py, in this process: exit code and losses."
    file, settings = config(world, name, **({"max_steps": 6, "save_steps": 3, "preflight": False} | changes))
    code = train.main([str(file)])
    return code, losses(Path(settings["output_dir"])) if code == 0 else []


def test_a_preflight_changes_nothing(world, capsys):
    with_it, without = (run(world, f"preflight{on}", preflight=on) for on in (True, False))
    assert "preflight: the longest row" in capsys.readouterr().out
    assert (
        with_it == (0, pytest.approx(without[1], abs=1e-5))
        and farthest(*(weights(world / f"preflight{on}") for on in (True, False))) < 1e-5
    )


def test_a_resumed_run_has_the_gpus_random_states(world):
    "Dropout in every layer: with other states the losses would be far apart."
    code, whole = run(world, "whole", learning_rate=1e-3)
    (world / "resumed").mkdir()
    shutil.copytree(world / "whole" / "checkpoint-3", world / "resumed" / "checkpoint-3")
    assert (code, run(world, "resumed", learning_rate=1e-3)) == (0, (0, pytest.approx(whole, abs=1e-4)))
    assert farthest(weights(world / "resumed"), weights(world / "whole")) < 1e-4


def test_memory_that_is_full_is_said_with_the_row(world, capsys):
    "As much as the model and half of a step's activations need."
    large = {"per_device_train_batch_size": 96, "gradient_accumulation_steps": 1, "save_strategy": "no", "max_steps": 2}
    file, settings = config(world, "full", **large)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_reserved()
    assert train.main([str(config(world, "fits", **large)[0])]) == 0
    most, room = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((held + 0.5 * (most - held)) / room)
    try:
        code = train.main([str(file), "--preflight", "False"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = json.loads((Path(settings["output_dir"]) / "out_of_memory.json").read_text())
    assert (
        code == 9
        and f"out of memory in row 0 of {found['tokens']:,} tokens" in capsys.readouterr().err
        and len(found["records"]) == 96
    )


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(world):
    code, _ = run(world, "nan", learning_rate=1e20, projector_lr=None, save_steps=1, bf16=True)
    found = json.loads((world / "nan" / "not_finite.json").read_text())
    assert code == 5 and found["rows"] and not (world / "nan" / "model.safetensors").exists()
