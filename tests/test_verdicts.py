"""Doctor, dry run and run say the same: exit code and first words, for whatever is wrong with a configuration, a model, a template, an engine or a folder.

Records, files and pictures go through all three in test_catalogue_data.
"""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import config, make_world, verdict
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_nb import train
from llava_nb.masking import tiny_tokenizer
from llava_nb.run import assemble, chat_command
from llava_nb.safe import storage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A LLaVA, a language model, a tower and a BERT as folders, records and pictures."""
    where, tokenizer = make_world(tmp_path_factory.mktemp("world")), tiny_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **size)).save_pretrained(where / "llm")
    tokenizer.save_pretrained(where / "llm")
    CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=2, image_size=28, patch_size=14, **size)).save_pretrained(
        where / "tower"
    )
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        where / "tower"
    )
    BertModel(BertConfig(vocab_size=99, num_hidden_layers=1, **size)).save_pretrained(where / "bert")
    return where


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    for name in ("assemble", "load_model"):
        monkeypatch.setattr(assemble, name, lambda *a: pytest.fail("built a model"))


def written(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


LLAMA = {"model_type": "llama", "hidden_size": 64}
ORIGINAL = LLAMA | {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}
FOLDERS = {
    "the original's format": (
        {"config.json": ORIGINAL, "pytorch_model.bin": ""},
        "is in the original LLaVA's own format ('LlavaLlamaForCausalLM').*give the llava-hf folder of the same model",
    ),
    "old, and says llava": (
        {"config.json": ORIGINAL | {"model_type": "llava"}, "model.safetensors": ""},
        "is in the original LLaVA's own format",
    ),
    "old, without classes": (
        {"config.json": {"model_type": "llava", "hidden_size": 64}},
        "is in the original LLaVA's own format",
    ),
    "says llama": (
        {"config.json": LLAMA | {"mm_vision_tower": "x", "mm_projector_type": "mlp2x_gelu"}},
        "is in the original LLaVA's own format",
    ),
    "a relative's class": (
        {"config.json": LLAMA | {"architectures": ["LlavaQwenForCausalLM"]}},
        "original LLaVA's own format ('LlavaQwenForCausalLM')",
    ),
    "the original's stage 1": (
        {"config.json": ORIGINAL, "mm_projector.bin": ""},
        "it holds a projector: `llava_nb convert .*mm_projector.bin FOLDER` makes a --projector of it",
    ),
    "an adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "owner/base"}, "adapter_model.safetensors": ""},
        "holds an adapter (LoRA) of 'owner/base', not a whole model; merge the two",
    ),
    "the original's LoRA": (
        {"config.json": ORIGINAL, "adapter_config.json": {}, "non_lora_trainables.bin": ""},
        "holds an adapter (LoRA) of some base model",
    ),
    "GGUF": ({"model.Q4_K_M.gguf": "GGUF"}, "holds weights for llama.cpp (GGUF)"),
    "AWQ": (
        {"config.json": LLAMA | {"quantization_config": {"quant_method": "awq"}}},
        "the weights are quantised ('awq'",
    ),
    "an old GPTQ": ({"config.json": LLAMA, "quantize_config.json": {"bits": 4}}, "the weights are quantised ('gptq'"),
    "the hub's cache": (
        {"models--owner--name/refs/main": "abc"},
        "is the hub's cache, with 1 models in it; give the name of one: 'owner/name'",
    ),
    "models--owner--name": (
        {"refs/main": "abc", "snapshots/abc/config.json": LLAMA, "blobs/x": ""},
        "is the hub's cache of owner/name; give owner/name, or .*snapshots/abc",
    ),
    "one folder too high": (
        {"vicuna/config.json": LLAMA},
        "holds no config.json; found models in .*vicuna: give one of them",
    ),
    "a result of stage 1": (
        {"projector.safetensors": ""},
        "holds the projector of stage 1 only; give it as --projector",
    ),
    "Llama's original": ({"params.json": {}, "consolidated.00.pth": ""}, "it is in Llama's original format"),
    "empty": ({}, "holds no config.json; give a folder that save_pretrained wrote"),
}


def deep(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    folder.mkdir(exist_ok=True)
    return folder


def matches(said: str, wanted: str) -> bool:
    """The parts between `.*`, in order."""
    at = 0
    for part in wanted.split(".*"):
        at = said.find(part, at)
        if at < 0:
            return False
    return True


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model(world, tmp_path, case, capsys):
    """As model, as language model, as tower: one line, with what to give."""
    files, wanted = FOLDERS[case]
    folder = str(deep(tmp_path / (case if "--" in case else "given"), files))
    parts = {
        "model": None,
        "language_model": str(world / "llm"),
        "vision_tower": str(world / "tower"),
        "projector": "random",
    }
    for changes in ({"model": folder}, parts | {"language_model": folder}, parts | {"vision_tower": folder}):
        code, said = verdict(config(world, "given", **changes)[0], capsys)
        assert code == 2 and matches(said, wanted) and folder in said, said


@pytest.mark.parametrize("case", FOLDERS)
def test_chat_says_of_a_wrong_folder_what_training_says(tmp_path, case, capsys):
    files, wanted = FOLDERS[case]
    folder = str(deep(tmp_path / (case if "--" in case else "given"), files))
    assert chat_command.main([folder, "--ask", "?"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava_nb chat: ") and said.count("\n") == 1 and matches(said, wanted) and folder in said, (
        said
    )


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("llm", "a 'llama' model is not.*`language_model`"),
        ("tower", "a 'clip_vision_model' model is not"),
        ("bert", "a 'bert' model is not"),
        ("llm/model.safetensors", "is one file of a model; give the folder"),
        ("nowhere/at/all", "no such folder"),
    ],
)
def test_chat_with_another_kind_of_model_is_one_line(world, given, wanted, capsys):
    assert chat_command.main([str(world / given), "--ask", "?"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llava_nb chat: ") and said.count("\n") == 1 and matches(said, wanted) and given in said, (
        said
    )


ROLES = {
    "a language model as model": ({"model": "llm"}, "give it as --language_model"),
    "a tower as language model": ({"language_model": "tower"}, "language_model: .*tower"),
    "a language model as tower": ({"vision_tower": "llm"}, "llm"),
    "BERT as language model": ({"language_model": "bert"}, "bert"),
    "a projector of another model": ({"projector": "start"}, "the projector does not fit"),
    "a file of weights": ({"language_model": "llm/model.safetensors"}, "is one file of a model; give the folder"),
    "a pickle as projector": ({"projector": "mm_projector.bin"}, "`llava_nb convert"),
    "GGUF as projector": ({"projector": "x.gguf"}, "is not safetensors"),
    "an adapter as projector": ({"projector": "adapter"}, "holds an adapter (LoRA)"),
    "a layer that is not there": ({"vision_feature_layer": -9}, "vision_feature_layer -9"),
    "a loss that is not installed": ({"loss_kernel": "liger"}, "loss_kernel 'liger' cannot be used on cpu"),
    "attention of a GPU": ({"attention": "varlen"}, "attention 'varlen' cannot be used on cpu"),
    "a template of other tokens": ({"template": "chatml"}, "which this tokenizer does not know"),
    "no template of its own": ({"template": "chat_template"}, "brings none"),
    "a length below a picture": ({"model_max_length": 4}, "leaves no room for text"),
    "a length beyond the model": ({"model_max_length": 10**6}, "positions of the language model"),
    "an optimizer that cannot be saved": ({"optim": "adafactor"}, "optim"),
    "a schedule that wants more": (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescal": 3}'},
        "lr_scheduler",
    ),
    "rows shorter than a record": ({"max_tokens": 8}, "max_tokens 8: record"),
    "saves that are no multiple": (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_data_path": "records.json",
            "eval_steps": 3,
            "save_steps": 2,
        },
        "multiple",
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_a_part_in_another_place_or_a_setting_that_does_not_fit(world, case, capsys):
    changes, wanted = ROLES[case]
    (world / "mm_projector.bin").write_text("x")
    (world / "x.gguf").write_text("GGUF")
    written(world / "adapter", {"adapter_config.json": {}, "adapter_model.safetensors": ""})
    changes = {k: str(world / v) if isinstance(v, str) and (world / v).exists() else v for k, v in changes.items()}
    parts = (
        {}
        if "model" in changes or "template" in changes
        else {
            "model": None,
            "language_model": str(world / "llm"),
            "vision_tower": str(world / "tower"),
            "projector": "random",
        }
    )
    code, said = verdict(config(world, "fitting", **parts | changes)[0], capsys)
    assert code == 2 and matches(said, wanted), said


def test_a_tokenizer_that_is_not_the_models(world, tmp_path, capsys):
    shutil.copytree(world / "start", tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    tokenizer.add_tokens([f"<new{k}>" for k in range(200)])
    tokenizer.save_pretrained(tmp_path / "more")
    code, said = verdict(config(world, "more", model=str(tmp_path / "more"))[0], capsys)
    assert code == 2 and "the tokenizer has ids up to" in said


def test_a_model_without_the_templates_end_token(world, tmp_path, capsys):
    """A base model whose tokenizer ends in a token of its own: taken, and said."""
    shutil.copytree(world / "start", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        file = tmp_path / "other" / name
        if file.is_file():
            file.write_text(file.read_text().replace("</s>", "<eos>"))
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token == "<eos>"
    file, _ = config(world, "ended", model=str(tmp_path / "other"))
    for argv in (["doctor", str(file)], [str(file), "--dry_run"]):
        assert train.main(argv) == 0
        assert (
            "note: template v1 ends answers with '<eos>', the end token of this tokenizer, which has no </s>"
            in capsys.readouterr().out
        )


def test_weights_that_are_not_whole(world, tmp_path, capsys):
    shutil.copytree(world / "start", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, said = verdict(config(world, "cut", model=str(tmp_path / "cut"))[0], capsys)
    assert code == 2 and "not a whole safetensors file" in said


def test_a_folder_that_another_run_holds(world, capsys):
    file, settings = config(world, "held")
    out = written(world / "held", {"run.json": {"pid": 7, "host": "here", "since": "noon"}, "run.lock": ""})
    with (out / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code, said = verdict(file, capsys)
    assert code == 2 and "process 7 on here has been training in it since noon" in said


def test_a_folder_that_takes_no_files(world, tmp_path, capsys):
    """An output folder below a file."""
    (tmp_path / "file").write_text("x")
    code, said = verdict(config(world, "below", output_dir=str(tmp_path / "file" / "out"))[0], capsys)
    assert code == storage.StorageFailed.exit_code == 7 and "cannot be written to" in said


def test_a_disk_without_room(world, tmp_path, capsys, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    code, said = verdict(config(world, "full", output_dir=str(tmp_path / "out"))[0], capsys)
    assert code == 7 and "1.0 kB are free, and 2 checkpoints of" in said


@pytest.mark.parametrize(
    "made, resume, wanted",
    [
        ({"checkpoint-3/config.json": "{}"}, None, "nothing to resume, checkpoint-3: it has no readable MANIFEST.json"),
        ({}, "True", "nothing to resume, no checkpoint-* folder"),
        ({"checkpoint-3/config.json": "{}"}, "False", "holds checkpoint-3 of an earlier run"),
        ({}, "nowhere/checkpoint-9", "cannot be resumed"),
        ({"run.json": {"sealed": "checkpoint-9"}}, None, "an earlier run committed checkpoint-9 here, and it is gone"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from(world, tmp_path, made, resume, wanted, capsys):
    out = deep(tmp_path / "out", made)
    code, said = verdict(
        config(world, "resumed", output_dir=str(out), **({"resume": resume} if resume else {}))[0], capsys
    )
    assert code == 4 and wanted in said


def test_several_problems_are_told_together_by_all_three(world, tmp_path, capsys):
    """A checkpoint, a projector and a record at once: the first gives the code."""
    (tmp_path / "bad.json").write_text(json.dumps([{"id": 1}]))
    save_file(
        {f"linear_{k}.{leaf}": torch.zeros(3) for k in (1, 2) for leaf in ("weight", "bias")},
        tmp_path / "p.safetensors",
    )
    file, _ = config(
        world,
        "several",
        output_dir=str(deep(tmp_path / "out", {"checkpoint-3/config.json": "{}"})),
        projector=str(tmp_path / "p.safetensors"),
        data_path=str(tmp_path / "bad.json"),
    )
    code, said = verdict(file, capsys)
    assert code == 4 and said == "llava_nb: 3 things are wrong"


def test_a_dry_run_says_what_it_could_not_check(world, tmp_path, capsys):
    """Data, pictures and projector may lie on another machine; a model may not."""
    file, _ = config(
        world, "elsewhere", data_path="/nowhere/r.json", image_folder="/nowhere", projector="/nowhere/projector"
    )
    assert train.main([str(file), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for name in ("data_path: /nowhere/r.json", "image_folder: /nowhere", "projector: /nowhere/projector"):
        assert f"not checked: {name} does not exist" in out
    file, _ = config(world, "pictures", image_folder="/nowhere")
    assert train.main([str(file), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "not checked: image_folder" in out and "96 records" in out and "all of them checked and counted" in out


def test_a_dry_run_converts_once_and_the_run_reads_it(world, tmp_path, capsys, monkeypatch):
    from llava_nb.store import conversion

    made, convert = [], conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda *a: (made.append(1), convert(*a)))
    file, _ = config(world, "once", records_cache=str(tmp_path), projector=str(world / "no"))
    assert train.main([str(file), "--dry_run"]) == 0 and made == [1]
    assert train.main(["doctor", str(file)]) == 2 and train.main([str(file), "--dry_run"]) == 0 and made == [1]
    assert not (world / "once" / "run.json").exists()
