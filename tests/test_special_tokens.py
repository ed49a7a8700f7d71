"""Tokens that the user adds, from the record to the answer of the result; and a template that is told the day, which is the run's first."""

import json
import shutil
from datetime import date

import pytest
import torch
from runs import config, farthest, launch, make_world, weights
from transformers import AutoTokenizer

from llava_nb import train
from llava_nb.chat import Chat
from llava_nb.run import checks

BOX = ["<box>", "</box>"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run's world whose answers hold two tokens that its LLaVA has never had."""
    where = make_world(tmp_path_factory.mktemp("world"))
    asked = lambda k, text: {
        "id": str(k),
        "conversations": [
            {"from": "human", "value": f"Where is {text}?"},
            {"from": "gpt", "value": f"<box>{text}</box>"},
        ],
    }  # noqa: E731
    (where / "boxed_records.json").write_text(json.dumps([asked(k, ("a", "b")[k % 2]) for k in range(8)]))
    return where


def boxes(world, name: str, **changes):
    return config(
        world,
        name,
        data_path=str(world / "boxed_records.json"),
        special_tokens=BOX,
        max_steps=60,
        save_strategy="no",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=5e-3,
        weight_decay=0.0,
        projector_lr=None,
        **changes,
    )[0]


def rows(folder) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights(folder).items() if k.endswith(("embed_tokens.weight", "lm_head.weight"))}


def test_a_result_answers_with_the_tokens_that_its_answers_had(world, capsys):
    """From `model`, a whole LLaVA: rows are grown, trained, saved, and said as one token each."""
    assert train.main([str(boxes(world, "boxes"))]) == 0
    tokenizer = AutoTokenizer.from_pretrained(world / "boxes")
    ids = tokenizer.convert_tokens_to_ids(BOX)
    assert (
        len(set(ids)) == 2
        and not set(ids) & {None, tokenizer.unk_token_id}
        and tokenizer.encode("<box>", add_special_tokens=False) == ids[:1]
    )
    known = AutoTokenizer.from_pretrained(world / "start").get_vocab()
    assert not set(BOX) & set(known)
    chat = Chat.from_pretrained(world / "boxes", device="cpu")
    assert not set(ids) & set(chat.banned)
    assert chat.ask("Where is a?", max_new_tokens=8).replace(" ", "") == "<box>a</box>"
    assert all(torch.isfinite(v).all() and len(v) > max(ids) for v in rows(world / "boxes").values())


@pytest.mark.slow
def test_rows_grow_the_same_under_zero_3_on_two_ranks(world):
    """The same records in each step, so the same losses and rows as one process has."""
    alone = launch(
        config(
            world,
            "alone",
            data_path=str(world / "boxed_records.json"),
            special_tokens=BOX,
            max_steps=4,
            save_steps=4,
            gradient_accumulation_steps=4,
        )[0],
        0,
    )
    two = launch(
        config(
            world,
            "two",
            data_path=str(world / "boxed_records.json"),
            special_tokens=BOX,
            max_steps=4,
            save_steps=4,
            gradient_accumulation_steps=2,
            zero=3,
        )[0],
        2,
    )
    assert alone == pytest.approx(two, abs=1e-4)
    assert (
        rows(world / "alone").keys() == rows(world / "two").keys()
        and farthest(rows(world / "alone"), rows(world / "two")) < 1e-4
    )
    assert AutoTokenizer.from_pretrained(world / "two").convert_tokens_to_ids("<box>") == AutoTokenizer.from_pretrained(
        world / "alone"
    ).convert_tokens_to_ids("<box>")


def on(day: str):
    """A `date` whose today is another day."""

    class Day(date):
        @classmethod
        def today(cls):
            return date.fromisoformat(day)

    return Day


DATED = (
    "{{ bos_token + 'Today: ' + strftime_now('%d %b %Y') + ' ' }}{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_a_resume_on_another_day_tells_the_template_the_first_day(world, tmp_path, monkeypatch, capsys):
    """Training tokens stay the same, and the result keeps the day; a new run is told its own."""
    model = shutil.copytree(world / "start", tmp_path / "dated")
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(DATED)
    file = config(
        world,
        "dated",
        model=str(model),
        template="chat_template",
        max_steps=2,
        save_steps=1,
        output_dir=str(tmp_path / "out"),
    )[0]
    monkeypatch.setattr(checks, "date", on("2026-02-03"))
    assert train.main([str(file)]) == 0
    whole = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    for path in [p for p in (tmp_path / "out").iterdir() if p.is_file()]:
        path.unlink()
    monkeypatch.setattr(checks, "date", on("2026-08-09"))
    assert train.main([str(file)]) == 0 and "checkpoint-1" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["llava_nb"]["date"] == "2026-02-03"
    assert farthest(weights(tmp_path / "out"), whole) == 0
    assert train.main([str(file), "--output_dir", str(tmp_path / "new"), "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["llava_nb"]["date"] == "2026-08-09"
