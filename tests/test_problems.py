"""All that is wrong with a configuration is told in one answer, a line each, with the exit code of the first."""

import json

import pytest

from llava_nb import train
from llava_nb.base.problems import MultipleErrors, Problems
from llava_nb.safe.storage import NoCheckpoint

WRONG = {
    "learnin_rate": "did you mean 'learning_rate'",
    "learning_rate": "invalid float value: 'fast'",
    "max_steps": "invalid int value: '2.5'",
    "zero": "zero 9 is unknown",
    "template": "template 'vicuna' is unknown",
    "bits": "--bits 4 is not supported",
    "mm_vision_select_feature": "--mm_vision_select_feature 'cls' is unknown",
    "data_path": "data_path: /none.json does not exist",
    "image_folder": "image_folder: /none does not exist",
    "model": "model: /no/model/here does not exist",
    "bad_records": "'gone' is no kind of bad record",
    "deepspeed": "deepspeed: none.json does not exist",
}
VALUES = {
    "learnin_rate": 1,
    "learning_rate": "fast",
    "max_steps": 2.5,
    "zero": 9,
    "template": "vicuna",
    "bits": 4,
    "mm_vision_select_feature": "cls",
    "data_path": "/none.json",
    "image_folder": "/none",
    "model": "/no/model/here",
    "bad_records": "gone",
    "deepspeed": "none.json",
}


@pytest.mark.parametrize("command", [[], ["doctor"]])
def test_twelve_mistakes_are_twelve_lines(tmp_path, command, capsys):
    (tmp_path / "run.json").write_text(json.dumps(VALUES))
    assert train.main([*command, str(tmp_path / "run.json")]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 12 and first == f"llava_nb: {len(lines)} things are wrong:"
    for said in WRONG.values():
        assert sum(said in line for line in lines) == 1, said


def test_each_mistake_alone_is_one_line(tmp_path, capsys):
    sound = {"model": str(tmp_path), "data_path": str(tmp_path), "image_folder": str(tmp_path)}
    for name, said in WRONG.items():
        (tmp_path / "run.json").write_text(json.dumps(sound | {name: VALUES[name]}))
        assert train.main([str(tmp_path / "run.json")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("llava_nb: ") and said in err and err.count("\n") == 1


def test_the_same_words_are_told_once_and_the_first_gives_the_code():
    wrong = Problems()
    for error in (
        NoCheckpoint("no checkpoint"),
        ValueError("twice"),
        ValueError("twice"),
        MultipleErrors([ValueError("twice"), OSError("a\nb")]),
    ):
        with wrong.noted():
            raise error
    with pytest.raises(MultipleErrors, match="^3 things are wrong:\n  no checkpoint\n  twice\n  a b$") as told:
        wrong.tell()
    assert told.value.exit_code == NoCheckpoint.exit_code == 4
    alone = Problems()
    alone.add(NoCheckpoint("no checkpoint"))
    with pytest.raises(NoCheckpoint):
        alone.tell()
    with pytest.raises(KeyError), Problems().noted():
        raise KeyError("a fault of the code is no problem of the user's")
