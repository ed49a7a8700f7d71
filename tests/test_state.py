"""The training state: on as many ranks as before a resumed run is the same to the bit, on others the same records and losses; nothing in a checkpoint is a pickle."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import TIMEOUT, command, config, farthest, losses, make_world, run, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_nb import train
from llava_nb.fast.zero import free_port
from llava_nb.packing import RowBalancer
from llava_nb.safe.integrity import MADE_WITH, MANIFEST, check_same, commit_checkpoint, describe
from llava_nb.safe.provenance import run_fingerprint
from llava_nb.safe.state import (
    STATE_FILE,
    Parts,
    Training,
    keep_global_batch,
    load_random,
    load_state,
    part_file,
    read_index,
    save_state,
    write_index,
    write_part,
)
from llava_nb.safe.storage import NoCheckpoint
from llava_nb.sampler import Plan
from llava_nb.trainer import LlavaTrainingArguments, PlanSampler

# 32 records in global batches of 8: four steps an epoch, so that step 3 is in the first epoch and step 6 in the second.
SMALL = {"max_steps": 9, "save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    kept = json.loads((world / "records.json").read_text())
    pictured = [
        r | {"conversations": [{"from": "human", "value": "<image>"}, r["conversations"][1]]}
        for r in kept
        if "image" in r
    ]
    (world / "records.json").write_text(json.dumps(kept[:32]))
    (world / "captions.json").write_text(json.dumps(pictured[:32]))
    return world


def small(world: Path, name: str, **changes) -> Path:
    return config(world, name, **(SMALL | changes))[0]


def launch(file: Path, ranks: int) -> list[float]:
    """The losses of a run whose ranks are started here, by what the launcher would set: it reads torch and DeepSpeed twice more, and other tests use it."""
    start, port = command(file, 0), str(free_port())
    place = lambda rank: (
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if ranks > 1
        else {}
    )
    started = [
        subprocess.Popen(
            **start | {"env": start["env"] | place(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(s[-3000:] for s in said)
    return losses(Path(json.loads(file.read_text())["output_dir"]))


def taken(world: Path, name: str, source: str, step: int, **changes) -> Path:
    """A run that finds another's checkpoint in its folder."""
    (world / name).mkdir()
    shutil.copytree(world / source / f"checkpoint-{step}", world / name / f"checkpoint-{step}")
    return small(world, name, **changes)


STAGE1 = {
    "stage": 1,
    "sampler": "random",
    "template": "plain",
    "image_aspect_ratio": "square",
    "projector_lr": None,
    "learning_rate": 1e-3,
}
CHAINS = {
    "stage 2, ZeRO-3, then ZeRO-2 on one rank, then ZeRO-3": (
        {"sampler": "modality", "max_tokens": 600},
        (2, 3),
        (1, 2),
        (2, 3),
    ),
    "stage 1, ZeRO-2, then no DeepSpeed, then ZeRO-1": (STAGE1, (2, 2), (1, None), (2, 1)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_two_ranks_then_one_then_two_are_the_run_that_was_never_stopped(world, chain):
    """Ranks change in the first epoch and in the second; engines change with them. Losses of steps 4 to 9 are those of a resumed run."""
    common, (ranks, zero), (fewer, other), (again, last) = CHAINS[chain]
    if common is STAGE1:
        common = common | {"data_path": str(world / "captions.json")}
    whole, one, two = (chain.split(",")[0].replace(" ", "") + part for part in ("", "_one", "_two"))
    steps = launch(small(world, whole, zero=zero, **common), ranks)
    assert len(steps) == 9
    assert launch(
        taken(world, one, whole, 3, zero=other, gradient_accumulation_steps=4, **common), fewer
    ) == pytest.approx(steps, abs=1e-6)
    assert launch(taken(world, two, one, 6, zero=last, **common), again) == pytest.approx(steps, abs=1e-6)
    assert (
        farthest(weights(world / whole), weights(world / one)) < 1e-6
        and farthest(weights(world / whole), weights(world / two)) < 1e-6
    )
    held = {(world / name / "checkpoint-9" / STATE_FILE): n for name, n in ((whole, 2), (one, 1), (two, 2))}
    assert all(
        read_index(path.parent)["ranks"] == n
        and {p["step"] for p in read_index(path.parent)["parameters"].values()} == {9}
        for path, n in held.items()
    )


def test_bfloat16_with_dropout_goes_on_to_the_bit_on_two_ranks(world):
    """Master weights in float32 and each rank's own random states come back; without either the losses would differ."""
    start = world / "start_dropout"
    shutil.copytree(world / "start", start)
    found = json.loads((start / "config.json").read_text())
    found["text_config"]["attention_dropout"] = 0.2
    (start / "config.json").write_text(json.dumps(found))
    changes = {"model": str(start), "zero": 2, "bf16": True, "learning_rate": 1e-3}
    steps = launch(small(world, "bf16", **changes), 2)
    assert launch(taken(world, "bf16_again", "bf16", 6, **changes), 2) == steps
    states = [world / name / "checkpoint-9" for name in ("bf16", "bf16_again")]
    assert farthest(*map(weights, states)) == 0
    saved = weights(states[0])
    masters = [load_file(states[0] / part_file(rank)) for rank in (0, 1)]
    assert not torch.equal(masters[0]["random/torch"], masters[1]["random/torch"])
    name = "lm_head.weight"
    whole = torch.cat([part[f"master/{name}"] for part in masters if f"master/{name}" in part])
    assert (
        whole.dtype == torch.float32
        and not torch.equal(whole.bfloat16().float(), whole)
        and torch.equal(whole.bfloat16(), saved[f"language_model.{name}"].flatten())
    )


@pytest.fixture(scope="module")
def alone(world) -> Path:
    """The run of one process, without DeepSpeed, made here."""
    assert train.main([str(small(world, "alone", gradient_accumulation_steps=4)), "--use_cpu", "True"]) == 0
    return world / "alone"


def test_every_file_that_a_run_leaves_is_safetensors_json_or_text(world, alone):
    """Of all runs above, whatever their engine: read to the end as what its name says, which no pickle or zip file can be."""
    found = [
        p
        for run_dir in world.iterdir()
        if list(run_dir.glob("checkpoint-*"))
        for p in run_dir.rglob("*")
        if p.is_file()
    ]
    assert {part_file(0), STATE_FILE, "model.safetensors", "trainer_state.json"} <= {p.name for p in found}
    for path in found:
        if path.name == "run.lock":
            assert not path.read_bytes()
            continue
        assert path.suffix in (".safetensors", ".json", ".jinja", ".yaml", ".txt"), path
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert not path.read_bytes().startswith(b"PK") and path.read_text()
    for step in (3, 6, 9):
        assert "missing" not in describe(alone / f"checkpoint-{step}").values()


@pytest.mark.parametrize("mode", ["modality", "random", "compat"])
def test_any_number_of_ranks_deals_the_same_records_with_the_same_weights_in_every_step(mode):
    """Also in the second epoch, and asked for in the middle of it; none twice, none left out. The reference's own order is another on one rank."""
    rng = np.random.default_rng(5)
    lengths, has_image = rng.integers(5, 90, 101), rng.random(101) < 0.4
    learned = rng.integers(1, 5, 101)

    def step(ranks, epoch, k):
        plan = Plan(
            mode,
            lengths,
            has_image=has_image,
            word_lengths=np.where(has_image, lengths, -lengths),
            batch_size=2,
            world_size=ranks,
            accumulation=4 // ranks,
            seed=3,
            epoch=epoch,
        )
        rows = [
            row
            for rank in range(ranks)
            for row in PlanSampler(plan, learned, "reference", rank, RowBalancer(lengths)).step(k)
        ]
        return plan.steps, sorted((i, w) for row in rows for i, w in row if w)

    for epoch in (0, 1):
        steps, _ = step(1, epoch, 0)
        seen = []
        for k in range(steps):
            alone = step(1, epoch, k)
            assert (
                step(2, epoch, k) == step(4, epoch, k)
                and alone[0] == steps
                and (alone == step(2, epoch, k) or mode == "compat")
            )
            seen += [i for i, _ in alone[1]]
        assert sorted(seen) == list(range(101))


def test_the_references_order_is_not_continued_from_one_rank_on_several(tmp_path):
    names = vars(LlavaTrainingArguments(output_dir=str(tmp_path), sampler="compat", use_cpu=True, report_to="none"))
    one, two, four = (
        run_fingerprint(SimpleNamespace(**names | {"gradient_accumulation_steps": 4 // n}, world_size=n), None)
        for n in (1, 2, 4)
    )
    (tmp_path / MADE_WITH).write_text(json.dumps(two))
    check_same(tmp_path, four)
    with pytest.raises(ValueError, match="ranks: several then, one now"):
        check_same(tmp_path, one)


def refused(file: Path, capsys, *flags: str) -> str:
    assert train.main([str(file), "--use_cpu", "True", *flags]) != 0
    return capsys.readouterr().err


def test_a_global_batch_that_changes_is_refused_with_the_flag_that_keeps_it(world, alone, capsys):
    said = refused(taken(world, "half", "alone", 3, gradient_accumulation_steps=2), capsys)
    assert "global_batch: 8 then, 4 now; --gradient_accumulation_steps 4 keeps the global batch of 8 on 1 rank" in said
    assert keep_global_batch(8, 2, 3).endswith(
        "cannot be kept on 3 ranks; use 1, 2, 4"
    ) and "use 1, 2, 3, 6" in keep_global_batch(6, 1, 4)


def spoilt(folder: Path, how) -> str:
    """What is said of a state after something was done to its files."""
    how(folder)
    with pytest.raises(NoCheckpoint) as e:
        load_state(folder, regression()[0])
    return str(e.value)


def regression(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01)):
    """A small run, and a function that makes a step of it."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 2))
    optimizer = optimizer(model.parameters())
    training = Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k))

    def step() -> float:
        loss = model(torch.ones(3, 5)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.schedule.step()
        return loss.item()

    return training, step


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def without(path: Path, key: str) -> None:
    with safe_open(path, framework="pt") as f:
        about = f.metadata()
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata=about)


def edited(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "how, said",
    [
        (lambda f: (f / STATE_FILE).unlink(), "state.json is missing"),
        (lambda f: (f / part_file(0)).unlink(), "state-rank00000.safetensors is missing"),
        (lambda f: edited(f / STATE_FILE, lambda s: s.update(ranks=2)), "state-rank00001.safetensors is missing"),
        (lambda f: cut(f / STATE_FILE), "state.json: not a training state"),
        (lambda f: cut(f / part_file(0)), "state-rank00000.safetensors"),
        (lambda f: without(f / part_file(0), "exp_avg_sq/0.weight"), "exp_avg_sq of 0.weight cannot be read"),
        (
            lambda f: edited(f / STATE_FILE, lambda s: s["parameters"]["0.weight"].update(ranges=[[0, 0, 30]])),
            "0.weight has 35 weights, and the parts do not follow one another at 30",
        ),
        (
            lambda f: edited(f / STATE_FILE, lambda s: s["parameters"].pop("2.bias")),
            "2.bias has the shape of nothing, in this run [2]",
        ),
    ],
)
def test_a_state_that_is_not_whole_is_refused_by_the_name_of_the_file(tmp_path, how, said):
    training, step = regression()
    step()
    save_state(tmp_path, training, 1)
    message = spoilt(tmp_path, how)
    assert said in message and str(tmp_path) in message


def test_a_run_whose_checkpoint_has_no_state_ends_with_its_name(world, alone):
    file = taken(world, "stateless", "alone", 3, gradient_accumulation_steps=4)
    folder = world / "stateless" / "checkpoint-3"
    (folder / part_file(0)).unlink()
    (folder / MANIFEST).unlink()
    commit_checkpoint(folder)
    done = run(file, 0)
    assert (
        done.returncode != 0
        and "state-rank00000.safetensors is missing" in done.stdout + done.stderr
        and not (world / "stateless" / "checkpoint-6").exists()
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_parts_of_any_number_of_ranks_are_read_as_one_to_the_bit(tmp_path, ranks, optimizer):
    training, step = regression(optimizer=optimizer)
    for _ in range(3):
        step()
    write_index(tmp_path, training, [write_part(tmp_path, training, rank, ranks, 3) for rank in range(ranks)], 3)
    whole = [step() for _ in range(3)]
    other, go = regression(optimizer=optimizer)
    load_state(tmp_path, other)  # weights too: the masters
    load_random(tmp_path, 0, rank=ranks - 1, ranks=ranks)
    assert [go() for _ in range(3)] == whole and all(
        torch.equal(a, b) for a, b in zip(training.model.parameters(), other.model.parameters())
    )


def test_a_reader_opens_only_the_files_that_hold_its_range(tmp_path):
    training, step = regression()
    step()
    write_index(tmp_path, training, [write_part(tmp_path, training, rank, 5, 1) for rank in range(5)], 1)
    parts = Parts(tmp_path, read_index(tmp_path))
    read = torch.cat([values for _, values in parts.read("exp_avg", "0.weight", 9, 20)])  # 35 weights, 7 a rank
    assert set(parts.opened) == {1, 2} and torch.equal(
        read, training.optimizer.state[training.model[0].weight]["exp_avg"].flatten()[9:20]
    )


def test_an_optimizer_that_cannot_be_saved_is_refused_before_the_run(world, capsys):
    assert "optim 'adafactor' is unknown; use one of adamw_torch_fused, " in refused(
        small(world, "adafactor", optim="adafactor"), capsys
    )


def test_other_settings_that_are_allowed_are_used_and_the_schedule_keeps_its_place(tmp_path):
    training, step = regression()
    for _ in range(4):
        step()
    save_state(tmp_path, training, 4)
    other, _ = regression()
    for group in other.optimizer.param_groups:
        group["initial_lr"] = group["lr"] = 0.5
    other.schedule.base_lrs = [0.5]
    load_state(tmp_path, other)
    assert other.optimizer.param_groups[0]["lr"] == 0.5 * 0.9**4 and other.schedule.last_epoch == 4


def test_on_another_number_of_ranks_every_rank_draws_its_own(tmp_path):
    training, step = regression()
    step()
    save_state(tmp_path, training, 1)
    drawn = {}
    for ranks, rank in ((1, 0), (2, 0), (2, 1), (3, 1)):
        for _ in range(2):
            load_random(tmp_path, 42, rank, ranks)
            drawn.setdefault((ranks, rank), set()).add((torch.rand(1).item(), np.random.rand()))
    assert all(len(v) == 1 for v in drawn.values()) and len(set.union(*drawn.values())) == 4
