"""The disk fails, fills up or is shared; a run is killed at every named point of saving, sealing, rotating and exporting."""

import json
import os
import resource
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import (
    ROOT,
    TIMEOUT,
    captions,
    command,
    config,
    farthest,
    launch,
    losses,
    make_world,
    run,
    small_checkpoint,
    started,
    weights,
)

from llava_nb import train
from llava_nb.llava import load_llava
from llava_nb.safe import integrity, storage
from llava_nb.safe.disk_space import _remedy, bytes_in, checkpoint_bytes, remaining_saves
from llava_nb.safe.integrity import MANIFEST, checkpoints, commit_checkpoint, verify_checkpoint
from llava_nb.safe.storage import FAIL_POINTS, StorageFailed

SHORT = {
    "max_steps": 6,
    "save_steps": 2,
    "gradient_accumulation_steps": 4,
    "save_total_limit": 2,
}  # saves at 2, 4 and 6, one rotation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.1)


@pytest.fixture(scope="module")
def whole(world):
    """The run that nothing happens to."""
    return launch(config(world, "whole", **SHORT)[0], 0), weights(world / "whole")


def failing(file: Path, wish: str, ranks: int = 0, once: bool = False) -> subprocess.CompletedProcess:
    """A run that dies or fails at a named point, the first time or each time."""
    how = command(file, ranks)
    env = how["env"] | {"LLAVA_NB_FAIL": wish} | ({"LLAVA_NB_FAIL_ONCE": "1"} if once else {})
    return subprocess.run(**how | {"env": env}, capture_output=True, timeout=TIMEOUT)


def ends_as_if_nothing_had_been(file: Path, whole) -> None:
    out = Path(json.loads(file.read_text())["output_dir"])
    assert launch(file, 0) == whole[0] and farthest(weights(out), whole[1]) == 0
    assert (
        not verify_checkpoint(out)
        and not any(map(verify_checkpoint, checkpoints(out)))
        and not (out / "exporting").exists()
    )


# Fail points

# The durable small files of a run, in order: the trial file, the note of its holder, that nothing is sealed yet, the first manifest, the note of it.
TURNS = {
    "file.new": (2, 3, 4, 5),
    "file.replaced": (2, 3, 4, 5),
    "seal.file": (1, 9),
    "export.moved": (1, 3),
    "aside.begin": (1,),
    "aside.done": (1,),
    "rotate.begin": (1,),
    "rotate.unsealed": (1,),
    "rotate.removed": (1,),
}
ONCE = [name for name in FAIL_POINTS if name.startswith("export.")]
POINTS = [f"{name}:{turn}" for name in FAIL_POINTS for turn in TURNS.get(name, (1,) if name in ONCE else (1, 2))]
CHAIN = [
    "seal.file:3",
    "file.new:4",
    "seal.done:1",
    "rotate.unsealed:1",
    "export.moved:2",
]  # one after another in one folder, every day


def test_every_named_point_lies_in_the_code_and_every_point_in_the_code_is_named():
    import re

    used = [
        name
        for path in (ROOT / "llava_nb").rglob("*.py")
        for name in re.findall(r'fail_point\("([\w.]+)"\)', path.read_text())
    ]
    assert set(used) == set(FAIL_POINTS) and len(FAIL_POINTS) >= 25


def test_killed_at_one_point_after_another_a_run_ends_as_if_nothing_had_been(world, whole):
    file, settings = config(world, "chain", **SHORT)
    out, ever = Path(settings["output_dir"]), False
    for wish in CHAIN:
        done = failing(file, wish)
        assert done.returncode == -signal.SIGKILL, (wish, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
        now = any(not verify_checkpoint(p) for p in checkpoints(out))
        assert now >= ever, wish  # from the first seal on, one that counts at all times
        ever = now
    ends_as_if_nothing_had_been(file, whole)


@pytest.mark.skipif(os.environ.get("FAILPOINTS") != "all", reason="`make torture` kills at all of them")
@pytest.mark.parametrize("wish", POINTS)
def test_killed_at_every_named_point_a_run_ends_as_if_nothing_had_been(world, whole, wish, record_property):
    file, settings = config(world, wish.replace(":", "-"), **SHORT)
    out = Path(settings["output_dir"])
    if wish.startswith("aside"):
        assert failing(file, "seal.hashed:2").returncode == -signal.SIGKILL  # leaves one to be set aside
    sealed = {p.name for p in checkpoints(out) if not verify_checkpoint(p)}
    done = failing(file, wish)
    assert done.returncode == -signal.SIGKILL, (wish, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    assert not sealed or any(not verify_checkpoint(p) for p in checkpoints(out))
    ends_as_if_nothing_had_been(file, whole)
    record_property(
        "reached",
        f"a kill at a named point ({len(FAIL_POINTS)} points), then the same command: the same losses and bit-identical weights",
    )


# Rank 1 while it writes its part, while it hashes its files, when it is through; rank 0 before the manifest, after it, in the middle of the export.
CHAIN_OF_TWO = [
    "save.part:1::1",
    "seal.file:2::1",
    "seal.done:1::1",
    "seal.hashed:2::0",
    "save.noted:1::0",
    "export.moved:2::0",
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, zero", [(2, 3), (1, 2)])
def test_one_of_two_ranks_killed_at_one_point_after_another_a_run_ends_as_if_nothing_had_been(
    world, stage, zero, record_property
):
    """A kill of one rank ends the other, wherever that is then; attention drops out."""
    of_stage = (
        {
            "stage": 1,
            "template": "plain",
            "data_path": str(captions(world)),
            "image_aspect_ratio": "square",
            "projector_lr": None,
        }
        if stage == 1
        else {}
    )
    changes = SHORT | {"gradient_accumulation_steps": 2, "zero": zero} | of_stage
    quiet, file = (config(world, f"{name}{stage}", **changes)[0] for name in ("quiet_two", "killed_two"))
    steps, out = launch(quiet, 2), world / f"killed_two{stage}"
    for wish in CHAIN_OF_TWO:
        done = failing(file, wish, ranks=2)
        assert done.returncode not in (0, 2, 4) and "done:" not in done.stdout, (
            wish,
            done.returncode,
            done.stdout[-2000:],
            done.stderr[-2000:],
        )
    assert launch(file, 2) == steps and farthest(weights(out), weights(world / f"quiet_two{stage}")) == 0
    assert not verify_checkpoint(out) and not any(map(verify_checkpoint, checkpoints(out)))
    record_property(
        "reached",
        f"{len(CHAIN_OF_TWO)} kills of one of two ranks at named points (stage {stage}, ZeRO-{zero}): the same losses and bit-identical weights",
    )


# A save that fails


def test_a_save_that_fails_removes_its_rubbish_raises_an_alarm_and_training_goes_on(world, whole):
    file, settings = config(world, "once", **SHORT)
    done = failing(file, "save.weights:1:ENOSPC:9")  # a rank that there is not: nothing happens
    assert done.returncode == 0 and "ALARM" not in done.stderr
    for where in ("save.weights", "save.part", "seal.file", "seal.hashed"):
        file, settings = config(world, f"once-{where}", **SHORT)
        out = Path(settings["output_dir"])
        done = failing(file, f"{where}:1:ENOSPC", once=True)
        assert done.returncode == 0, (where, done.stdout[-2000:] + done.stderr[-2000:])
        assert (
            done.stderr.count("ALARM: checkpoint-2 could not be saved") == 1
            and "No space left" in done.stderr
            and "1 of 3 failures" in done.stderr
        )
        assert [p.name for p in checkpoints(out)] == ["checkpoint-4", "checkpoint-6"]
        assert losses(out) == whole[0] and farthest(weights(out), whole[1]) == 0


def test_a_sealed_checkpoint_stays_when_what_comes_after_it_fails(world):
    file, settings = config(world, "after", **SHORT)
    done = failing(file, "save.noted:1:EIO", once=True)
    assert (
        done.returncode == 0
        and done.stderr.count("ALARM: checkpoint-2 is sealed, and what comes after that failed") == 1
    )
    assert [p.name for p in checkpoints(Path(settings["output_dir"]))] == [
        "checkpoint-4",
        "checkpoint-6",
    ]  # it was whole, and rotated like any other


def limited(file: Path, limit: int) -> subprocess.CompletedProcess:
    """A run that may write no file longer than `limit`: what a quota or a full disk says, by the system itself."""
    return subprocess.run(
        **command(file, 0),
        capture_output=True,
        timeout=TIMEOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_after_three_failures_in_a_row_a_run_ends_cleanly_and_goes_on_when_there_is_room(world, whole):
    file, settings = config(world, "full", **SHORT | {"save_steps": 1})
    out, quiet = Path(settings["output_dir"]), config(world, "quiet", **SHORT | {"save_steps": 1})[0]
    done = limited(file, 300_000)
    assert done.returncode == 7, done.stdout[-2000:] + done.stderr[-2000:]
    assert (
        done.stderr.count("ALARM:") == 3
        and "File too large" in done.stderr
        and "step 3 of 6" in done.stderr.splitlines()[-1]
        and "there is no checkpoint" in done.stderr
    )
    assert "Traceback" not in done.stderr and not checkpoints(out) and not (out / "model.safetensors").exists()
    assert launch(file, 0) == launch(quiet, 0)


def test_a_result_that_cannot_be_written_is_no_success(world, whole):
    file, settings = config(world, "unwritten", **SHORT)
    done = failing(file, "export.written:1:EDQUOT")
    assert done.returncode == 7 and "resumes from checkpoint-6" in done.stderr and "done:" not in done.stdout
    assert not (Path(settings["output_dir"]) / "model.safetensors").exists()
    ends_as_if_nothing_had_been(file, whole)


def test_a_rank_that_cannot_write_stops_no_other(world):
    """Two ranks under ZeRO-3: rank 1's part fails once, both go on and end."""
    file, settings = config(world, "two", **SHORT | {"gradient_accumulation_steps": 2, "zero": 3})
    done = failing(file, "save.part:1:EIO:1", ranks=2, once=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "rank 1: [Errno 5] Input/output error" in done.stderr and not verify_checkpoint(Path(settings["output_dir"]))
    assert [p.name for p in checkpoints(Path(settings["output_dir"]))] == ["checkpoint-4", "checkpoint-6"]


# A disk that is just large enough


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, as small as is told."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"only root may mount a file system ({done.stderr.strip()})")
        return place

    yield mounted
    subprocess.run(["umount", str(place)], capture_output=True)


LEAST = {"max_steps": 8, "save_steps": 2, "gradient_accumulation_steps": 4, "save_total_limit": 2}


def enough(world: Path) -> int:
    """What a run asks for at its start: three checkpoints and a fifth; and a little for the notes."""
    return int(3.6 * checkpoint_bytes(load_llava(world / "start"))) + 200_000


def test_a_run_that_fitted_its_disk_goes_on_after_a_kill_at_any_point(world, disk):
    """Two are sealed and the third is being written; three are sealed; the result is written, sealed, in its place by half."""
    quiet, small = launch(config(world, "roomy", **LEAST)[0], 0), disk(enough(world))
    file, _ = config(world, "small", **LEAST | {"output_dir": str(small / "run")})
    for wish in ("save.index:3", "rotate.begin:1", "export.written:1", "export.moved:2"):
        done = failing(file, wish)
        assert done.returncode == -signal.SIGKILL, (wish, done.returncode, done.stderr[-2000:])
    ends_as_if_nothing_had_been(file, (quiet, weights(world / "roomy")))
    assert bytes_in([small / "run"]) > 0.4 * enough(world)  # it was no disk of plenty


def fill(place: Path, leave: int) -> Path:
    """A file of somebody else."""
    (place / "others").write_bytes(bytes(shutil.disk_usage(place).free - leave))
    return place / "others"


def test_when_all_steps_are_done_room_is_asked_for_the_result_alone_and_then_for_nothing(world, disk):
    small = disk(enough(world))
    file, _ = config(world, "full_at_the_end", **LEAST | {"output_dir": str(small / "run")})
    assert failing(file, "export.written:1:ENOSPC").returncode == 7
    shutil.rmtree(small / "run" / "exporting")
    others = fill(small, 1_000_000)
    done = run(file, 0)
    line = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 7
        and "and the result takes" in line
        and "checkpoints of" not in line
        and "0.0 GB" not in line
        and "--save_total_limit" not in line
    )
    others.unlink()
    assert run(file, 0).returncode == 0 and not verify_checkpoint(small / "run")
    fill(small, 100_000)
    done = run(file, 0)
    assert done.returncode == 0 and "nothing was left to do" in done.stdout, done.stderr[-2000:]


def test_the_remedy_for_a_full_disk_is_one_that_changes_something(tmp_path):
    for name, size in (("damaged-checkpoint-3", 2_000_000), ("damaged-checkpoint-4", 500_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    remedy = _remedy(tmp_path, fewer=True)
    assert remedy == "keep fewer with --save_total_limit 2, remove damaged-checkpoint-3, damaged-checkpoint-4 (2.5 MB)"
    with pytest.raises(StorageFailed, match="make room, or name another output_dir"):
        storage.check_room(tmp_path, 10**18, "all", "")
    assert [storage.amount(n) for n in (12, 28_500_000, 98e9)] == ["12 bytes", "28.5 MB", "98.0 GB"]


@pytest.mark.parametrize(
    "settings, done, left",
    [
        ({"max_steps": 10, "save_steps": 3}, 0, 4),
        ({"max_steps": 10, "save_steps": 3}, 6, 2),
        ({"max_steps": 10, "save_steps": 3}, 10, 0),
        ({"max_steps": 10, "save_steps": 0.5}, 5, 1),
        ({"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}, 4, 2),
        ({"max_steps": 10, "save_strategy": "no"}, 0, 0),
        ({"max_steps": 9, "save_steps": 3}, 7, 1),
    ],
)
def test_saves_that_are_left(settings, done, left):
    assert (
        remaining_saves(
            SimpleNamespace(**{"save_strategy": "steps", "save_steps": 500, "num_train_epochs": 3} | settings), 4, done
        )
        == left
    )


# A folder of somebody else, and a folder that is lost


WRITTEN = (
    ".tried",
    ".tried.new",
    "run.json",
    "run.json.new",
    "config_resolved.json",
    "quarantine.jsonl",
    "stacks-rank0.txt",
    "trainer_state.json",
    "MANIFEST.json",
    "MANIFEST.json.new",
    "findings.html",
    "findings.jsonl",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "processor_config.json",
    "generation_config.json",
)


def test_nothing_is_written_through_a_link_in_a_runs_folder(world, tmp_path):
    records = json.loads((world / "records.json").read_text())
    records[0]["conversations"][1]["value"] = ""
    (world / "one_bad.json").write_text(json.dumps(records))
    file, settings = config(
        world,
        "linked",
        max_steps=1,
        save_steps=1,
        data_path=str(world / "one_bad.json"),
        bad_records="skip",
        max_bad_records="50%",
    )
    out = Path(settings["output_dir"])
    out.mkdir()
    for name in WRITTEN:
        (tmp_path / name).write_text("precious")
        (out / name).symlink_to(tmp_path / name)
    done = run(file, 0)
    assert done.returncode == 0, done.stderr[-2000:]
    assert train.main(["doctor", str(file)]) == 0
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(WRITTEN, "precious")
    left = {p.name for p in out.iterdir() if p.is_symlink()}
    assert left <= {"MANIFEST.json.new"} and not verify_checkpoint(out) and (out / "quarantine.jsonl").stat().st_size


def test_the_notes_of_a_run_that_fails_are_not_written_through_a_link(world, tmp_path):
    file, settings = config(world, "linked_nan", learning_rate=1e20, projector_lr=None, max_steps=9, save_steps=9)
    out = Path(settings["output_dir"])
    out.mkdir()
    (tmp_path / "notes").write_text("precious")
    (out / "not_finite.json").symlink_to(tmp_path / "notes")
    assert run(file, 0).returncode == 5
    assert (tmp_path / "notes").read_text() == "precious" and json.loads((out / "not_finite.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["checkpoint-3", "start", "exporting", "runs", "run.lock"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_where_a_run_would_fill_a_folder_is_refused_with_a_remedy(world, tmp_path, capsys, name, there):
    file, settings = config(world, f"linked-{name}-{there}", use_cpu=True)
    out, target = Path(settings["output_dir"]), tmp_path / "target"
    out.mkdir(exist_ok=True)
    (out / name).symlink_to(target)
    if there and name == "run.lock":
        target.write_text("precious")
    elif there:
        target.mkdir()
        (target / "MANIFEST.json").write_text("precious")
    assert train.main([str(file)]) == 2
    said = capsys.readouterr().err
    assert (
        f"{name} is a link to" in said
        and "remove the link, or name another output_dir" in said
        and said.count("\n") == 1
    )
    assert target.exists() == there and (
        not there or (target if target.is_file() else target / "MANIFEST.json").read_text() == "precious"
    )


def test_an_output_folder_may_itself_be_a_link(world, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (world / "link").symlink_to(tmp_path / "large_disk")
    launch(config(world, "through", output_dir=str(world / "link"), max_steps=1, save_steps=1)[0], 0)
    assert not verify_checkpoint(tmp_path / "large_disk")


@pytest.mark.parametrize("what", ["removed", "moved", "replaced"])
def test_a_folder_that_is_lost_under_a_run_is_noticed_at_the_next_save_and_another_runs_is_left_alone(world, what):
    file, settings = config(world, f"lost-{what}", max_steps=2000, save_steps=9, save_total_limit=1)
    out, theirs = Path(settings["output_dir"]), {}
    process = started(file, 0, 10)
    if what == "removed":
        shutil.rmtree(out)
    else:
        out.rename(world / f"away-{what}")
    if what == "replaced":
        for step in (9, 18, 27):
            (out / f"checkpoint-{step}").mkdir(parents=True)
            (out / f"checkpoint-{step}" / "model.safetensors").write_text(str(step))
            commit_checkpoint(out / f"checkpoint-{step}")
        (out / "run.lock").touch()
        theirs = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    said, _ = process.communicate(timeout=TIMEOUT)
    lines = [line for line in said.splitlines() if line.startswith("llava_nb:")]
    assert (
        process.returncode == 7
        and len(lines) == 1
        and "was removed, moved or replaced while this run trained in it" in lines[0]
        and "Traceback" not in said
    ), said[-3000:]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == theirs and ("ALARM" not in said)


def test_a_folder_that_is_lost_is_noticed_at_the_end(world):
    file, settings = config(world, "lost_late", max_steps=12, save_strategy="no")
    process = started(file, 0, 5)
    shutil.rmtree(settings["output_dir"])
    said, _ = process.communicate(timeout=TIMEOUT)
    assert (
        process.returncode == 7
        and "its run.lock is gone" in said
        and "Traceback" not in said
        and not Path(settings["output_dir"]).exists()
    )


def test_an_interrupted_save_goes_and_what_lost_its_manifest_is_set_aside(tmp_path, capsys):
    for step in (3, 6, 9, 12):
        small_checkpoint(tmp_path / f"checkpoint-{step}", step, sealed=step != 12)
    (tmp_path / "checkpoint-9" / MANIFEST).unlink()
    (tmp_path / "checkpoint-6" / integrity.UNSEALED).touch()  # killed between its manifest and the removal of the mark
    assert integrity.resolve_resume(None, tmp_path) == str(tmp_path / "checkpoint-6")
    said = capsys.readouterr().out
    assert (
        "checkpoint-12: saving it was interrupted; removed" in said
        and "checkpoint-9: it has no readable MANIFEST.json" in said
        and "quarantined as damaged-checkpoint-9" in said
    )
    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "damaged-checkpoint-9",
    ] and not verify_checkpoint(tmp_path / "checkpoint-6")


# Before the first step


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_read(world, capsys):
    for folder in ("/proc/run", str(world / "records.json" / "run")):
        file, _ = config(world, "nowhere", output_dir=folder, use_cpu=True)
        assert train.main([str(file)]) in (2, 7)
        said = capsys.readouterr().err
        assert folder in said and said.count("\n") == 1


def test_a_run_that_would_fill_its_disk_is_refused(world, capsys, monkeypatch):
    file, _ = config(world, "huge", use_cpu=True, save_steps=1)
    real = storage.shutil.disk_usage
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: real(path)._replace(free=20_000_000))
    assert train.main([str(file)]) == 7
    said = capsys.readouterr().err
    assert (
        "20 checkpoints of" in said
        and "--save_total_limit 2" in said
        and len([line for line in said.splitlines() if line.startswith("llava_nb:")]) == 1
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save_total_limit": 1, "max_steps": 2}))
    assert train.main([str(file)]) == 0


def test_a_second_run_in_one_folder_is_refused_and_told_who_holds_it(world, capsys):
    file, settings = config(world, "shared", use_cpu=True)
    out = Path(settings["output_dir"])
    storage.make_folder(out)
    with storage.hold(out):
        done = run(file, 0)
        assert (
            done.returncode == 2
            and f"process {os.getpid()} on " in done.stderr
            and "has been training in it since" in done.stderr
            and done.stderr.count("\n") == 1
        )
        done = run(file, 2)
        assert done.returncode != 0 and done.stderr.count("has been training in it since") == 1
    assert not checkpoints(out)


# What is known of earlier progress


def test_progress_that_is_gone_is_missed(tmp_path):
    storage.make_folder(tmp_path)
    storage.note(tmp_path, sealed="checkpoint-12")
    with pytest.raises(
        storage.NoCheckpoint, match="committed checkpoint-12 here, and it is gone; put it back, or remove run.json"
    ):
        integrity.resolve_resume(None, tmp_path)


def test_verify_says_what_is_whole_and_what_is_not(world, whole, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(world / "whole", copy)
    assert train.main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "checkpoint-4: whole, can be resumed",
        "checkpoint-6: whole, can be resumed",
        "result: whole, as it was written",
    ]
    (copy / "config.json").write_text("{}")
    (copy / "checkpoint-6" / MANIFEST).unlink()
    assert train.main(["verify", str(copy)]) == 4
    said = capsys.readouterr().out
    assert (
        "BAD  checkpoint-6: it has no readable MANIFEST.json" in said and "BAD  result: config.json has 2 bytes" in said
    )
    assert train.main(["verify", str(tmp_path / "no")]) == 2 and train.main(["verify", str(tmp_path)]) == 4


# A power cut: what is not durable may be lost


def test_a_power_cut_at_any_moment_of_a_save_leaves_a_checkpoint_that_is_resumed(tmp_path, monkeypatch):
    """At each moment at which something reaches the disk, the machine dies: every file whose content was not made durable is empty, every name that its folder has not yet kept is gone."""
    run_dir, fsync, replace, kept, files = tmp_path / "run", os.fsync, os.replace, set(), {}

    def save(step):
        small_checkpoint(run_dir / f"checkpoint-{step}", step)

    save(1)
    sound, outcomes = {p for p in run_dir.rglob("*")}, []

    def cut():
        dead = tmp_path / f"cut{len(outcomes)}"
        shutil.copytree(run_dir, dead)
        for path in dead.rglob("*"):
            here = run_dir / path.relative_to(dead)
            if here in sound or path.is_dir():
                continue
            if str(here) not in kept:
                path.unlink()  # its folder did not keep the name
            elif str(here) not in files:
                path.write_text("")  # nor the disk its content
        with monkeypatch.context() as calm:
            calm.setattr(os, "fsync", fsync)
            calm.setattr(os, "replace", replace)
            found = integrity.resolve_resume(None, dead)
            assert not verify_checkpoint(found)
        outcomes.append(Path(found).name)

    def durable(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        fsync(fd)
        cut()
        if os.path.isdir(path):
            kept.update(str(p) for p in Path(path).iterdir())
        else:
            files[path] = True
        cut()

    def renamed(a, b):
        if str(a) in files:
            files[str(b)] = True
        replace(a, b)
        cut()
        kept.add(str(b))
        cut()
        kept.discard(str(b))  # a file system may keep a name sooner

    monkeypatch.setattr(os, "fsync", durable)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(
        integrity, "ThreadPoolExecutor", lambda threads: ThreadPoolExecutor(1)
    )  # one file after another, so that every moment is seen
    save(2)
    monkeypatch.undo()
    assert outcomes[0] == "checkpoint-1" and outcomes[-1] == "checkpoint-2" and len(outcomes) > 15


def test_files_are_durable_before_the_manifest_says_so_and_their_folders_too(tmp_path, monkeypatch):
    """The order of what reaches the disk: every file, every folder that lists them, the manifest, its folder."""
    folder = tmp_path / "checkpoint-1"
    (folder / "parts").mkdir(parents=True)
    for name in ("a", "parts/b"):
        (folder / name).write_bytes(b"x" * 100)
    events, fsync, replace = [], os.fsync, os.replace
    where = lambda fd: os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(where(fd)), fsync(fd)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(f"-> {os.path.relpath(b, tmp_path)}"), replace(a, b))
    )
    commit_checkpoint(folder)
    manifest = f"checkpoint-1/{MANIFEST}"
    assert events[-3:] == [f"{manifest}.new", f"-> {manifest}", "checkpoint-1"]
    assert set(events[:2]) == {"checkpoint-1/a", "checkpoint-1/parts/b"} and set(events[2:-3]) == {
        "checkpoint-1/parts",
        "checkpoint-1",
        ".",
    }
