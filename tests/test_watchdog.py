"""What does not go on is ended: a stopped or killed rank, a worker that is killed or hangs, a file system that fails, memory that is full. Real processes, real signals."""

import errno
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from runs import ROOT, TIMEOUT, command, config, farthest, launch, losses, make_world, started, weights
from transformers import CLIPImageProcessorPil

from llava_nb import train
from llava_nb.conversation import get_template
from llava_nb.fast.zero import free_port
from llava_nb.imageproc import ImageTransform
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.safe.failures import _data_line, exit_code_of
from llava_nb.safe.loss_alarm import LossAlarm
from llava_nb.safe.processes import launches, orphaned, program_of
from llava_nb.safe.training_watch import DataFailed
from llava_nb.store.dataset import UndecodableImage, ValidatedDataset
from llava_nb.store.images import Folder

HANG = 4  # seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def of_this_run(file: Path) -> list[psutil.Process]:
    """Processes whose command line names this run's configuration, workers included; a zombie has none."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(file) in (p.info["cmdline"] or [])]


def rank_processes(file: Path) -> list[psutil.Process]:
    """The ranks, by number."""
    return sorted(
        (
            p
            for p in of_this_run(file)
            if any(w.startswith("--local_rank") for w in p.cmdline()) and "deepspeed" not in " ".join(p.cmdline())
        ),
        key=lambda p: [w for w in p.cmdline() if w.startswith("--local_rank")],
    )


def ended(process: subprocess.Popen, file: Path) -> tuple[int, str]:
    """Its exit code and what it said; nothing of it may be left."""
    said, _ = process.communicate(timeout=TIMEOUT)
    until = time.monotonic() + 8  # workers look for their parent every 5 s
    while (left := of_this_run(file)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, [(p.pid, p.cmdline()) for p in left]
    return process.returncode, said


def line_of(said: str, words: str) -> str:
    found = [
        line for line in said.splitlines() if "llava_nb: " in line and words in line
    ]  # torch may have begun the line
    assert len(found) == 1, said[-4000:]
    return found[0]


def test_a_stopped_rank_ends_both_with_the_stacks_of_both(world):
    file, settings = config(world, "stopped", zero=2, max_steps=2000, save_steps=1000, hang_timeout=HANG)
    process = started(file, 2, 3)
    rank_processes(file)[1].send_signal(signal.SIGSTOP)
    code, said = ended(process, file)
    assert code == 8, said[-3000:]
    assert "rank 0: no sign of life for" in line_of(said, "no sign of life") and "the same command begins again" in said
    stacks = [(Path(settings["output_dir"]) / f"stacks-rank{r}.txt").read_text() for r in (0, 1)]
    assert all("train.py" in s and "watch.py" in s for s in stacks)


def test_a_killed_rank_ends_the_other(world):
    file, settings = config(world, "killed", zero=2, max_steps=2000, save_steps=1000, hang_timeout=HANG)
    process = started(file, 2, 3)
    rank_processes(file)[1].kill()
    code, said = ended(process, file)
    assert code == 247 and line_of(said, "rank 0: another rank is gone"), said[-3000:]


def gone_within(file: Path, seconds: float) -> float:
    """How long the processes of a run are still there after its launcher was killed."""
    begun = time.monotonic()
    while of_this_run(file) and time.monotonic() - begun < seconds:
        time.sleep(0.2)
    assert not of_this_run(file), [(p.pid, p.ppid(), p.cmdline()) for p in of_this_run(file)]
    return time.monotonic() - begun


LONG = {"max_steps": 2000, "save_steps": 1000, "hang_timeout": 120, "dataloader_num_workers": 1}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deepspeed", "torchrun", "launch"])
def test_kill_9_of_the_command_that_was_typed_ends_all_ranks_and_their_workers(world, how, record_property):
    """Of DeepSpeed's two launchers the second survives; `llava_nb launch` starts both in a session of their own."""
    file, settings = config(world, f"typed_{how}", zero=2, **LONG)
    if how == "deepspeed":
        process = started(file, 2, 3)
    elif how == "launch":
        process = launched(file, 2, 0)
    else:
        start = command(file, 0)
        start["args"] = [*TORCHRUN, "--master-port", str(free_port()), *start["args"][1:]]
        process = running(start, 3)
    assert len(of_this_run(file)) > 3
    process.kill()
    took = gone_within(file, 30)
    said, _ = process.communicate(timeout=TIMEOUT)
    lines = [line for line in said.splitlines() if "its launcher is gone" in line]
    assert lines and "the same command begins again: there is no checkpoint yet" in lines[0], said[-3000:]
    record_property("reached", f"kill -9 of the {how} command with two ranks: nothing left after {took:.1f} s")


def test_kill_9_of_the_launcher_of_one_process_ends_it_too(world):
    file, _ = config(world, "typed_alone", **LONG)
    process = launched(file, 0, 0)
    process.kill()
    gone_within(file, 20)
    assert "its launcher is gone" in process.communicate(timeout=TIMEOUT)[0]


@pytest.mark.slow
def test_a_second_launcher_that_was_left_alone_before_its_ranks_began_is_noticed(world):
    file, _ = config(world, "typed_early", zero=2, **LONG)
    process = subprocess.Popen(**command(file, 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not any("deepspeed.launcher.launch" in " ".join(p.cmdline()) for p in of_this_run(file)):
        time.sleep(0.05)
    process.kill()
    assert "its launcher is gone" in process.communicate(timeout=TIMEOUT)[0]
    gone_within(file, 20)


@pytest.mark.parametrize(
    "ranks, wrap",
    [
        (0, "nohup setsid {} &"),
        pytest.param(2, "nohup setsid {} &", marks=pytest.mark.slow),
        pytest.param(2, "({} &)", marks=pytest.mark.slow),
    ],
)
def test_a_shell_that_ends_before_its_run_is_no_launcher(world, ranks, wrap):
    name = f"background{ranks}{len(wrap)}"
    file, settings = config(world, name, max_steps=12, save_steps=12, **({"zero": 2} if ranks else {}))
    start = command(file, ranks)
    line = wrap.format(shlex.join(start.pop("args")) + f" > {world / name}.log 2>&1 < /dev/null")
    subprocess.run(["sh", "-c", line], **start, check=True, timeout=20)
    gone_within(file, TIMEOUT)
    said = (world / f"{name}.log").read_text()
    assert "done: 12 steps" in said and "launcher is gone" not in said, said[-3000:]


@pytest.mark.parametrize(
    "words, program, launching",
    [
        ("/v/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=x", "deepspeed.launcher.launch", True),
        ("python /x/bin/deepspeed --num_gpus 2 llava_nb/train.py", "deepspeed", True),
        ("python /x/bin/ds train.py", "ds", True),
        ("python -X utf8 -m torch.distributed.run train.py", "torch.distributed.run", True),
        ("python3 /x/torchrun train.py", "torchrun", True),
        ("python /x/bin/llava_nb launch c.json", "llava_nb", True),
        ("python -m llava_nb.train launch c.json", "llava_nb.train", True),
        ("python llava_nb/train.py c.json", "train.py", False),
        ("python /x/bin/llava_nb c.json", "llava_nb", False),
        ("bash -c deepspeed", "", False),
        ("nohup deepspeed train.py", "", False),
        ("python -m pytest deepspeed", "pytest", False),
        ("python", "python", False),
        ("", "", False),
    ],
)
def test_a_launcher_is_known_by_its_command(words, program, launching):
    assert program_of(words.split())[0] == program and launches(words.split()) == launching


def test_a_launcher_that_was_gone_before_a_rank_looked_is_missed(monkeypatch):
    assert not orphaned([]) and not orphaned([os.getppid()])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert orphaned([]) and not orphaned([os.getppid()])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("LLAVA_NB_LAUNCHER", "4194999")
    assert orphaned([os.getppid()]) and not orphaned([os.getppid(), 4194999])


@pytest.mark.parametrize(
    "argv",
    [
        "--restarts -1 c.json",
        "--ranks -3 c.json",
        "--ranks two c.json",
        "--restarts 1e3 c.json",
        "--restarts 1.5 c.json",
        "--pause nan c.json",
        "--pause -5 c.json",
        "--pause inf c.json",
        "--restarts",
        "--ranks= c.json",
        "",
    ],
)
def test_a_wish_that_no_launcher_can_meet_is_refused_in_one_line(argv, capsys):
    assert train.main(["launch", *argv.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava_nb launch: ") and said.count("\n") == 1


def test_a_flag_that_nobody_knows_is_refused_by_the_launcher_too(world, capfd):
    assert train.main(["launch", "--ranks", "0", "--restart", "3", str(config(world, "typo")[0])]) == 2
    assert "restart" in capfd.readouterr().err


def data_failed(cause: Exception) -> DataFailed:
    """As the feed raises it."""
    error = DataFailed(str(cause))
    error.__cause__ = cause
    return error


ALL_WORDS = (
    "CUDA out of memory; DataLoader worker (pid 5) is killed; gloo: Connection closed by peer; cannot be decoded"
)


@pytest.mark.parametrize(
    "error, workers, code",
    [
        (data_failed(ValueError(ALL_WORDS)), [], 6),
        (data_failed(ConnectionResetError(ALL_WORDS)), [], 6),
        (data_failed(MemoryError()), [], 9),
        (ValueError(ALL_WORDS), [], None),
        (OSError(ALL_WORDS), [], None),
        (KeyError(ALL_WORDS), [-9], None),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."), [], None),
        (RuntimeError("anything"), [None, -9], 6),
        (RuntimeError("anything"), [None, 0], None),
        (torch.OutOfMemoryError("x"), [], 9),
        (torch.distributed.DistBackendError("x"), [], 8),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), [], 8),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), [], 9),
    ],
)
def test_an_error_is_known_by_its_kind_and_not_by_its_words(error, workers, code):
    """Where it arose, its type, and whether a worker has died; words decide for the bare errors of two libraries alone."""
    assert exit_code_of(error, [SimpleNamespace(exitcode=c) for c in workers]) == code


def test_an_undecodable_image_keeps_its_kind_through_a_worker(tmp_path):
    """As torch's DataLoader hands errors on: a new error of the same type."""
    from torch._utils import ExceptionWrapper

    def handed_on(error: Exception) -> Exception:
        try:
            raise error
        except Exception:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        try:
            wrapped.reraise()
        except Exception as e:
            return e

    dog = SimpleNamespace(workers=[], feed=None)
    assert "doctor CONFIG.json --deep" in _data_line(
        dog, handed_on(UndecodableImage("record 3: a.png: cannot be decoded"))
    )
    assert "doctor" not in _data_line(dog, handed_on(ValueError("record 3: a.png: cannot be decoded")))


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_ended_is_named_with_its_records(world, sign):
    file, _ = config(
        world, f"worker{sign.name}", max_steps=2000, save_steps=1000, dataloader_num_workers=2, hang_timeout=60
    )
    process = started(file, 0, 3)
    workers_of(process)[1].send_signal(sign)
    code, said = ended(process, file)
    line = line_of(said, f"was killed by {sign.name}")
    assert code == 6 and "rank 0: worker 1 (pid" in line and "in hand records " in line and "GB" in line, said[-3000:]


def test_a_stopped_worker_is_named_with_the_records_that_do_not_come(world):
    file, _ = config(
        world, "stopped_worker", max_steps=2000, save_steps=1000, dataloader_num_workers=2, hang_timeout=HANG
    )
    process = started(file, 0, 3)
    worker = workers_of(process)[0]
    worker.send_signal(signal.SIGSTOP)
    code, said = ended(process, file)
    assert code == 6 and f"worker 0 (pid {worker.pid}) does not bring records " in line_of(said, "no sign of life"), (
        said[-3000:]
    )


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_pictures_that_are_gone_are_named(world, workers):
    """The picture of every record is taken away while the run goes on."""
    file, _ = config(
        world,
        f"gone{workers}",
        max_steps=2000,
        save_steps=1000,
        dataloader_num_workers=workers,
        image_folder=str(folder_of_pictures(world, f"pictures{workers}")),
    )
    process = started(file, 0, 2)
    for picture in (world / f"pictures{workers}").iterdir():
        picture.unlink()
    code, said = ended(process, file)
    assert (
        code == 6
        and "is missing" in line_of(said, ".png")
        and "cannot be decoded" not in said
        and f"pictures{workers}/" in said
    ), said[-3000:]


def folder_of_pictures(world: Path, name: str) -> Path:
    (world / name).mkdir()
    for picture in world.glob("*.png"):
        shutil.copy(picture, world / name)
    return world / name


@pytest.fixture(scope="module")
def stalling(tmp_path_factory) -> Path:
    """train.py on a file system that stops answering for the pictures that `STALLED` in their folder names (all, if it is empty; `END`: whose driver ends the process): reading a pipe would be such a wait, but pipes are refused."""
    program = tmp_path_factory.mktemp("stalling") / "stalling.py"
    program.write_text(f"""import os, sys, time
sys.path[0] = {str(ROOT)!r}
from llava_nb.store.images import Folder
from llava_nb.run.command_line import program
opened = Folder.open
def stalls(folder, name):
    mark = folder.root / "STALLED"
    if mark.exists() and mark.read_text() == "END": os._exit(0)
    while mark.exists() and mark.read_text() in ("", name): time.sleep(.1)
    return opened(folder, name)
Folder.open = stalls
program()
""")
    return program


def test_a_read_that_does_not_end_is_named(world, stalling):
    file, _ = config(
        world,
        "stall",
        max_steps=2000,
        save_steps=1000,
        hang_timeout=HANG,
        image_folder=str(folder_of_pictures(world, "slow_disk")),
    )
    process = started(file, 0, 2, program=stalling)
    (world / "slow_disk" / "STALLED").write_text("")
    code, said = ended(process, file)
    assert code == 6 and "this process does not bring records " in line_of(said, "no sign of life"), said[-3000:]


def test_a_worker_that_leaves_without_an_error_is_named_with_its_records(world, stalling):
    file, _ = config(
        world,
        "leaves",
        max_steps=2000,
        save_steps=1000,
        dataloader_num_workers=2,
        hang_timeout=60,
        image_folder=str(folder_of_pictures(world, "leaving")),
    )
    process = started(file, 0, 2, program=stalling)
    (world / "leaving" / "STALLED").write_text("END")
    code, said = ended(process, file)
    line = line_of(said, "ended with exit code 0")
    assert code == 6 and "in hand records " in line, said[-3000:]


@pytest.mark.slow
def test_a_read_that_does_not_end_on_one_of_two_ranks_is_the_cause(world, stalling):
    """The rank that waits for its data speaks before the one that waits for it."""
    file, settings = config(
        world,
        "stall2",
        zero=2,
        max_steps=2000,
        save_steps=1000,
        hang_timeout=2 * HANG,
        image_folder=str(folder_of_pictures(world, "slow_disk2")),
    )
    process = started(file, 2, 2, program=stalling)
    picture = min((world / "slow_disk2").glob("*.png"))
    (world / "slow_disk2" / "STALLED").write_text(picture.name)
    code, said = ended(process, file)
    assert code == 6 and f"does not bring records {picture.stem};" in line_of(said, "no sign of life"), said[-3000:]
    assert len(list(Path(settings["output_dir"]).glob("stacks-rank*.txt"))) == 2


class Failing(Folder):
    """A folder on a file system that fails so many times."""

    def __init__(self, root, times: int):
        super().__init__(root)
        self.left = times

    def open(self, image):
        if self.left:
            self.left -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().open(image)


def test_a_read_that_fails_for_a_moment_is_tried_again_and_then_named(world, capsys, monkeypatch):
    monkeypatch.setattr("llava_nb.store.dataset.PAUSES", (0.01, 0.01, 0.01))
    tokenizer = tiny_tokenizer()
    encoder, transform = (
        Encoder(tokenizer, len(tokenizer) - 1, 16, 256),
        ImageTransform(CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), "pad"),
    )
    records = [r for r in json.loads((world / "records.json").read_text()) if "image" in r]
    data = lambda times: ValidatedDataset(records, get_template("v1"), encoder, transform, Failing(world, times))
    assert torch.equal(data(3).pixels(0), data(0).pixels(0))
    assert [
        f"({k} of 3)" in line and records[0]["image"] in line
        for k, line in enumerate(capsys.readouterr().err.splitlines(), 1)
    ] == [True] * 3
    with pytest.raises(ValueError, match=f"{records[0]['image']}: cannot be read, 4 times .*Input/output error"):
        data(4).pixels(0)


def test_memory_that_is_full_is_said_with_the_row(world):
    """The address space is closed while rows of thousands of tokens come and go."""
    file, settings = config(
        world, "full", max_steps=2000, save_steps=1000, per_device_train_batch_size=96, gradient_accumulation_steps=1
    )
    process = started(file, 0, 2)
    p = psutil.Process(process.pid)
    p.rlimit(psutil.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    code, said = ended(process, file)
    found = json.loads((Path(settings["output_dir"]) / "out_of_memory.json").read_text())
    line = line_of(said, "out of memory in row 0")
    assert (
        code == 9
        and "lower max_tokens" in line
        and f"step {found['step']}: rank 0" in line
        and len(found["records"]) == 96
        and f"{found['tokens']:,} tokens" in line
    ), said[-3000:]


@pytest.mark.parametrize(
    "ranks, changes", [(0, {}), *(pytest.param(2, {"zero": z}, marks=pytest.mark.slow) for z in (2, 3))]
)
def test_a_preflight_changes_nothing(world, ranks, changes):
    name = f"preflight{ranks}{changes.get('zero', '')}"
    found = []
    for on in (True, False):
        file, _ = config(world, f"{name}{on}", preflight=on, max_steps=4, save_steps=4, max_grad_norm=0.5, **changes)
        found.append((launch(file, ranks), weights(world / f"{name}{on}")))
    assert found[0][0] == found[1][0] and farthest(found[0][1], found[1][1]) == 0


def launched(file: Path, ranks: int, restarts: int) -> subprocess.Popen:
    """`llava_nb launch`, as a process that has just said its third step."""
    start = command(file, 0)
    start["args"] = [
        *start["args"][:2],
        "launch",
        "--ranks",
        str(ranks),
        "--restarts",
        str(restarts),
        "--pause",
        "0.1",
        str(file),
    ]
    return running(start, 3)


def running(start: dict, step: int) -> subprocess.Popen:
    """A command that has just said a step."""
    process, said = subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT), []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            return process
    raise AssertionError("the run ended before it logged a step: " + "".join(said)[-3000:])


def test_a_killed_run_is_started_again_and_ends_as_if_nothing_had_been(world):
    quiet, _ = config(world, "quiet", save_steps=1)
    file, _ = config(world, "again", save_steps=1)
    process = launched(file, 0, 2)
    psutil.Process(process.pid).children()[0].kill()
    code, said = ended(process, file)
    assert code == 0 and line_of(said, "exit code 137; restart 1 of 2") and "resuming from" in said, said[-3000:]
    assert (
        losses(world / "again") == launch(quiet, 0)
        and farthest(weights(world / "again"), weights(world / "quiet")) == 0
    )


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_stops_the_run_and_does_not_start_it_again(world, ranks):
    file, settings = config(world, f"told{ranks}", max_steps=2000, save_steps=1000, **({"zero": 2} if ranks else {}))
    process = launched(file, ranks, 2)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process, file)
    assert code == 75 and "by SIGTERM" in said and "restart" not in said, said[-3000:]
    assert len(list(Path(settings["output_dir"]).glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_the_launcher(world):
    file, settings = config(world, "two_again", zero=2, save_steps=2)
    process = launched(file, 2, 1)
    rank_processes(file)[1].kill()
    code, said = ended(process, file)
    assert code == 0 and line_of(said, "exit code 137; restart 1 of 1") and "done: 20 steps" in said, said[-3000:]


@pytest.mark.slow
def test_ranks_with_other_records_are_refused(world):
    """Two ranks, each with a file of records of its own, as on two machines with different copies."""
    records = json.loads((world / "records.json").read_text())
    records[3]["conversations"][1]["value"] += " and more"
    (world / "others.json").write_text(json.dumps(records))
    files = [
        config(world, "mine")[0],
        config(world, "yours", data_path=str(world / "others.json"), output_dir=str(world / "mine"))[0],
    ]
    port, ranks = str(free_port()), []
    for k, file in enumerate(files):
        start = command(file, 0)
        start["env"] |= {
            "RANK": str(k),
            "LOCAL_RANK": str(k),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    (code, said), (other, _) = [ended(p, f) for p, f in zip(ranks, files)]
    assert (code, other) == (2, 2) and "give every rank the same files" in line_of(
        said, "rank 1 differs from rank 0 in records"
    ), said[-3000:]


def test_a_loss_that_jumps_raises_an_alarm_once_and_changes_nothing(capsys):
    from types import SimpleNamespace

    alarm, state, rng = LossAlarm(), SimpleNamespace(is_world_process_zero=True, global_step=0), random.Random(0)
    for state.global_step in range(200):
        alarm.on_log(
            None,
            state,
            None,
            {"loss": 9.0 if state.global_step == 150 else 2 - state.global_step / 400 + rng.uniform(-0.05, 0.05)},
        )
    alarm.on_log(None, state, None, {"loss": float("nan")})
    alarm.on_log(None, state, None, {"eval_loss": 100.0})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("alarm: step 150: the loss 9.0000 lies")
