"""What a run survives: a checkpoint half written or changed, a kill at any instant, a signal to any rank, a gradient that is no number."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from runs import (
    ROOT,
    TIMEOUT,
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_nb.safe.integrity import (
    MADE_WITH,
    MANIFEST,
    PLACE,
    UNSEALED,
    checkpoints,
    commit_checkpoint,
    resolve_resume,
    rotate,
    verify_checkpoint,
)
from llava_nb.safe.state import STATE_FILE, part_file
from llava_nb.safe.storage import NoCheckpoint, hold, known, note


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.1)


@pytest.fixture(scope="module")
def whole(world):
    """The run that nothing happens to, every step saved."""
    return launch(config(world, "whole", save_steps=1, gradient_accumulation_steps=4)[0], 0), weights(world / "whole")


def checkpoint(run_dir: Path, step: int, sealed: bool = True) -> Path:
    """A small one; one that is not sealed has lost its mark too, as after a power cut."""
    folder = small_checkpoint(run_dir / f"checkpoint-{step}", step, sealed)
    if not sealed:
        (folder / UNSEALED).unlink()
    return folder


def test_every_changed_byte_and_every_missing_file_of_a_sealed_checkpoint_is_found(tmp_path):
    folder = checkpoint(tmp_path, 1)
    assert not verify_checkpoint(folder)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        kept = path.read_bytes()
        for k in range(len(kept)):
            path.write_bytes(kept[:k] + bytes([kept[k] ^ (1 << k % 8)]) + kept[k + 1 :])
            assert verify_checkpoint(folder), (path.name, k)
        for wrong in (kept[:-1], kept + b" ", b""):
            path.write_bytes(wrong)
            assert verify_checkpoint(folder)
        path.unlink()
        assert verify_checkpoint(folder)
        path.write_bytes(kept)
    assert not verify_checkpoint(folder)


def test_the_newest_sound_checkpoint_is_taken_and_the_others_are_set_aside_by_name(tmp_path, capsys):
    for step in (5, 9, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, sealed=False)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_bytes(
        b"x" * (tmp_path / "checkpoint-10" / "trainer_state.json").stat().st_size
    )
    assert resolve_resume(None, tmp_path) == str(tmp_path / "checkpoint-9")
    said = capsys.readouterr().out
    assert (
        "checkpoint-11: it has no readable MANIFEST.json: saving it was interrupted; quarantined as damaged-checkpoint-11"
        in said
        and "checkpoint-10: trainer_state.json was changed" in said
    )
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-9"] and (
        tmp_path / "damaged-checkpoint-10" / "projector.safetensors"
    ).is_file()


def edited(name: str, **changes):
    """Change a JSON of a checkpoint."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def of_step_5(name: str):
    return lambda folder: shutil.copy(folder.with_name("checkpoint-5") / name, folder / name)


def part(change):
    """Change the tensors and the header of a rank's file."""

    def changed(folder: Path) -> None:
        path = folder / part_file(0)
        with safe_open(path, framework="pt") as f:
            about = dict(f.metadata())
        tensors = load_file(path)
        change(tensors, about)
        save_file(tensors, path, metadata=about)

    return changed


SPOILT = {
    "part of step 5": of_step_5(part_file(0)),
    "state of step 5": of_step_5(STATE_FILE),
    "place of step 5": of_step_5(PLACE),
    "weights of step 5": of_step_5("projector.safetensors"),
    **{
        f"{name}: {text[:9]!r}": written(name, text)
        for name in (STATE_FILE, PLACE, MADE_WITH)
        for text in ("[]", "{}", "7", "", "{", '{"a":' * 2000, "\0" * 60)
    },
    **{f"global_step {v!r}": edited(PLACE, global_step=v) for v in ("x", -7, 10**30, None, 1.5, True, "10")},
    **{f"log_history {v!r}": edited(PLACE, log_history=v) for v in ("x", [1], [{"loss": "x"}])},
    "a key of nobody": edited(PLACE, foo=1),
    **{
        f"state: {k} {v!r}": edited(STATE_FILE, **{k: v})
        for k, v in [
            ("ranks", 0),
            ("ranks", "1"),
            ("ranks", 2),
            ("step", 9),
            ("skipped_steps", 11),
            ("groups", []),
            ("groups", [{"lr": "x"}]),
            ("schedule", {}),
            ("schedule", {"last_epoch": 11}),
            ("scaler", 3),
            ("parameters", {}),
        ]
    },
    **{f"global_batch {v!r}": edited(MADE_WITH, global_batch=v) for v in (0, "4", None)},
    "no random states": part(lambda t, about: [t.pop(k) for k in list(t) if k.startswith("random/")]),
    "random states of another kind": part(lambda t, about: about.update(random="[]")),
    "random words cut": part(lambda t, about: t.update({"random/python": t["random/python"][:3].clone()})),
    "a part without its step": part(lambda t, about: about.pop("step")),
    "the part of another rank": part(lambda t, about: about.update(rank="1 of 2")),
    "a part without weights": part(lambda t, about: [t.pop(k) for k in list(t) if k.startswith("master/")]),
    "weights cut": written("projector.safetensors", "x" * 99),
    "config.json cut": written("config.json", "{"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_changed_and_sealed_again_is_told_in_one_line_and_the_one_before_is_resumed(tmp_path, capsys, what):
    for step in (5, 10):
        checkpoint(tmp_path, step)
    SPOILT[what](tmp_path / "checkpoint-10")
    commit_checkpoint(tmp_path / "checkpoint-10")
    assert not verify_checkpoint(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError) as e:
        resolve_resume(str(tmp_path / "checkpoint-10"), tmp_path)
    assert "\n" not in str(e.value) and (
        not isinstance(e.value, NoCheckpoint) or "valid ones in" in str(e.value) and "checkpoint-5" in str(e.value)
    )
    assert resolve_resume(None, tmp_path) == str(tmp_path / "checkpoint-5")
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and said.startswith("checkpoint-10: ")
        and said.endswith("; quarantined as damaged-checkpoint-10\n")
        and len(said) < 600
    )


def test_a_damaged_note_of_a_run_and_an_odd_manifest_are_no_traceback(tmp_path):
    for text in ("[]", "{", '{"sealed": 7, "pid": []}', "[" * 100_000, "\0"):
        (tmp_path / "run.json").write_text(text)
        assert known(tmp_path).get("sealed") is None
        with hold(tmp_path):
            pass
        assert json.loads((tmp_path / "run.json").read_text())["pid"] == os.getpid()
    folder = checkpoint(tmp_path, 3)
    for text in (
        "[]",
        "7",
        "{}",
        '{"files": []}',
        '{"files": {"a": 1}, "seal": ""}',
        "[" * 100_000,
        '{"files": {"config.json": {"bytes": "x"}}, "seal": "x"}',
    ):
        (folder / MANIFEST).write_text(text)
        assert verify_checkpoint(folder) == "its MANIFEST.json was changed"


def test_a_run_whose_newest_checkpoint_was_mixed_goes_on_from_the_one_before(world, whole):
    """A rank's file of step 19 in step 20, sealed again: the run ends as if nothing had been."""
    file, settings = config(world, "mixed", save_steps=1, gradient_accumulation_steps=4)
    out = Path(settings["output_dir"])
    out.mkdir()
    for step in (18, 19):
        shutil.copytree(world / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    shutil.copy(out / "checkpoint-18" / part_file(0), out / "checkpoint-19" / part_file(0))
    commit_checkpoint(out / "checkpoint-19")
    done = run(file, 0)
    assert (
        done.returncode == 0
        and "is of step '18', state.json of step 19; quarantined as damaged-checkpoint-19" in done.stdout
        and "resuming from" in done.stdout
    ), done.stdout + done.stderr
    assert losses(out) == whole[0] and farthest(weights(out), whole[1]) == 0


def test_a_checkpoint_that_goes_while_it_is_read_is_told_in_one_line(world, whole, capsys, monkeypatch):
    """As when another run, or a person, removes it just then."""
    from llava_nb import train
    from llava_nb.safe import reliable_trainer

    file, settings = config(world, "vanishing", save_steps=1, gradient_accumulation_steps=4, use_cpu=True)
    out = Path(settings["output_dir"])
    out.mkdir()
    shutil.copytree(world / "whole" / "checkpoint-19", out / "checkpoint-19")
    monkeypatch.setattr(reliable_trainer, "restore_weights", lambda model, folder: shutil.rmtree(folder))
    assert train.main([str(file)]) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava_nb:")]
    assert len(said) == 1 and "checkpoint-19: went away while it was read" in said[0]


def test_a_run_never_starts_over_by_itself(tmp_path):
    with pytest.raises(NoCheckpoint, match="nothing to resume, no checkpoint"):
        resolve_resume("True", tmp_path)
    checkpoint(tmp_path, 3, sealed=False)
    with pytest.raises(
        NoCheckpoint, match="checkpoint-3: it has no readable MANIFEST.json.*move them away to start over"
    ):
        resolve_resume(None, tmp_path)
    with pytest.raises(NoCheckpoint, match="holds checkpoint-3 of an earlier run"):
        resolve_resume("False", tmp_path)
    checkpoint(tmp_path, 2)
    with pytest.raises(NoCheckpoint, match="cannot be resumed, .* valid ones in .*: checkpoint-2"):
        resolve_resume(str(tmp_path / "checkpoint-3"), tmp_path)


def test_only_a_run_that_has_sealed_nothing_yet_begins_again(tmp_path, capsys):
    assert resolve_resume(None, tmp_path) is None
    checkpoint(tmp_path, 3, sealed=False)
    assert json.loads((tmp_path / "run.json").read_text()) == {"sealed": None}
    with pytest.raises(NoCheckpoint, match="nothing to resume, checkpoint-3"):
        resolve_resume("True", tmp_path)
    assert resolve_resume(None, tmp_path) is None and "quarantined as damaged-checkpoint-3" in capsys.readouterr().out
    note(tmp_path, sealed="checkpoint-9")
    with pytest.raises(NoCheckpoint, match="committed checkpoint-9 here, and it is gone"):
        resolve_resume(None, tmp_path)


def test_rotation_keeps_two_sealed_ones_at_least(tmp_path):
    for step in (1, 2, 3, 12):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, sealed=False)
    rotate(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4", "checkpoint-12"]


def test_a_run_keeps_as_many_sealed_checkpoints_as_it_is_told(world):
    launch(config(world, "kept", save_steps=4, save_total_limit=1)[0], 0)
    assert [p.name for p in checkpoints(world / "kept")] == ["checkpoint-16", "checkpoint-20"] and not any(
        map(verify_checkpoint, checkpoints(world / "kept"))
    )


@pytest.mark.parametrize("ranks, changes", [(0, {}), (2, {"zero": 2}), (2, {"zero": 3})])
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_weights_change(world, ranks, changes):
    """A rate of 1e20 makes the weights huge at the second step and the third step's gradient NaN: a real one."""
    name = f"nan{ranks}{changes.get('zero', '')}"
    done = run(config(world, name, learning_rate=1e20, projector_lr=None, save_steps=1, **changes)[0], ranks)
    assert done.returncode == 5, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((world / name / "not_finite.json").read_text())
    line = next(line for line in done.stderr.splitlines() if "the gradient is not finite" in line)
    assert (
        f"step {found['step']}:" in line
        and "no weight was changed" in line
        and found["rows"]
        and all(r["records"] for r in found["rows"])
    )
    assert {r["rank"] for r in found["rows"]} <= set(range(max(ranks, 1))) and set(
        sum((r["records"] for r in found["rows"]), [])
    ) <= {str(k) for k in range(96)}
    assert checkpoints(world / name)[-1].name == f"checkpoint-{found['step'] - 1}" and "done:" not in done.stdout
    assert not (world / name / "model.safetensors").exists()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(world, whole, sign):
    file, settings = config(world, f"signal{sign.name}", save_steps=1000, gradient_accumulation_steps=4)
    process = started(file, 0, 3)
    process.send_signal(sign)
    time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(sign)  # a second one changes nothing
    said = process.stdout.read()
    assert process.wait(TIMEOUT) == 75, said
    (left,) = checkpoints(Path(settings["output_dir"]))
    assert f"by {sign.name}; the same command resumes from {left.name}" in said and not verify_checkpoint(left)
    assert launch(file, 0) == whole[0] and farthest(weights(Path(settings["output_dir"])), whole[1]) == 0


def test_a_signal_at_any_instant_ends_a_run_with_75_and_nothing_is_lost(world, whole, record_property):
    """From the first import to the export, with workers, which change nothing either. SIGNALS says how many: 2 every day, 20 by `make torture`."""
    rng, ends = random.Random(int(os.environ.get("SIGNALS", 2))), []
    for k in range(int(os.environ.get("SIGNALS", 2))):
        file, settings = config(
            world, f"instant{k}", save_steps=7, gradient_accumulation_steps=4, dataloader_num_workers=2
        )
        process = subprocess.Popen(**command(file, 0), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(rng.uniform(0.5, 12))
        process.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]) if k % 2 else signal.SIGTERM)
        said = process.stdout.read()
        ends.append(process.wait(TIMEOUT))
        assert ends[-1] in (75, 0), said
        assert (ends[-1] == 0) == ("done:" in said), said
        assert launch(file, 0) == whole[0] and farthest(weights(Path(settings["output_dir"])), whole[1]) == 0
    record_property(
        "reached",
        f"{len(ends)} signals at random instants: {ends.count(75)} runs stopped with code 75, {ends.count(0)} had just ended; all went on to bit-identical weights",
    )


def test_a_signal_after_the_result_is_on_the_disk_leaves_the_run_finished(world, whole):
    file, settings = config(world, "late", gradient_accumulation_steps=4)
    late = "import os, signal, sys, llava_nb.run.messages as messages; from llava_nb.run.command_line import program; sys.argv[0] = 'train.py'; said = messages.summary; messages.summary = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), said(*a))[1]; program()"
    how = command(file, 0)
    how["args"] = [how["args"][0], "-c", late, str(file)]
    how["env"] |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    done = subprocess.run(**how, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0 and "done: 20 steps" in done.stdout, done.stdout + done.stderr
    assert farthest(weights(Path(settings["output_dir"])), whole[1]) == 0


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_as_if_nothing_had_been(world):
    file, settings = config(world, "one_rank", zero=3, save_steps=1000)
    process = started(file, 2, 3)
    rank1 = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "--local_rank=1" in p.cmdline()
        and "train.py" in " ".join(p.cmdline())
        and "launch" not in " ".join(p.cmdline())
    ]
    os.kill(rank1[0].pid, signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(TIMEOUT) == 75, said
    assert len(checkpoints(Path(settings["output_dir"]))) == 1
    quiet, _ = config(world, "two_ranks", zero=3, save_steps=1000)
    assert launch(file, 2) == launch(quiet, 2)
    assert farthest(weights(world / "one_rank"), weights(world / "two_ranks")) == 0


def killed(file: Path, out: Path, rng: random.Random, kills: int) -> tuple[int, int]:
    """Start and kill a run until it has been killed so often, or is done; how often, and how often inside a save."""
    inside = 0
    for k in range(kills):
        process = subprocess.Popen(**command(file, 0), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.stdout.read()
        if process.wait(TIMEOUT) == 0:
            return k, inside
        inside += any(not (p / MANIFEST).is_file() for p in checkpoints(out))
    return kills, inside


def test_killed_at_random_instants_a_run_ends_as_if_nothing_had_been(world, whole, record_property):
    """Every step saves, so that many kills fall into a save. KILLS says how many: 4 every day, 50 by `make torture`."""
    wanted, total, inside, rng = int(os.environ.get("KILLS", 4)), 0, 0, random.Random(7)
    for round in itertools.count():
        file, settings = config(world, f"killed{round}", save_steps=1, gradient_accumulation_steps=4)
        out = Path(settings["output_dir"])
        found = killed(file, out, rng, min(4, wanted - total))
        total, inside = total + found[0], inside + found[1]
        assert launch(file, 0) == whole[0] and farthest(weights(out), whole[1]) == 0, round
        assert not any(map(verify_checkpoint, checkpoints(out)))
        if total >= wanted:
            break
    record_property(
        "reached",
        f"{total} kills at random instants, {inside} of them inside a save: all went on to the same losses and bit-identical weights",
    )


def test_a_finished_run_has_nothing_left_to_do(world, whole):
    file, settings = config(world, "whole", save_steps=1, gradient_accumulation_steps=4)
    done = run(file, 0)
    assert done.returncode == 0 and "nothing was left to do: all 20 steps" in done.stdout
    assert losses(world / "whole") == whole[0] and farthest(weights(world / "whole"), whole[1]) == 0
    assert (world / "whole" / "checkpoint-20" / MANIFEST).is_file() and not (world / "whole" / "checkpoint-21").exists()


def test_other_words_of_the_same_length_in_the_records_are_refused(world, whole, tmp_path, capsys):
    from llava_nb import train

    records = json.loads((world / "records.json").read_text())
    answer = records[5]["conversations"][1]
    answer["value"] = answer["value"][::-1].replace(" ", "_").replace("_", " ")
    (world / "reworded.json").write_text(json.dumps(records))
    file, settings = config(
        world,
        "edited",
        save_steps=1,
        gradient_accumulation_steps=4,
        data_path=str(world / "reworded.json"),
        use_cpu=True,
        resume=str(world / "whole" / "checkpoint-7"),
    )
    assert train.main([str(file)]) == 4
    assert "text: " in capsys.readouterr().err


def test_other_code_is_refused_and_allowed_by_the_flag(world, whole, capsys, monkeypatch):
    from llava_nb import train
    from llava_nb.safe import provenance

    file, settings = config(
        world,
        "recoded",
        save_steps=1,
        gradient_accumulation_steps=4,
        use_cpu=True,
        threads=1,
        resume=str(world / "whole" / "checkpoint-18"),
    )
    now = provenance.code_version()
    assert all(f"{name} " in now for name in ("llava_nb", "torch", "transformers", "deepspeed"))
    monkeypatch.setattr(provenance, "code_version", lambda: now.replace("torch", "torch 9"))
    assert train.main([str(file)]) == 4
    assert f"code: {now} then" in capsys.readouterr().err
    assert (
        train.main([str(file), "--allow_changes", "True"]) == 0 and farthest(weights(world / "recoded"), whole[1]) == 0
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": 2e-4}, "learning_rate: 0.0001 then, 0.0002 now"),
        ({"seed": 7}, "seed: 42 then, 7 now"),
        ({"template": "llava_llama_2"}, "template: v1 then, llava_llama_2 now"),
        ({"reduced_jpeg": True}, "reduced_jpeg: False then, True now"),
        ({"gradient_accumulation_steps": 2}, "global_batch: 4 then, 2 now"),
        ({"model_max_length": 255}, "model_max_length: 256 then, 255 now"),
    ],
)
def test_going_on_with_something_else_is_refused_with_the_difference(world, whole, changes, said, capsys):
    from llava_nb import train

    file, settings = config(world, "other", save_steps=1)
    Path(settings["output_dir"]).mkdir(exist_ok=True)
    taken = Path(settings["output_dir"]) / "checkpoint-7"
    if not taken.exists():
        shutil.copytree(world / "whole" / "checkpoint-7", taken)
    file.write_text(json.dumps(settings | {"gradient_accumulation_steps": 4, "use_cpu": True} | changes))
    assert train.main([str(file)]) == 4
    err = capsys.readouterr().err
    assert said in err and "--allow_changes True" in err and err.count("\n") == 1
