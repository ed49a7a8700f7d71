"""One step of a layer by torch and by each engine, guarded and not: run by test_guard and test_gpu in a process of its
own, since an engine joins a process group.

Prints a line of JSON a case: `case`, bytes the guarded step made beyond the unguarded one, bytes of the gradients, and
which wrong numbers were refused."""

import gc
import json

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_nb.fast.zero import deepspeed_config, init_distributed
from llava_nb.safe.guard import NotFinite, guard_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRONG = (float("nan"), float("inf"), -float("inf"))
CASES = {
    "torch": (None, "float32", {}),
    "ZeRO-1 float32": (1, "float32", {}),
    "ZeRO-2 float32": (2, "float32", {}),
    "ZeRO-2 bf16": (2, "bfloat16", {}),
    "ZeRO-2 bf16, told not to look": (2, "bfloat16", {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "ZeRO-2 bf16, added up in float32": (2, "bfloat16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "ZeRO-3 float32": (3, "float32", {}),
    "ZeRO-3 bf16": (3, "bfloat16", {}),
    "ZeRO-3 bf16, added up in float32": (3, "bfloat16", {"data_types": {"grad_accum_dtype": "fp32"}}),
}


class Allocated(TorchDispatchMode):
    "Counts the bytes of every tensor that is made inside."

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, torch.Tensor) and not op.is_view:
                self.bytes += t.nbytes
        return found


def made(stage: int | None, dtype: torch.dtype, changes: dict, guarded: bool):
    "A layer, what steps it, and its backward."
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512, dtype=dtype, device=DEVICE)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    if stage is None:
        if guarded:
            guard_optimizer(adam)
        return model, adam, torch.Tensor.backward
    config = (
        deepspeed_config(stage) | {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": False}} | changes
    )
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    config["zero_optimization"] = {k: 10_000_000 if v == "auto" else v for k, v in config["zero_optimization"].items()}
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    if guarded:
        guard_optimizer(optimizer, DEVICE)
    return engine, engine, engine.backward


def weights(model) -> torch.Tensor:
    own = getattr(model, "module", model)
    with deepspeed.zero.GatheredParameters(list(own.parameters())):
        return torch.cat([p.detach().flatten() for p in own.parameters()]).clone()


def stepped(case: tuple, guarded: bool, wrong: float | None = None) -> int:  # bytes
    "A step; with a wrong number in it, whether nothing changed is asserted and NotFinite goes on."
    stage, dtype, changes = case
    model, stepper, backward = made(stage, getattr(torch, dtype), changes, guarded)
    x = torch.randn(8, 512, dtype=getattr(torch, dtype), device=DEVICE)
    if wrong is not None:
        x[3, 5] = wrong
    backward(model(x).float().square().mean())
    before = weights(model)
    with Allocated() as taken:
        try:
            stepper.step()
        except NotFinite:
            assert torch.equal(before, weights(model)), "a weight was changed"
            raise
    assert not torch.equal(before, weights(model))
    return taken.bytes


def refused(case: tuple) -> list[str]:
    found = []
    for wrong in WRONG:
        try:
            stepped(case, True, wrong)
        except NotFinite:
            found.append(str(wrong))
        gc.collect()
    return found


init_distributed()
for name, case in CASES.items():
    more = stepped(case, True) - stepped(case, False)
    print(
        json.dumps(
            {
                "case": name,
                "more": more,
                "gradients": (512 * 512 + 512) * (4 if case[1] == "float32" else 2),
                "refused": refused(case),
            }
        ),
        flush=True,
    )
