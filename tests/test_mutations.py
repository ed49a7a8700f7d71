"""A model folder with one spoilt file is refused in a line that names it, or works as before: no traceback, no hang, no gigabytes. MUTATIONS=all tries every case."""

import json
import os
import random

import mutations
import pytest
import torch
from mutations import MEGABYTES, all_cases, all_wrong, memory, small_folder, tried, verdict, with_value

from llava_nb.base import trust
from llava_nb.base.trust import explained

SAMPLE, SEED = os.environ.get("MUTATIONS", "40"), int(os.environ.get("MUTATION_SEED", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("mutations") / "model")


@pytest.fixture(scope="module")
def cases(folder):
    return all_cases(folder)


def sample(cases: dict, count: int, seed: int = SEED) -> list[tuple[str, str]]:
    """As many of each file."""
    rng, by_file = random.Random(seed), {}
    for name, what in cases:
        by_file.setdefault(name, []).append((name, what))
    return [key for keys in by_file.values() for key in rng.sample(keys, min(len(keys), max(1, count // len(by_file))))]


def test_the_folder_is_whole_and_has_every_kind_of_file(folder, cases):
    assert {verdict(folder, "config.json", way) for way in ("chat", "dry run", "run")} == {""}
    assert {name for name, _ in cases} == {p.name for p in folder.iterdir()} and len(cases) > 5_000
    assert {"tokenizer.json", "model.safetensors.index.json", "generation_config.json", "chat_template.jinja"} <= {
        name for name, _ in cases
    }


def test_the_verdict_can_find_something(folder, monkeypatch):
    """Else the matrix would pass whatever happens."""
    for (code, said), found in {
        (1, "Traceback ..."): "exit code 1",
        (2, "Traceback (most recent call last)"): "not in few lines",
        (2, "llava_nb: no"): "names no folder",
        (2, ""): "not in few lines",
        (2, f"llava_nb: {folder}: \x1b[31m"): "not printable",
        (0, "Traceback"): "0, and said",
    }.items():
        monkeypatch.setattr(mutations, "asked", lambda *a, code=code, said=said: (code, said))
        assert verdict(folder, "config.json", "chat").startswith(found)

    def panics(*a):
        raise BaseException("PanicException")

    monkeypatch.setattr(mutations, "asked", panics)
    assert verdict(folder, "config.json", "chat").startswith("BaseException")


@pytest.mark.skipif(SAMPLE == "all", reason="all of them are tried below")
def test_a_sample_of_spoilt_files_is_refused_by_name_or_works(folder, cases):
    """In this process, with what a chat and a dry run say."""
    before = memory("VmRSS")
    wrong = {
        key: bad
        for key in sample(cases, int(SAMPLE))
        if (bad := tried(folder, key[0], cases[key], ("chat", "dry run")))
    }
    assert not wrong
    assert memory("VmRSS") - before < MEGABYTES


@pytest.mark.slow
@pytest.mark.skipif(SAMPLE != "all", reason="make torture")
def test_every_spoilt_file_is_refused_by_name_or_works(folder, cases, record_property):
    """Each in another process, which may be ended, through a chat, a dry run and a run."""
    wrong = all_wrong(folder, [(*key, data) for key, data in cases.items()])
    assert not wrong, "\n".join(f"{key}: {bad}" for key, bad in list(wrong.items())[:50])
    record_property(
        "reached",
        f"{len(cases):,} spoilt model folders, each refused by name or as before: no traceback, none over 30 s, none over {MEGABYTES:,} MB",
    )


SIZES = {
    "num_hidden_layers": (10**6, 10**12, 0, -1),
    "hidden_size": (10**9, 0, 17),
    "vocab_size": (10**12, 10**9, 0, -1),
    "intermediate_size": (10**9, 10**15),
    "num_attention_heads": (10**6, 3, 0),
    "num_key_value_heads": (10**9, 3, 0),
}
SIDES = {
    "image_size": (10**9, 10**5, 0, -28),
    "patch_size": (0, 10**6, -1, 29),
    "num_hidden_layers": (10**6,),
    "hidden_size": (10**9,),
    "intermediate_size": (10**12,),
    "num_channels": (10**9,),
    "num_attention_heads": (0, 3),
}


@pytest.mark.parametrize(
    "part, key, size",
    [
        (part, key, size)
        for part, sizes in (("text_config", SIZES), ("vision_config", SIDES))
        for key, all in sizes.items()
        for size in all
    ],
)
def test_impossible_sizes_are_refused_before_a_model_is_built(folder, part, key, size, monkeypatch):
    """With weights beside the configuration and without; nothing is allocated and no layer is made."""
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *a, **k: pytest.fail("a module was made"))
    found, kept = json.loads((folder / "config.json").read_text()), (folder / "config.json").read_text()
    if key in ("hidden_size", "num_attention_heads"):
        found[part].pop("head_dim", None)  # where it is given, the width need not be their product
    (folder / "config.json").write_text(json.dumps(with_value(found, (part, key), size)))
    try:
        with pytest.raises(ValueError, match=rf"config.json: {part}\.") as refused:
            trust.check_folder(folder, weights=True)
        assert str(size) in str(refused.value).replace(",", "") or "divided" in str(refused.value)
    finally:
        (folder / "config.json").write_text(kept)


def test_what_a_library_raises_is_one_error_with_the_folder():
    """Panics of the Rust tokenizer are none of Exception; a time-out of its regular expressions is a bare Exception."""

    class PanicException(BaseException):
        pass

    for raised in (
        PanicException("index out of bounds"),
        Exception("Onig: Regex timeout"),
        KeyError("x"),
        RecursionError("deep"),
        AssertionError(),
        RuntimeError("\x1b[31mred\nline"),
    ):
        with pytest.raises(ValueError, match="^here: transformers cannot make a tokenizer of it") as told:
            with explained("here", "a tokenizer"):
                raise raised
        assert told.value.__cause__ is raised and str(told.value).isprintable()
    for left in (
        KeyboardInterrupt(),
        SystemExit(3),
        MemoryError(),
        OSError(28, "No space left on device"),
        NameError("x"),
    ):
        with pytest.raises(type(left)) as told:
            with explained("here", "a tokenizer"):
                raise left
        assert told.value is left
    with pytest.raises(ZeroDivisionError), explained("here", "a tokenizer", (ZeroDivisionError,)):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [float("nan")] * 3},
        {"image_std": [1, 0, 1]},
        {"image_std": [1, None, 1]},
        {"image_std": -1},
        {"rescale_factor": 0},
        {"rescale_factor": float("inf")},
        {"image_mean": "x"},
    ],
)
def test_a_processor_that_would_make_pixels_no_numbers_is_refused(folder, change):
    kept = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(json.dumps(json.loads(kept) | change))
    try:
        with pytest.raises(
            ValueError, match=f"preprocessor_config.json: {next(iter(change))} is .* must be (finite )?numbers"
        ):
            trust.check_folder(folder)
    finally:
        (folder / "preprocessor_config.json").write_text(kept)
