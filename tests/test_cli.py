"""The command: nothing is built for a wrong one, DeepSpeed files as people bring them, parts put together anew when they change."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llava_nb import train
from llava_nb.fast import zero
from llava_nb.masking import tiny_tokenizer
from llava_nb.run import assemble as assembling
from llava_nb.run import command_line
from llava_nb.safe.exits import EXIT_CODES
from llava_nb.safe.reliable_trainer import OWN, ReliableTrainingArguments

ROOT = Path(__file__).resolve().parent.parent

BLOCKS = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
ZERO3 = BLOCKS | {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny language models and a tower as folders, four records."""
    where, tokenizer = tmp_path_factory.mktemp("world"), tiny_tokenizer()
    for name, layers in (("llm", 1), ("deeper", 2)):
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
        AutoModelForCausalLM.from_config(text).save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(where / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        where / "tower"
    )
    Image.new("RGB", (30, 20), "teal").save(where / "a.png")
    record = {
        "id": 0,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A shade."}],
    }
    (where / "r.json").write_text(json.dumps([record] * 4))
    return where


def words(world: Path, **changes) -> list[str]:
    settings = {
        "language_model": world / "llm",
        "vision_tower": world / "tower",
        "projector": "random",
        "data_path": world / "r.json",
        "image_folder": world,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "report_to": "none",
        "output_dir": world / "out",
    } | changes
    return [word for k, v in settings.items() for word in (f"--{k}", str(v))]


def test_a_deepspeed_file_of_the_reference_is_accepted(world, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3))
    argv = words(world, deepspeed=tmp_path / "ds.json")
    assert train.main([*argv, "--dry_run"]) == 0
    assert zero.read_deepspeed_config(train.parse(argv).settings["deepspeed"], 0.5) == ZERO3 | {
        "gradient_clipping": 0.5
    }


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_a_deepspeed_file_that_replaces_optimizer_or_schedule_is_refused(world, tmp_path, key, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3 | {key: {"type": "X"}}))
    assert train.main(words(world, deepspeed=tmp_path / "ds.json")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"ds.json: the key '{key}'" in err


WRONG = {
    "did you mean 'learning_rate'": {"learnin_rate": 1},
    "data_path: /none.json does not exist": {"data_path": "/none.json"},
    "image_folder: /none does not exist": {"image_folder": "/none"},
    "eval_data_path: /none.json": {"eval_data_path": "/none.json", "eval_strategy": "steps"},
    "projector: /none does not exist": {"projector": "/none"},
    "language_model: /none does not exist": {"language_model": "/none"},
    "belongs to stage 1": {"template": "plain"},
    "is unknown; known are": {"template": "vicuna"},
    "--learning_rate": {"learning_rate": "abc"},
    "use one of modality": {"sampler": "len"},
    "argument --optim: invalid choice: 'adamw'": {"optim": "adamw"},
    "not JSON": {"data_path": "BAD"},
}


@pytest.mark.parametrize("message", WRONG)
def test_nothing_is_built_for_a_wrong_command(world, tmp_path, message, capsys, monkeypatch):
    for name in ("assemble", "load_model"):
        monkeypatch.setattr(assembling, name, lambda *a: pytest.fail("built a model"))
    (tmp_path / "bad.json").write_text("[{")
    changes = {k: tmp_path / "bad.json" if v == "BAD" else v for k, v in WRONG[message].items()}
    assert train.main(words(world, output_dir=tmp_path / "out", **changes)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert {p.name for p in (tmp_path / "out").glob("*")} <= {"run.json", "run.lock"}


def test_parts_are_put_together_once_and_again_when_they_change(world, tmp_path, capsys, monkeypatch):
    made, assemble = [], assembling.assemble
    monkeypatch.setattr(
        assembling,
        "assemble",
        lambda m, folder, seed: (made.append(Path(m.language_model).name), assemble(m, folder, seed)),
    )
    layers = lambda: json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["num_hidden_layers"]
    for llm, expected in (("llm", 1), ("llm", 1), ("deeper", 2)):
        assert (
            train.main(words(world, language_model=world / llm, output_dir=tmp_path / "out")) == 0
            and layers() == expected
        )
    assert made == ["llm", "deeper"]
    (tmp_path / "out" / "start" / "made_from.json").unlink()  # as a killed run leaves it
    assert train.main(words(world, language_model=world / "deeper", output_dir=tmp_path / "out")) == 0 and made[2:] == [
        "deeper"
    ]


def test_what_a_run_says_and_writes(world, tmp_path, capsys):
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "language_model": str(world / "llm"),
                "vision_tower": str(world / "tower"),
                "learning_rate": 1e-3,
                "stage": 2,
                "version": "v1",
            }
        )
    )
    argv = [
        a
        for pair in zip(*[iter(words(world, output_dir=tmp_path / "out", max_steps=2))] * 2)
        for a in pair
        if pair[0] not in ("--language_model", "--vision_tower")
    ]
    assert train.main([str(tmp_path / "run.json"), *argv, "--lazy_preprocess", "True", "--local_rank", "0"]) == 0
    out = capsys.readouterr().out
    for line in (
        "4 records",
        "step     2/2  loss",
        "done: 2 steps, 4 samples",
        "0 % padding",
        "final loss",
        "result: ",
        "chat:   llava_nb chat",
    ):
        assert line in out, line
    assert out.count("note: ") == out.count("lazy_preprocess") == 1
    assert [
        h["step"]
        for h in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        if "loss" in h
    ] == [1, 2]
    again = train.parse([str(tmp_path / "out" / "config_resolved.json")])
    first = train.parse([str(tmp_path / "run.json"), *argv])
    assert (
        again.settings == first.settings
        and (again.model, again.data, again.run) == (first.model, first.data, first.run)
        and not again.notes
    )


# Help and completion


def test_help_names_every_setting_and_every_command(capsys):
    assert train.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for f in dataclasses.fields(ReliableTrainingArguments):
        if f.name in OWN:
            assert f"--{f.name} " in out and command_line.settings_help()[f.name] == f.metadata["help"]
    for name in train.config.field_names(*train.config.CONFIGS):
        assert f"--{name} " in out, name
    assert train.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in command_line.COMMANDS) and all(
        f"  {code:>2}  " in out for code in EXIT_CODES
    )
    assert train.main([]) == 2


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_each_command_has_its_own_help(name, capsys):
    assert train.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: llava_nb {'[train]' if name == 'train' else name}")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([name, "--help"] for name in command_line.COMMANDS),
        ["completion", "bash"],
        ["convert"],
        ["launch", "--restarts", "x"],
    ],
)
def test_nothing_heavy_is_imported_for_a_help_text_or_a_wrong_word(words):
    """The imports of the program itself, in a fresh process."""
    heavy = "{'torch', 'transformers', 'numpy', 'deepspeed', 'PIL'}"
    script = f"import sys; from llava_nb.run.command_line import main; main({words!r}); print('loaded:', {heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("loaded: set()\n"), done.stdout[-500:] + done.stderr[-500:]


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "llava_nb.train"],
        ["llava_nb/train.py"],
        ["-c", "from llava_nb.run.command_line import program; program()"],
    ],
)
def test_help_answers_at_once(start):
    """The best of five, less what Python itself takes: under half a second."""

    def took(argv):
        begun = time.perf_counter()
        assert subprocess.run([sys.executable, *argv], capture_output=True, cwd=ROOT).returncode == 0
        return time.perf_counter() - begun

    assert min(took([*start, "--help"]) for _ in range(5)) < 0.5


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_settings(shell, capsys):
    assert train.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in (*command_line.COMMANDS, "projector_lr", "hang_timeout", "image_folder", "restarts", "max_new_tokens"):
        assert word in out, word


def test_bash_completes_a_setting():
    """The script, run by bash itself, as a user's shell does."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    script = """
source <({python} -c "from llava_nb.run.command_line import main; main(['completion', 'bash'])")
COMP_WORDS=(llava_nb doctor --proj); COMP_CWORD=2; COMP_LINE="llava_nb doctor --proj"; COMP_POINT=${{#COMP_LINE}}
$(complete -p llava_nb | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${{COMPREPLY[@]}}"
""".format(python=sys.executable)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert set(done.stdout.split()) == {"--projector", "--projector_type", "--projector_lr"}, done.stdout + done.stderr


def test_the_page_of_exit_codes_has_every_code():
    page = (ROOT / "docs" / "exit_codes.md").read_text()
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", page, re.M)] == list(EXIT_CODES)


def test_the_story_of_a_run_is_short():
    lines = [
        line
        for line in (ROOT / "llava_nb" / "train.py").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(lines) <= 120
