"""The demonstration: honest splits, labels that nobody disputes, questions in English, and the whole way at a tiny budget."""

import json
import random
import re
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image
from runs import ROOT

from llava_nb.conversation import get_template, normalise
from llava_nb.demo import __main__ as command
from llava_nb.demo import runner
from llava_nb.demo.drawings import (
    OPEN_CATEGORY,
    OTHER_CATEGORY,
    PLURAL,
    STYLES,
    UNCOUNTABLE,
    UNIQUE,
    UNSEEN_STYLE,
    Drawings,
    colour_of,
    copies,
    side_by_side,
    split_things,
    with_article,
)
from llava_nb.demo.questions import Questioner, build_data, exclude_each_other, question, text_question
from llava_nb.run import evals


@pytest.fixture(scope="module")
def drawings():
    return Drawings()


@pytest.fixture(scope="module")
def named(drawings):
    return {t.name: t for t in drawings.things}


@pytest.fixture(scope="module")
def colours(drawings):
    "The colour of every drawing in every style"
    return {
        (t.name, style): colour_of(drawings.image(t, style))
        for t in drawings.things
        for style in (*STYLES, UNSEEN_STYLE)
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    frequent = build_data(folder, things=40, conversations=150, share=0.2, seed=1)
    return (
        folder,
        frequent,
        {name: json.loads((folder / f"{name}.json").read_text()) for name in ("captions", "conversations", "held_out")},
    )


# Words


ARTICLES = {
    "tent": "a tent",
    "eggplant": "an eggplant",
    "orangutan": "an orangutan",
    "unicorn": "a unicorn",
    "euro banknote": "a euro banknote",
    "one-piece swimsuit": "a one-piece swimsuit",
    "x-ray": "an x-ray",
    "e-mail": "an e-mail",
    "herb": "a herb",
    "umbrella": "an umbrella",
    "T-Rex": "a T-Rex",
    "1st place medal": "a 1st place medal",
    "grapes": "grapes",
    "scissors": "scissors",
    "bread": "bread",
    "luggage": "luggage",
    "DVD": "a DVD",
    "sun": "the sun",
    "mount fuji": "Mount Fuji",
    "glass of milk": "a glass of milk",
    "lotus": "a lotus",
}


@pytest.mark.parametrize("name", ARTICLES)
def test_a_name_has_its_article(named, name):
    assert name in named and with_article(name) == ARTICLES[name]


def test_each_name_of_a_word_list_is_a_drawing(named):
    """A misspelt name in a list would leave its thing as it was, in silence."""
    listed = PLURAL | UNCOUNTABLE | set(UNIQUE) | OPEN_CATEGORY | set().union(*OTHER_CATEGORY.values())
    assert not listed - set(named)


def test_names_that_end_like_a_plural_were_looked_at(named):
    singular = {
        "abacus",
        "bus",
        "cactus",
        "cocktail glass",
        "compass",
        "dress",
        "face blowing a kiss",
        "face holding back tears",
        "face in clouds",
        "globe showing Americas",
        "hibiscus",
        "hippopotamus",
        "lotus",
        "minibus",
        "octopus",
        "oncoming bus",
        "rhinoceros",
        "skull and crossbones",
        "sunrise over mountains",
        "trolleybus",
        "tumbler glass",
        "wine glass",
    }
    last = {n for n in named if n.endswith("s") and " with " not in n and " of " not in n}
    assert last - PLURAL - UNCOUNTABLE == singular


def test_a_yes_or_no_question_is_about_nouns_and_in_english(drawings, named):
    """Never "Is it tent?" or "Is it foggy?", whatever is drawn."""
    assert not {"foggy", "dashing away", "locked", "cooking", "twelve o'clock", "one-thirty", "ZZZ"} & set(named)
    questioner = Questioner(drawings, drawings.things, 0)
    for thing in drawings.things:
        asked, _ = questioner.ask("yes/no", thing, "noto")
        assert re.fullmatch(r"Is it (an? .+|the .+|Mount Fuji|[^ ].*)\?|Are these .+\?", asked)
        about = asked.split(" ", 2)[2].rstrip("?")
        bare = PLURAL | UNCOUNTABLE | {"Mount Fuji"}
        assert asked.startswith("Are these") == (about in PLURAL) and (
            about in bare or about.startswith(("a ", "an ", "the "))
        ), asked


def test_other_questions_that_name_a_thing():
    assert question("left/right", "fox") == "Is the fox on the left or on the right?" and question(
        "left/right", "grapes"
    ).startswith("Are the grapes on")
    assert (
        text_question("fox") == "Which kind of thing is a fox?"
        and text_question("grapes") == "Which kind of thing are grapes?"
    )


# Labels


CATEGORIES = {
    "locomotive": "vehicle",
    "lotus": "plant",
    "tent": "place",
    "fox": "animal",
    "beer mug": "drink",
    "pizza": "food",
    "alarm clock": "object",
    "grinning face": "face",
    "fuel pump": "object",
    "station": "place",
    "fog": None,
    "two hearts": None,
    "tennis": None,
    "ghost": None,
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_a_category_that_a_person_would_say(named, name):
    assert named[name].category == CATEGORIES[name]


def test_a_question_without_an_answer_is_never_asked(drawings, colours):
    """Of all drawings, in conversations and held-out questions of all kinds."""
    questioner = Questioner(drawings, drawings.things, 0)
    assert sum(not questioner.can_ask("category", t, "noto") for t in drawings.things) > 100
    assert all(
        questioner.can_ask("colour", t, s) == (colours[t.name, s] is not None)
        for t in drawings.things[::7]
        for s in STYLES
    )


def test_every_answer_of_the_data_set_is_one(data):
    _, frequent, records = data
    known = {
        "Which kind of thing is": {"animal", "plant", "food", "drink", "place", "vehicle", "face", "object"},
        "Which colour is": {"red", "orange", "brown", "yellow", "green", "blue", "purple", "pink"},
    }
    known["Which kind of thing are"] = known["Which kind of thing is"]
    turns = [r["conversations"] for name in ("conversations", "held_out") for r in records[name]]
    assert all(t for t in turns)
    for asked, said in [
        (q["value"].removeprefix("<image>\n"), a["value"]) for t in turns for q, a in zip(t[::2], t[1::2])
    ]:
        assert said and said != "None"
        for start, answers in known.items():
            if asked.startswith(start):
                assert said in answers, (asked, said)
    assert "None" not in json.dumps(records["captions"]) and not any("None" in answer for answer in frequent.values())


SEEN_BY_A_PERSON = {
    "banana": "yellow",
    "lemon": "yellow",
    "sunflower": None,
    "frog": "green",
    "cucumber": "green",
    "broccoli": "green",
    "cactus": "green",
    "tomato": "red",
    "strawberry": "red",
    "fire engine": "red",
    "blue book": "blue",
    "jeans": "blue",
    "dolphin": "blue",
    "whale": "blue",
    "eggplant": "purple",
    "grapes": "purple",
    "carrot": "orange",
    "tangerine": "orange",
    "basketball": "orange",
    "bear": "brown",
    "teddy bear": "brown",
    "coconut": "brown",
    "pig": "pink",
    "pig face": "pink",
    "pig nose": "pink",
    "locomotive": None,
    "zebra": None,
    "panda": None,
    "rainbow": None,
    "snowman": None,
    "skull": None,
    "spade suit": None,
    "top hat": None,
    "elephant": None,
    "penguin": None,
}


def test_a_colour_is_what_a_person_sees_or_none(colours):
    """Pig, eggplant and locomotive in every style; black, grey and white things have no hue."""
    differ = {
        (name, style): colour
        for (name, style), colour in colours.items()
        if name in SEEN_BY_A_PERSON and colour not in (None, SEEN_BY_A_PERSON[name])
    }
    shown_otherwise = {("tangerine", "openmoji"): "yellow", ("coconut", "fluent"): "green"}
    assert not {key: colour for key, colour in differ.items() if shown_otherwise.get(key) != colour}


def test_a_colour_in_a_name_is_the_colour_that_is_measured(colours):
    words = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "pink"}
    differ = {
        key: colour
        for key, colour in colours.items()
        if colour and (word := key[0].split()[0]) in words and colour != word
    }
    assert not differ and not [
        key for key, colour in colours.items() if colour and key[0].startswith(("black ", "grey "))
    ]


def test_enough_drawings_have_a_colour(colours):
    for style in (*STYLES, UNSEEN_STYLE):
        share = sum(colour is not None for (_, s), colour in colours.items() if s == style) / (len(colours) / 4)
        assert 0.1 < share < 0.5, (style, share)


@pytest.mark.parametrize(
    "pixel, colour",
    [
        ((220, 30, 30), "red"),
        ((30, 60, 220), "blue"),
        ((128, 128, 128), None),
        ((20, 20, 20), None),
        ((255, 200, 170), None),
    ],
)
def test_a_plain_colour(pixel, colour):
    assert colour_of(Image.new("RGB", (8, 8), pixel)) == colour


def test_no_colour_without_a_clear_majority():
    image = Image.new("RGB", (10, 10), (220, 30, 30))
    image.paste((30, 60, 220), (0, 0, 10, 4))
    assert colour_of(image) is None  # six tenths are red
    image.paste((220, 30, 30), (0, 0, 10, 2))
    assert colour_of(image) == "red"  # eight tenths
    image.paste((100, 100, 100), (0, 0, 10, 6))
    assert colour_of(image) is None  # most of it is grey


# Splits and records


def test_what_is_held_out_is_in_neither_stage(data, drawings):
    _, _, records = data
    seen, held_out = split_things(drawings.things, 40, seed=1)
    assert len(held_out) == len(drawings.things) // 10 and not set(seen) & set(held_out)
    text = json.dumps(records["captions"] + records["conversations"])
    for t in held_out:
        assert not any(
            said in text
            for said in (f'"{t.name}"', f'"{t.name}, ', f"Is it {with_article(t.name)}?", f"is {with_article(t.name)}?")
        )
    assert not any(
        t.code in r.get("image", "") for t in held_out for r in records["captions"] + records["conversations"]
    )
    assert not any(r.get("image", "").startswith(UNSEEN_STYLE) for r in records["captions"] + records["conversations"])
    assert all(
        UNSEEN_STYLE in r["image"]
        for r in records["held_out"]
        if r["split"] == "unseen style" and r["type"] not in ("count", "left/right")
    )


def test_no_question_is_asked_twice_of_one_drawing(data):
    _, _, records = data
    asked = [(r["type"], r["image"]) for r in records["held_out"]]
    assert len(asked) == len(set(asked)) and len({r["id"] for r in records["held_out"]}) == len(asked)


def test_records_are_llava_records_with_files(data):
    folder, _, records = data
    plain, chatml = get_template("plain"), get_template("chatml")
    for r in records["captions"]:
        plain.segments(normalise(r))
    for r in records["conversations"] + records["held_out"]:
        chatml.segments(normalise(r))
    for r in sum(records.values(), []):
        if "image" in r:
            Image.open(folder / "images" / r["image"]).load()
    assert 0 < sum("image" not in r for r in records["conversations"]) < 30


def test_a_conversation_never_says_the_name_that_it_asks_about(data):
    """Otherwise a yes/no question could be answered by reading."""
    for r in data[2]["conversations"]:
        asked = [turn["value"].removeprefix("<image>\n") for turn in r["conversations"][::2]]
        assert not ("What is this?" in asked and any(a.startswith(("Is it", "Are these")) for a in asked))


def test_yes_and_no_are_balanced_and_no_is_hard(drawings):
    seen, _ = split_things(drawings.things, 300)
    questioner = Questioner(drawings, seen, 0)
    said = [questioner.ask("yes/no", t, "noto")[1].rsplit(", ", 1) for t in seen * 2]
    assert [name for name, _ in said] == [t.name for t in seen * 2]  # what is seen comes first
    verdicts = [verdict for _, verdict in said]
    assert 0.42 < verdicts.count("yes") / len(verdicts) < 0.58
    near = {t: [o for o in seen if o.subgroup == t.subgroup and exclude_each_other(o, t)] for t in seen}
    assert all(questioner.other(t).subgroup == t.subgroup for t in seen if near[t])


def test_a_wrong_name_is_wrong(drawings, named):
    """A dog face is a dog: no question may call that wrong."""
    assert not exclude_each_other(named["dog face"], named["dog"]) and exclude_each_other(named["fox"], named["wolf"])
    questioner = Questioner(drawings, [named["dog"], named["dog face"], named["guide dog"], named["tent"]], 0)
    assert {questioner.other(named["dog"]).name for _ in range(9)} == {"tent"}


def test_counts_and_sides_are_what_the_image_shows():
    dot, bar = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128), "blue")
    for n in range(1, 6):
        image = copies(dot, n, random.Random(n))
        cells = [image.crop((74 * (k % 3), 74 * (k // 3), 74 * (k % 3) + 74, 74 * (k // 3) + 74)) for k in range(9)]
        assert sum((255, 0, 0) in [c for _, c in cell.getcolors(9999)] for cell in cells) == n
    sides = side_by_side(dot, bar)
    assert sides.getpixel((50, 112)) == (255, 0, 0) and sides.getpixel((170, 112)) == (0, 0, 255)


def test_data_is_a_function_of_the_seed(data, tmp_path):
    _, frequent, records = data
    assert build_data(tmp_path, things=40, conversations=150, share=0.2, seed=1) == frequent
    assert {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in records} == records


# The run


def test_scores_count_what_was_asked():
    ask = lambda type, right: {"type": type, "split": "s", "conversations": [{}, {"value": right}]}
    answers = [
        evals.Answer(ask("name", "Red apple"), "a red apple."),
        evals.Answer(ask("name", "fox"), "wolf"),
        evals.Answer(ask("yes/no", "fox, yes"), "Wolf. Yes"),
    ]
    assert (
        not evals.Answer(ask("yes/no", "fox, yes"), "fox, no").correct
        and not evals.Answer(ask("yes/no", "fox, yes"), "").correct
    )
    blank = [evals.Answer(a.record, "fox") for a in answers]
    scores = {s.type: s for s in evals.score(answers, blank, {"name": "fox", "yes/no": "no"})}
    assert (scores["name"].accuracy, scores["name"].blank, scores["name"].most_frequent) == (0.5, 0.5, 0.5)
    assert (scores["yes/no"].accuracy, scores["yes/no"].blank, scores["yes/no"].most_frequent) == (1, 0, 0)


def test_the_budget_gives_the_steps(tmp_path, monkeypatch):
    """More minutes, more steps; too few minutes, the least; and a later start keeps the plan."""
    done, layout = [], runner.Layout(1, 2, False)
    monkeypatch.setattr(runner, "trial", lambda demo: (layout, 2.0))
    monkeypatch.setattr(
        runner, "run_stage", lambda demo, layout, name, about, stage, steps, **more: done.append((name, steps))
    )
    steps = {}
    for minutes in (1, 20, 40):
        demo = runner.Demo(tmp_path / str(minutes), minutes=minutes, tell=lambda text: None)
        demo.out.mkdir()
        steps[minutes] = runner.train(demo)
    assert steps[1] == {1: 300, 2: 150} and steps[40][2] > steps[20][2] > 150 and steps[40][1] > steps[20][1] > 300
    slower = runner.Demo(tmp_path / "20", minutes=1, tell=lambda text: None)
    assert runner.train(slower) == steps[20]


def test_a_slow_machine_is_told_how_long_it_takes(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(runner, "trial", lambda demo: (runner.Layout(1, 2, False), 20.0))
    monkeypatch.setattr(runner, "run_stage", lambda *args, **more: None)
    runner.train(runner.Demo(tmp_path, minutes=20, tell=said.append))
    assert len(said) == 1 and re.search(r"needs about 6\d minutes", said[0]), said


COMMAND = [sys.executable, "-m", "llava_nb.demo", "--fast", "--out"]


@pytest.mark.slow
def test_a_killed_demonstration_resumes(tmp_path):
    """Killed with all its processes in the middle of stage 2: the second start trains no stage 1, and ends stage 2 from a checkpoint."""
    out, argv = tmp_path / "demo", [*COMMAND, str(tmp_path / "demo")]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("stage2/checkpoint-*/MANIFEST.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    for p in [*started, psutil.Process(process.pid)]:
        p.kill()
    process.stdout.read()
    psutil.wait_procs(started)
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "stage1 is done" in done.stdout and "resuming from checkpoint-" in done.stdout and "trial" not in done.stdout
    assert (out / "results.json").is_file() and not list(out.glob("stage*/checkpoint-*"))


@pytest.mark.slow
def test_a_signal_to_the_demonstration_alone_stops_its_training_too(tmp_path):
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [*COMMAND, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    for line in process.stdout:
        if line.startswith("step     1/"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    said = process.stdout.read()
    assert process.wait(120) == 75 and "the same command resumes it" in said, said
    assert not psutil.wait_procs(started, timeout=30)[1] and list(out.glob("stage1/checkpoint-*/MANIFEST.json"))


@pytest.mark.slow
def test_the_whole_way_in_a_tiny_budget(tmp_path, capfd):
    """Parts, data, trial, both stages, evaluation, page and chat, by the code of the full demonstration. Others read its result."""
    out = tmp_path / "demo"
    assert command.main(["--fast", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {s["split"] for s in results["scores"]} == {"unseen style", "unseen things"} and len(results["chat"]) == 3
    for name in (
        "samples.html",
        "accuracy.png",
        "loss.png",
        "table.txt",
        "stage1/projector.safetensors",
        "stage2/model.safetensors",
    ):
        assert (out / name).stat().st_size > 0
    assert "most frequent" in capfd.readouterr().out
    assert (
        command.main(["--out", str(out)]) == 0 and "finished run" in capfd.readouterr().out
    )  # a second call does no work twice
    reads_its_result(out)


def reads_its_result(out):
    """Chat, doctor, dry run and verify, each in a process of its own that has to know the tower."""
    image = next((out / "data" / "images").glob("*.png"))
    config = json.loads((out / "stage2" / "train.json").read_text())
    again = {key: value for key, value in config.items() if key not in ("language_model", "vision_tower", "projector")}
    (out / "again.json").write_text(
        json.dumps(again | {"model": str(out / "stage2"), "output_dir": str(out / "again")})
    )
    ask = ["--image", str(image), "--ask", "What is this?", "--max_new_tokens", "4"]
    for argv in (
        ["llava_nb.train", "chat", str(out / "stage2"), *ask],
        ["llava_nb.train", "doctor", str(out / "again.json")],
        ["llava_nb.train", str(out / "again.json"), "--dry_run"],
        ["llava_nb.train", "verify", str(out / "stage2")],
    ):
        done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, (argv, done.stdout[-1000:], done.stderr[-2000:])
