"""The demonstration: honest splits, objective labels, and the whole way at a tiny budget."""
import json
import random
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image
from runs import ROOT

from llava_nb.demo import demo
from llava_nb.run import evals
from llava_nb.conversation import get_template, normalise


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    frequent = demo.build_data(folder, things=40, conversations=150, share=.2, seed=1)
    return folder, frequent, {name: json.loads((folder / f"{name}.json").read_text()) for name in ("captions", "conversations", "held_out")}


def test_what_is_held_out_is_in_neither_stage(data):
    folder, _, records = data
    emoji = demo.Emoji()
    learned, held_out = demo.choose(emoji.things, 40, seed=1)
    assert len(held_out) == len(emoji.things) // 10 and not set(learned) & set(held_out)
    text = json.dumps(records["captions"] + records["conversations"])
    assert not any(said in text for t in held_out for said in (f'"{t.name}"', f'"{t.name}, ', f"Is it {t.name}?", f"Is {t.name} left"))
    assert not any(r.get("image", "").startswith(demo.UNSEEN_STYLE) for r in records["captions"] + records["conversations"])
    assert all(demo.UNSEEN_STYLE in r["image"] for r in records["held_out"] if r["split"] == "unseen style" and r["type"] not in ("count", "left/right"))


def test_records_are_llava_records_with_files(data):
    folder, _, records = data
    plain, chatml = get_template("plain"), get_template("chatml")
    for r in records["captions"]: plain.segments(normalise(r))
    for r in records["conversations"] + records["held_out"]: chatml.segments(normalise(r))
    for r in sum(records.values(), []):
        if "image" in r: Image.open(folder / "images" / r["image"]).load()
    assert 0 < sum("image" not in r for r in records["conversations"]) < 30


def test_yes_and_no_are_balanced_and_no_is_hard():
    emoji = demo.Emoji()
    learned, _ = demo.choose(emoji.things, 300)
    asker = demo.Asker(emoji, learned, 0)
    said = [asker.about("yes/no", t, "noto")[1].rsplit(", ", 1) for t in learned * 2]
    assert [name for name, _ in said] == [t.name for t in learned * 2]       # what is seen comes first
    answers = [verdict for _, verdict in said]
    assert .42 < answers.count("yes") / len(answers) < .58
    assert all(asker.other(t).subgroup == t.subgroup for t in learned if asker.near[t])


def test_counts_and_sides_are_what_the_picture_shows():
    dot, bar = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128), "blue")
    for n in range(1, 6):
        picture = demo.several(dot, n, random.Random(n))
        cells = [picture.crop((74 * (k % 3), 74 * (k // 3), 74 * (k % 3) + 74, 74 * (k // 3) + 74)) for k in range(9)]
        assert sum((255, 0, 0) in [c for _, c in cell.getcolors(9999)] for cell in cells) == n
    sides = demo.side_by_side(dot, bar)
    assert sides.getpixel((50, 112)) == (255, 0, 0) and sides.getpixel((170, 112)) == (0, 0, 255)


def test_data_is_a_function_of_the_seed(data, tmp_path):
    folder, frequent, records = data
    assert demo.build_data(tmp_path, things=40, conversations=150, share=.2, seed=1) == frequent
    assert {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in records} == records


def test_scores_count_what_was_asked():
    ask = lambda type, right: {"type": type, "split": "s", "conversations": [{}, {"value": right}]}
    answers = [evals.Answer(ask("name", "Red apple"), "a red apple."), evals.Answer(ask("name", "fox"), "wolf"), evals.Answer(ask("yes/no", "fox, yes"), "Wolf. Yes")]
    assert not evals.Answer(ask("yes/no", "fox, yes"), "fox, no").correct and not evals.Answer(ask("yes/no", "fox, yes"), "").correct
    blank = [evals.Answer(a.record, "fox") for a in answers]
    scores = {s.type: s for s in evals.score(answers, blank, {"name": "fox", "yes/no": "no"})}
    assert (scores["name"].accuracy, scores["name"].blank, scores["name"].most_frequent) == (.5, .5, .5)
    assert (scores["yes/no"].accuracy, scores["yes/no"].blank, scores["yes/no"].most_frequent) == (1, 0, 0)


@pytest.mark.slow
def test_a_killed_demonstration_goes_on_where_it_was(tmp_path):
    """Killed with all its processes in the middle of stage 2: the second start trains no stage 1, and ends stage 2 from a checkpoint."""
    out, command = tmp_path / "demo", [sys.executable, "-m", "llava_nb.demo.demo", "--fast", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 600
    while not list(out.glob("stage2/checkpoint-*/MANIFEST.json")) and time.monotonic() < deadline: time.sleep(.05)
    started = psutil.Process(process.pid).children(recursive=True)
    for p in [*started, psutil.Process(process.pid)]: p.kill()
    process.stdout.read(); psutil.wait_procs(started)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "stage1 is done" in done.stdout and "going on from checkpoint-" in done.stdout and "trial" not in done.stdout
    assert (out / "results.json").is_file() and not list(out.glob("stage*/checkpoint-*"))


@pytest.mark.slow
def test_a_signal_to_the_demonstration_alone_stops_its_training_too(tmp_path):
    out, command = tmp_path / "demo", [sys.executable, "-m", "llava_nb.demo.demo", "--fast", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("step     1/"): break
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    said = process.stdout.read()
    assert process.wait(120) == 75 and "the same command goes on" in said, said
    assert not psutil.wait_procs(started, timeout=30)[1] and list(out.glob("stage1/checkpoint-*/MANIFEST.json"))


@pytest.mark.slow
def test_the_whole_way_in_a_tiny_budget(tmp_path, capfd):
    """Parts, data, trial, both stages, evaluation, page and chat, by the code of the full demonstration."""
    assert demo.main(["--fast", "--out", str(tmp_path / "demo")]) == 0
    out = tmp_path / "demo"
    results = json.loads((out / "results.json").read_text())
    assert {s["split"] for s in results["scores"]} == {"unseen style", "unseen things"} and len(results["chat"]) == 3
    for name in ("samples.html", "accuracy.png", "loss.png", "table.txt", "stage1/projector.safetensors", "stage2/model.safetensors"): assert (out / name).stat().st_size > 0
    assert "most frequent" in capfd.readouterr().out
    assert demo.main(["--out", str(out)]) == 0 and "finished run" in capfd.readouterr().out       # a second call does no work twice
