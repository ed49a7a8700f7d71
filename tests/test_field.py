"""Inputs that people met in the field, as they are reported: each through doctor, dry run and run, with what should happen.

`field/cases.json` holds records, a whole file (`text`), settings, flags or a DeepSpeed JSON; the exit code of all three, and what is said.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import config, make_world, run, verdicts, weights
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_nb import train
from llava_nb.masking import tiny_tokenizer
from llava_nb.safe.integrity import MADE_WITH
from llava_nb.store.shards import write_shards

CASES = json.loads((Path(__file__).parent / "field" / "cases.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A LLaVA, a language model, a SigLIP tower, a picture and two files of records."""
    where, tokenizer = make_world(tmp_path_factory.mktemp("world")), tiny_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **size)).save_pretrained(where / "LLM")
    tokenizer.save_pretrained(where / "LLM")
    SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **size)).save_pretrained(
        where / "SIGLIP"
    )
    CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(where / "SIGLIP")
    (where / "LLAVA").symlink_to(where / "start")
    Image.new("RGB", (60, 40), "teal").save(where / "1.png")
    record = {
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A red kite."},
        ],
    }
    for name in ("a", "b"):
        (where / f"{name}.json").write_text(json.dumps([record | {"id": f"{name}{k}"} for k in range(2)]))
    write_shards(
        iter([("1.json", json.dumps(record).encode()), ("1.png", (where / "1.png").read_bytes())]), where / "SHARDS"
    )
    (where / "SHARDS" / "000000.tar").rename(where / "SHARDS" / "0.tar")
    return where


def asked(world: Path, name: str) -> tuple[Path, list[str]]:
    """The configuration file and the flags of a case."""
    case, slug = CASES[name], "".join(c if c.isalnum() else "_" for c in name)
    data = world / f"{slug}.data.json"
    data.write_text(case.get("text") or json.dumps(case.get("records") or json.loads((world / "a.json").read_text())))
    here = lambda value: (
        [here(v) for v in value]
        if isinstance(value, list)
        else ",".join(str(world / v) for v in value.split(","))
        if isinstance(value, str) and all((world / v).exists() for v in value.split(","))
        else value
    )  # noqa: E731
    changes = {
        "data_path": str(data),
        "max_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "save_total_limit": 2,
    } | ({"save_strategy": "steps"} if "save_steps" in case.get("settings", {}) else {})
    if "deepspeed" in case:
        (world / f"{slug}.ds.json").write_text(json.dumps(case["deepspeed"]))
        changes["deepspeed"] = str(world / f"{slug}.ds.json")
    return config(world, slug, **changes | {k: here(v) for k, v in case.get("settings", {}).items()})[0], [
        here(f) for f in case.get("flags", [])
    ]


@pytest.mark.parametrize("name", CASES)
def test_what_the_field_met(world, name, capsys):
    file, flags = asked(world, name)
    code, says = CASES[name]["code"], CASES[name]["says"]
    if code == 0:
        assert train.main(["doctor", str(file), *flags]) == 0
        told = "".join(capsys.readouterr())
        assert says in told, told
        assert train.main([str(file), "--dry_run", *flags]) == 0
        if "deepspeed" in CASES[name]:
            assert run(file, 0).returncode == 0  # an engine keeps a process to itself
        else:
            assert train.main([str(file), *flags]) == 0
        capsys.readouterr()
    else:
        said = verdicts(file, capsys, *flags)
        assert len(set(said.values())) == 1 and said["run"][0] == code, said
        assert train.main([str(file), *flags]) == code and says in capsys.readouterr().err, said


def test_a_tower_without_class_token_keeps_every_feature(world, capsys):
    """The strategy follows from the tower; the result runs in plain transformers."""
    file, _ = asked(world, "a tower without class token")
    assert train.main([str(file), "--output_dir", str(world / "siglip")]) == 0
    found = json.loads((world / "siglip" / "config.json").read_text())
    assert found["vision_feature_select_strategy"] == "full" and found["image_seq_length"] == 4
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(world / "siglip"),
        AutoProcessor.from_pretrained(world / "siglip"),
    )
    with torch.no_grad():
        model(**processor(text="<image>\nWhat?", images=Image.open(world / "1.png"), return_tensors="pt"))


def test_the_best_checkpoint_is_the_result(world):
    """A rate that ruins the model: the evaluation is best where it was first, and its weights are in the result."""
    file, flags = asked(world, "the best checkpoint")
    assert (
        train.main(
            [
                str(file),
                "--output_dir",
                str(world / "best"),
                "--learning_rate",
                "3",
                "--projector_lr",
                "3",
                "--max_steps",
                "3",
                "--save_total_limit",
                "9",
                *flags,
            ]
        )
        == 0
    )
    state = json.loads((world / "best" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    result, best, last = (weights(world / "best" / below) for below in ("", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(result[k], best[k]) for k in result) and not all(
        torch.equal(result[k], last[k]) for k in result
    )


def test_several_files_are_one_set_of_records_for_a_run_and_its_resume(world, capsys):
    """Order, sources, the quarantine, a doctor's findings and the checkpoint's recipe know each file."""
    shown = json.loads((world / "a.json").read_text())[0]
    (world / "first.jsonl").write_text(
        "\n".join(
            json.dumps(shown | r)
            for r in ({"id": "own", "dataset": "given"}, {"id": "f"}, {"id": "lost", "image": "no.png"})
        )
    )
    (world / "cut.png").write_bytes((world / "1.png").read_bytes()[:60])
    (world / "second.json").write_text(
        json.dumps([shown | {"id": "s"}, {"id": "bad"}, shown | {"id": "cut", "image": "cut.png"}])
    )
    files = [str(world / name) for name in ("second.json", "first.jsonl")]
    file, _ = config(
        world,
        "both",
        data_path=files,
        max_steps=2,
        save_steps=1,
        bad_records="skip",
        findings=str(world / "both" / "findings.jsonl"),
    )
    assert (
        train.main(["doctor", str(file), "--deep", "--findings", "None"]) == 2
    )  # the cut picture, until its findings are given
    assert "good, by source: second 1 of 3, first 1 of 2, given 1 of 1" in capsys.readouterr().out
    assert train.main([str(file), "--dry_run"]) == 0 and "3 records" in capsys.readouterr().out
    assert train.main([str(file), "--max_steps", "2"]) == 0
    left_out = [json.loads(line) for line in (world / "both" / "quarantine.jsonl").read_text().splitlines()]
    assert {(p["file"], p["index"], p["source"]) for p in left_out} == {
        (files[0], 1, "second"),
        (files[0], 2, "second"),
        (files[1], 2, "first"),
    }
    assert json.loads((world / "both" / "checkpoint-1" / MADE_WITH).read_text())["records"].startswith("3, ")
    shutil.rmtree(world / "both" / "checkpoint-2")
    again = [str(file), "--resume", str(world / "both" / "checkpoint-1"), "--output_dir", str(world / "both2")]
    capsys.readouterr()
    assert train.main([*again, "--data_path", *files[::-1]]) == 4 and "text" in capsys.readouterr().err
    assert train.main([*again, "--data_path", ",".join(files)]) == 0


def test_all_files_that_are_missing_are_named(world, capsys):
    file, _ = config(world, "gone")
    flags = ["--data_path", f"{world}/no1.json,{world}/a.json", f"{world}/no2.json"]
    for argv in (["doctor", str(file), *flags], [str(file), *flags]):
        assert train.main(argv) == 2
        assert capsys.readouterr().err.count("does not exist") == 2
    assert train.main([str(file), "--dry_run", *flags]) == 0
    out = capsys.readouterr().out
    assert [
        name for name in ("no1", "a", "no2") if f"not checked: data_path: {world}/{name}.json does not exist" in out
    ] == ["no1", "no2"]
