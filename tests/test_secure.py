"""Nothing let in: no pickle runs, no code comes with a folder, nothing outside is opened, nobody is called."""

import ast
import ctypes
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import config, launch, make_world, run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llava_nb.base.image_files as image_files
import llava_nb.base.trust as trust
import llava_nb.safe.convert as convert
from llava_nb import chat, train
from llava_nb.base.image_files import Bounded, Refused, open_image
from llava_nb.conversation import get_template
from llava_nb.llava import load_llava, load_tower, read_projector
from llava_nb.masking import tiny_tokenizer
from llava_nb.run import chat_command, checks
from llava_nb.safe.integrity import commit_checkpoint
from llava_nb.vision import image_processor_for

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "llava_nb").rglob("*.py"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny run, and its model in two parts."""
    where = make_world(tmp_path_factory.mktemp("world"))
    model, tokenizer = load_llava(where / "start"), tiny_tokenizer()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(where / "llm")
    tokenizer.save_pretrained(where / "llm")
    type(model.model.vision_tower)(model.config.vision_config).save_pretrained(where / "tower")
    image_processor_for(where / "start").save_pretrained(where / "tower")
    return where


@pytest.fixture
def start(world, tmp_path):
    return Path(shutil.copytree(world / "start", tmp_path / "start"))


# Pickles


class Payload:
    """Leaves a mark when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def plain(file: Path, mark: Path):
    file.write_bytes(pickle.dumps({"weight": Payload(mark)}))


def zipped(file: Path, mark: Path):
    with file.open("wb") as f:
        torch.save(
            {"weight": torch.ones(2), "more": Payload(mark)}, f
        )  # torch's own writer takes no name like .metadata


def test_the_payloads_are_real(tmp_path):
    for k, write in enumerate((plain, zipped)):
        write(tmp_path / f"{k}.bin", tmp_path / f"mark{k}")
        if write is plain:
            pickle.loads((tmp_path / "0.bin").read_bytes())
        else:
            torch.load(tmp_path / "1.bin", weights_only=False)
        assert (tmp_path / f"mark{k}").exists()


def poisoned(folder: Path, name: str, write, mark: Path) -> Path:
    """A model folder whose weights are this pickle."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    write(folder / name, mark)
    return folder


def by_train(world, tmp_path, *flags, **changes):
    settings = config(
        world, "out", **{"max_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "out")} | changes
    )[1]
    (tmp_path / "c.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return train.main([*flags, str(tmp_path / "c.json")])


ENTRIES = {
    "train model=": lambda w, t, bad: by_train(w, t, model=str(bad("start"))),
    "train language_model=": lambda w, t, bad: by_train(
        w, t, model=None, language_model=str(bad("llm")), vision_tower=str(w / "tower"), projector="random"
    ),
    "train vision_tower=": lambda w, t, bad: by_train(
        w, t, model=None, language_model=str(w / "llm"), vision_tower=str(bad("tower")), projector="random"
    ),
    "train projector=": lambda w, t, bad: by_train(w, t, projector=str(bad("start"))),
    "feature cache": lambda w, t, bad: by_train(w, t, model=str(bad("start")), feature_cache=str(t / "features")),
    "chat": lambda w, t, bad: chat_command.main([str(bad("start")), "--ask", "What?"]),
    "convert": lambda w, t, bad: train.main(["convert", str(bad("start")), str(t / "converted")]),
}
FILES = [
    (name, write)
    for write in (plain, zipped)
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
        "model.safetensors",
        "projector.safetensors",
    )
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_pickle_in_a_model_folder_runs_nowhere(world, tmp_path, entry, capfd):
    for k, (name, write) in enumerate(FILES):
        here = tmp_path / str(k)
        here.mkdir()
        code = ENTRIES[entry](
            world,
            here,
            lambda part: poisoned(Path(shutil.copytree(world / part, here / part)), name, write, here / "mark"),
        )
        said = capfd.readouterr().err
        assert code == 2 and not (here / "mark").exists(), (name, write, said)
        assert "Traceback" not in said and said.strip(), (name, said)


def test_a_pickle_as_a_projector_runs_nowhere(world, tmp_path, capsys):
    for name, write in (
        (n, w) for w in (plain, zipped) for n in ("mm_projector.bin", "p.pt", "p.pth", "p.ckpt", "p.safetensors")
    ):
        write(tmp_path / name, tmp_path / "mark")
        assert by_train(world, tmp_path, projector=str(tmp_path / name)) == 2
        with pytest.raises(ValueError):
            read_projector(tmp_path / name)
        assert not (tmp_path / "mark").exists() and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("write", [plain, zipped])
def test_convert_runs_no_pickle(tmp_path, write, capsys):
    write(tmp_path / "mm_projector.bin", tmp_path / "mark")
    assert train.main(["convert", str(tmp_path / "mm_projector.bin"), str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "not converted" in said
        and not (tmp_path / "mark").exists()
        and not list(tmp_path.glob("to/*"))
    )


def test_the_doctor_refuses_pickles_and_runs_none(world, tmp_path, capsys):
    bad = poisoned(
        Path(shutil.copytree(world / "start", tmp_path / "start")), "pytorch_model.bin", zipped, tmp_path / "mark"
    )
    file = config(world, "doctor", model=str(bad), output_dir=str(tmp_path / "out"))[0]
    assert train.main(["doctor", str(file)]) == 2 and not (tmp_path / "mark").exists()
    assert "its weights are pickles (pytorch_model.bin)" in capsys.readouterr().err


# Training state. It becomes safetensors and JSON; until then these cells may fail.

STATE = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "pytorch_model.bin",
    ".metadata",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run with one sealed checkpoint."""
    where = tmp_path_factory.mktemp("stopped")
    assert by_train(world, where, max_steps=2, save_strategy="steps", save_steps=1) == 0
    shutil.rmtree(where / "out" / "checkpoint-2")
    return where


@pytest.mark.parametrize("name", STATE)
def test_a_pickle_in_a_checkpoint_runs_nowhere(world, stopped, tmp_path, name, capsys):
    for k, write in enumerate((plain, zipped)):
        here = Path(shutil.copytree(stopped, tmp_path / str(k)))
        if name == "pytorch_model.bin":
            (here / "out" / "checkpoint-1" / "model.safetensors").unlink()
        write(here / "out" / "checkpoint-1" / name, here / "mark")
        commit_checkpoint(here / "out" / "checkpoint-1")  # whoever can write a pickle can write a seal
        assert by_train(world, here, max_steps=2, save_strategy="no", resume=str(here / "out" / "checkpoint-1")) in (
            0,
            2,
        )
        assert not (here / "mark").exists() and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_pickle_among_deepspeeds_files_runs_nowhere(world, tmp_path):
    file, here = (
        config(world, "ds", max_steps=2, save_steps=1, zero=2, output_dir=str(tmp_path / "ds"))[0],
        tmp_path / "ds" / "checkpoint-1",
    )
    launch(file, 1)
    shutil.rmtree(tmp_path / "ds" / "checkpoint-2")
    assert not [
        p for p in here.rglob("*") if p.suffix in (".pt", ".pth", ".bin")
    ]  # our own has none; these lie where DeepSpeed would look
    (here / "global_step1").mkdir()
    for name in (
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
    ):
        plain(here / "global_step1" / name, tmp_path / "mark")
    (here / "latest").write_text("global_step1")
    commit_checkpoint(here)
    done = run(file, 1, "--resume", str(here))
    assert not (tmp_path / "mark").exists() and "Traceback" not in done.stderr and done.returncode == 0, done.stderr[
        -2000:
    ]


# Converting


def test_llavas_projector_becomes_ours_and_its_child_is_alone(tmp_path, monkeypatch):
    weights = {
        f"model.mm_projector.{k}.{leaf}": torch.randn(shape)
        for k, shapes in (("0", ((4, 3), (4,))), ("2", ((4, 4), (4,))))
        for leaf, shape in zip(("weight", "bias"), shapes)
    }
    torch.save(weights, tmp_path / "mm_projector.bin")
    assert train.main(["convert", str(tmp_path / "mm_projector.bin"), str(tmp_path / "stage1")]) == 0
    found = read_projector(tmp_path / "stage1")
    assert (
        torch.equal(found["linear_1.weight"], weights["model.mm_projector.0.weight"])
        and torch.equal(found["linear_2.bias"], weights["model.mm_projector.2.bias"])
        and len(found) == 4
    )
    linear = convert.our_projector(
        {"model.mm_projector.weight": torch.ones(4, 3), "model.mm_projector.bias": torch.ones(4)}
    )
    assert torch.equal(linear["linear_2.weight"], torch.eye(4)) and not linear["linear_2.bias"].any()
    with pytest.raises(ValueError, match="other layers"):
        convert.our_projector({"model.mm_projector.4.weight": torch.ones(1)})


def test_a_sharded_model_folder_is_converted_and_says_the_same(world, tmp_path):
    source = Path(shutil.copytree(world / "llm", tmp_path / "llm"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, files = sorted(weights), [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    halves = names[:5], names[5:]
    for half, file in zip(halves, files):
        torch.save({n: weights[n] for n in half}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {n: f for half, f in zip(halves, files) for n in half}})
    )
    (source / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="llava_nb convert"):
        trust.load(LlamaForCausalLM, source, weights=True)
    assert train.main(["convert", str(source), str(tmp_path / "new")]) == 0
    found = trust.load(LlamaForCausalLM, tmp_path / "new", weights=True).state_dict()
    assert (
        not list((tmp_path / "new").glob("*.py"))
        and not list((tmp_path / "new").glob(".*"))
        and all(torch.equal(found[n], weights[n]) for n in names)
    )


CHILD = """import socket, subprocess, os, sys
from llava_nb.safe import convert
def tried(act):
    try: act(); return "done"
    except PermissionError: return "refused"
sys.addaudithook(convert._deny); convert._bound(1000)
print(tried(lambda: socket.create_connection(("127.0.0.1", 9))), tried(lambda: subprocess.run(["true"])), tried(lambda: os.system("true")), tried(os.fork))
try: bytearray(64 << 30); print("memory")
except MemoryError: print("bounded")
"""


def test_the_child_can_call_nobody_start_nothing_and_take_little():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split() == ["refused"] * 4 + ["bounded"], done.stderr[-500:]


# Folders

HOSTILE = {
    "config.json": [
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"text_config": {"auto_map": {"AutoModel": "o/n--evil.Model"}}},
        {"_attn_implementation_internal": "owner/kernel"},
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": {"text_config": "owner/kernel:f"}},
        {"vision_config": {"attn_implementation": "owner/kernel"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"trust_remote_code": True},
        {"transformers_weights": "../../other.safetensors"},
        {"configuration_files": ["../config.4.0.0.json"]},
        {"model_type": "../evil"},
        {"architectures": ["os.system"]},
    ],
    "tokenizer_config.json": [
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"tokenizer_class": "owner/evil"},
        {"fast_tokenizer_files": ["../tokenizer.1.json"]},
    ],
    "processor_config.json": [{"auto_map": {"AutoProcessor": "evil.P"}}, {"processor_class": "evil.P"}],
    "preprocessor_config.json": [{"auto_map": {"AutoImageProcessor": "evil.P"}}, {"image_processor_type": "evil/P"}],
    "generation_config.json": [{"custom_pipelines": {"x": {"impl": "evil.P"}}}, {"trust_remote_code": True}],
    "chat_template.json": [{"auto_map": {}}],
}
READERS = [
    lambda f: trust.load(AutoConfig, f),
    lambda f: trust.load(AutoTokenizer, f),
    image_processor_for,
    load_llava,
    load_tower,
    chat.load_for_chat,
    checks.architecture,
]


HOLE = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
[getattr(libc, name) for name in ("open", "truncate", "unlink", "symlink", "execl", "kill")]      # taken before the walls are up, as a hole in a reader written in C would have it
import torch, llava_nb.safe.convert as convert
OUTSIDE = {outside!r}.encode()
def attempts():
    yield "writes", libc.open(OUTSIDE + b"/new", os.O_WRONLY | os.O_CREAT, 0o600) >= 0
    yield "changes", libc.truncate(OUTSIDE + b"/secret", 0) == 0
    yield "reads", libc.open(OUTSIDE + b"/secret", os.O_RDONLY) >= 0
    yield "removes", libc.unlink(OUTSIDE + b"/secret") == 0
    yield "links", libc.symlink(b"/", OUTSIDE + b"/link") == 0
    yield "starts", libc.execl(b"/bin/sh", b"/bin/sh", b"-c", b"exit 0", None) >= 0
    yield "starts-python", libc.execl(sys.executable.encode(), sys.executable.encode(), b"-c", b"", None) >= 0
    yield "signals", libc.kill(os.getppid(), 0) == 0
    yield "signals-the-group", os.getpgid(0) != os.getpid()
    for name, call in (("python-writes", lambda: open(OUTSIDE + b"/new", "w")), ("python-truncates", lambda: os.truncate(OUTSIDE + b"/secret", 0)), ("python-kills", lambda: os.killpg(0, 0))):
        try: call(); yield name, True
        except PermissionError: pass
torch.load = lambda *args, **kw: {{name: torch.ones(1) for name, done in attempts() if done}} | {{"end": torch.ones(1)}}
convert._inside(*sys.argv[1:])
"""


def kernel_holds() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)) >= 6


@pytest.mark.skipif(
    sys.platform != "linux" or not kernel_holds(), reason="the kernel's Landlock is older than version 6"
)
def test_a_hole_in_the_reader_reaches_nothing(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    (tmp_path / "a.bin").write_bytes(b"whatever")
    (tmp_path / "to").mkdir()
    monkeypatch.setattr(convert, "_CHILD", HOLE.format(outside=str(outside)))
    convert.to_safetensors(tmp_path / "a.bin", tmp_path / "to" / "a.safetensors")
    assert set(load_file(tmp_path / "to" / "a.safetensors")) == {"end"}
    assert (outside / "secret").read_text() == "mine" and [p.name for p in outside.iterdir()] == ["secret"]
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["a.safetensors"]


def test_a_conversion_ends_with_its_time_and_takes_all_it_started_along(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.bin")
    monkeypatch.setattr(
        convert,
        "_CHILD",
        f"import os, time\nif not os.fork(): open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)",
    )
    monkeypatch.setattr(convert, "HOURS", 4 / 3600)
    with pytest.raises(ValueError, match="a.bin: not converted, reading it took more than"):
        convert.read_pickle(tmp_path / "a.bin")
    time.sleep(0.2)
    assert (
        not Path(f"/proc/{(tmp_path / 'pid').read_text()}/cmdline").exists()
        or not Path(f"/proc/{(tmp_path / 'pid').read_text()}/cmdline").read_bytes()
    )
    monkeypatch.setattr(
        convert, "_CHILD", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
    )
    monkeypatch.setattr(convert, "HOURS", 1)
    with pytest.raises(ValueError, match="s of computing"):
        convert.read_pickle(tmp_path / "a.bin")


NESTED = ()
for _ in range(24):
    NESTED = (NESTED, NESTED)


@pytest.mark.parametrize(
    "name",
    ["mm_projector.\x1b[31m.weight", "a\nllava_nb convert: written", "__metadata__", NESTED, 7],
    ids=["escape", "line", "metadata", "nested", "number"],
)
def test_odd_names_of_tensors_are_one_line(tmp_path, name, capfd):
    torch.save({name: torch.ones(1)}, tmp_path / "a.bin")
    assert train.main(["convert", str(tmp_path / "a.bin"), str(tmp_path / "to")]) == 2
    said = capfd.readouterr().err
    assert (
        said.count("\n") == 1
        and len(said) < 600
        and str(tmp_path / "a.bin") in said
        and ".convert-" not in said
        and said.rstrip("\n").isprintable()
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_that_names_code_is_refused_by_every_reader(start, name):
    file = start / name
    kept = file.read_text() if file.is_file() else None
    (start / "evil.py").write_text(f"open({str(start / 'mark')!r}, 'w')")
    for keys in HOSTILE[name]:
        file.write_text(json.dumps(json.loads(kept or "{}") | keys))
        for read in READERS:
            with pytest.raises(ValueError, match=re.escape(name)):
                read(start)
    assert not (start / "mark").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 200_000,
        "[]",
        '{"model_type": 7}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "nobody_knows"}',
        "\x00",
    ],
)
def test_a_configuration_that_is_none_is_one_line(world, start, tmp_path, text, capsys):
    (start / "config.json").write_text(text)
    assert by_train(world, tmp_path, model=str(start)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_adapter_is_refused(start):
    (start / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    with pytest.raises(ValueError, match="adapter"):
        load_llava(start)


@pytest.mark.parametrize(
    "shard",
    [
        "../other/model.safetensors",
        "/etc/hostname",
        "sub/model.safetensors",
        "..",
        ".",
        "model\\..",
        "missing.safetensors",
    ],
)
def test_an_index_names_files_beside_it(start, shard):
    weights = load_file(start / "model.safetensors")
    (start / "model.safetensors").rename(start / "model-00001-of-00001.safetensors")
    (start / "model.safetensors.index.json").write_text(
        json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": {k: "model-00001-of-00001.safetensors" for k in weights}}
        )
    )
    load_llava(start)
    (start / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: shard for k in weights}}))
    with pytest.raises(ValueError, match="index.json"):
        load_llava(start)


def damaged(whole: bytes):
    yield whole[:-1]
    yield whole[: len(whole) // 2]
    yield whole[:7]
    yield b""
    yield whole + b"x"
    yield b"\xff" * 8 + whole[8:]
    yield whole[:20] + b"\x00" + whole[21:]


def test_a_damaged_shard_is_named_in_one_line(world, start, tmp_path, capsys):
    whole = (start / "model.safetensors").read_bytes()
    for bytes_ in damaged(whole):
        (start / "model.safetensors").write_bytes(bytes_)
        with pytest.raises(ValueError, match="model.safetensors: not a whole"):
            load_llava(start)
        (tmp_path / "p.safetensors").write_bytes(bytes_)
        with pytest.raises(ValueError, match="p.safetensors: not a whole"):
            read_projector(tmp_path / "p.safetensors")
    assert by_train(world, tmp_path, model=str(start)) == 2
    assert capsys.readouterr().err.count("\n") == 1


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ self.__init__.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% set x = messages.append(1) %}",
    "{% for x in range(10**12) %}{% endfor %}",
    "{% include '/etc/hostname' %}",
    "{{ nothing.at.all }}",
    "{% broken",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_chat_template_cannot_leave_its_sandbox(start, attack):
    (start / "chat_template.jinja").write_text(attack.replace("MARK", str(start / "mark")))
    tokenizer = trust.load(AutoTokenizer, start)
    assert tokenizer.chat_template.startswith(attack[:10])
    with pytest.raises(ValueError, match="template"):
        get_template("chat_template", tokenizer)
    assert not (start / "mark").exists()


# The hub

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(start, tmp_path, monkeypatch):
    """The hub's cache, as a download leaves it."""
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / REVISION
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(REVISION)
    for k, file in enumerate(sorted(start.iterdir())):
        shutil.copy(file, cache / "blobs" / str(k))
        (snapshot / file.name).symlink_to(f"../../blobs/{k}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    trust._newest.cache_clear()
    yield snapshot
    trust._newest.cache_clear()


def test_a_hub_id_is_one_revision_told_or_pinned(hub, capsys):
    for _ in range(2):
        load_llava("owner/name")
    assert capsys.readouterr().err.count(f"owner/name@{REVISION}") == 1
    assert trust.local(f"owner/name@{REVISION}", weights=True) == hub and not capsys.readouterr().err
    for name, error, said in (
        ("owner/name@main", ValueError, "40 hexadecimal"),
        (f"owner/name@{'f' * 40}", FileNotFoundError, "give a folder"),
        ("owner/none", FileNotFoundError, "give a folder"),
        ("../none", FileNotFoundError, "no such folder"),
    ):
        with pytest.raises(error, match=said):
            trust.local(name)


def test_a_link_of_the_cache_stays_in_its_repository(hub, tmp_path):
    other = tmp_path / "hub" / "models--other--one"
    other.mkdir()
    (other / "x").write_text("{}")
    (hub / "vocab.txt").symlink_to(other / "x")
    with pytest.raises(ValueError, match="a link out of the folder"):
        trust.local("owner/name")


# Paths

WATCH = []  # the lists that note what is opened; a hook stays for ever
sys.addaudithook(lambda event, args: [w.append(args[0]) for w in WATCH] if event == "open" and WATCH else None)


def link_out(f, outside):
    (f / "tokenizer_config.json").unlink()
    (f / "tokenizer_config.json").symlink_to(outside / "tokenizer_config.json")


def link_weights(f, outside):
    (f / "model.safetensors").unlink()
    (f / "model.safetensors").symlink_to(outside / "model.safetensors")


def link_up(f, outside):
    (f / "vocab.txt").symlink_to("../outside/config.json")


def pipe(f, outside):
    (f / "generation_config.json").unlink()
    os.mkfifo(f / "generation_config.json")


def device(f, outside):
    (f / "special_tokens_map.json").symlink_to("/dev/zero")


def templates(f, outside):
    (f / "additional_chat_templates").mkdir()
    (f / "additional_chat_templates" / "x.jinja").symlink_to(outside / "config.json")


def index(f, outside):
    (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside/model.safetensors"}}))


def absolute(f, outside):
    (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": str(outside / "model.safetensors")}})
    )


@pytest.mark.parametrize("spoil", [link_out, link_weights, link_up, pipe, device, templates, index, absolute])
def test_nothing_outside_a_model_folder_is_opened(world, start, tmp_path, spoil, capsys):
    outside = Path(shutil.copytree(start, tmp_path / "outside"))
    spoil(start, outside)
    WATCH.append([])
    try:
        codes = by_train(world, tmp_path, model=str(start)), chat_command.main([str(start), "--ask", "What?"])
    finally:
        opened = WATCH.pop()
    assert codes == (2, 2) and "Traceback" not in capsys.readouterr().err
    where = {
        Path(os.path.realpath(p)) for p in opened if isinstance(p, (str, bytes, os.PathLike)) for p in [os.fsdecode(p)]
    }
    allowed = [
        start.resolve(),
        (tmp_path / "c.json").resolve(),
        world.resolve(),
        (tmp_path / "out").resolve(),
        ROOT,
        Path(os.environ["LLAVA_NB_CACHE"]).resolve(),
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
        Path("/proc"),
        Path("/sys"),
        Path("/usr"),
    ]
    assert where and not [p for p in where if not any(p.is_relative_to(a) for a in allowed)]


# The package itself

MODULES_THAT_RUN = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "requests",
    "httpx",
    "urllib",
    "urllib3",
    "aiohttp",
    "http",
    "ftplib",
    "telnetlib",
    "smtplib",
}


def doubtful(tree: ast.AST) -> list[str]:
    """What no module may do, as `what` or `what in function`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [n for n in names if n.split(".")[0] in MODULES_THAT_RUN]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if (
            called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            or called.startswith("torch.")
            and called.endswith(".load")
            or called.endswith("from_pretrained")
            and "Chat" not in called
        ):
            found.append(called)
        if called.endswith(("np.load", "numpy.load")) and any(k.arg == "allow_pickle" for k in node.keywords):
            found.append(called)
        found += [
            f"{k.arg}="
            for k in node.keywords
            if k.arg in ("trust_remote_code", "shell", "weights_only", "use_safetensors")
            and not (
                isinstance(k.value, ast.Constant) and k.value.value is (k.arg in ("weights_only", "use_safetensors"))
            )
        ]
    return found


ALLOWED = {
    "convert": ["torch.load"],
    "trust": ["kind.from_pretrained"],
    "masking": ["AutoTokenizer.from_pretrained"],
}  # the last reads the package's own tiny tokenizer


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_package_runs_nothing_and_calls_nobody(path):
    assert doubtful(ast.parse(path.read_text())) == ALLOWED.get(path.stem, [])


def test_the_look_at_the_package_can_find_something():
    bad = "import pickle, httpx\nfrom urllib.request import urlopen\neval('1')\ntorch.load('x')\nrun(shell=True)\nload(x, trust_remote_code=True)\ntorch.jit.load(x)\nAutoModel.from_pretrained(x)"
    assert sorted(doubtful(ast.parse(bad))) == sorted(
        [
            "pickle",
            "httpx",
            "urllib.request",
            "eval",
            "torch.load",
            "torch.jit.load",
            "AutoModel.from_pretrained",
            "shell=",
            "trust_remote_code=",
        ]
    )


# What leaves the program


def writes(tree: ast.AST) -> list[str]:
    """Calls that write to the terminal, and the names of its streams handed on."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    found = [ast.unparse(c.func) for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "input")]
    found += [
        ast.unparse(n)
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and ast.unparse(n) in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__")
    ]
    found += [
        ast.unparse(c.func)
        for c in calls
        if isinstance(c.func, ast.Attribute)
        and c.func.attr in ("print_exc", "print_help", "print_usage", "print_exception")
    ]
    found += [
        "tqdm.write"
        for c in calls
        if isinstance(c.func, ast.Attribute)
        and c.func.attr == "write"
        and ast.unparse(c.func.value).endswith(("bar", "tqdm"))
    ]
    return sorted(found)


MAY_WRITE = {
    "terminal": ["sys.stderr", "sys.stdout"],
    "trust": ["sys.stderr"] * 4,
    "chat_command": ["input"],
    "exits": ["sys.stderr", "sys.stdout"],
}  # two flush, and the question is asked


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_the_terminal_module_writes(path):
    assert writes(ast.parse(path.read_text())) == MAY_WRITE.get(path.stem, [])


def test_the_search_for_writes_can_find_something():
    assert (
        len(
            writes(
                ast.parse(
                    "print(1)\nsys.stderr.write('x')\nself.training_bar.write('x')\ntqdm.write('x')\ntraceback.print_exc()"
                )
            )
        )
        == 5
    )


# Pictures that take for ever


def saved(image, kind, **more) -> bytes:
    image.save(out := io.BytesIO(), kind, **more)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def exif(entries: int, size: int) -> bytes:
    """EXIF whose entries each claim nearly all of it."""
    table = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", entries)
        + b"".join(struct.pack("<HHII", k, 1, size - 100, 100) for k in range(entries))
    )
    return table + bytes(max(0, size - len(table)))


def in_segments(data: bytes) -> bytes:
    return b"".join(
        b"\xff\xe1" + (len(data[k : k + 65000]) + 8).to_bytes(2, "big") + b"Exif\0\0" + data[k : k + 65000]
        for k in range(0, len(data), 65000)
    )


def scans(times: int, side: int = 7000) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    jpeg = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * times + b"\xff\xd9"


JPEG, PNG, GIF = (saved(Image.new("L", (64, 64)), kind) for kind in ("JPEG", "PNG", "GIF"))
GIF_HEAD = 13 + (3 << ((GIF[10] & 7) + 1))
BMP = (
    b"BM"
    + struct.pack("<IHHI", 1078, 0, 0, 1078)
    + struct.pack("<IiiHHIIiiII", 40, 7000, 7000, 1, 8, 1, 0, 0, 0, 256, 0)
    + bytes(1024)
)
SLOW = {
    "a JPEG of 200,000 scans": lambda: scans(200_000),
    "a JPEG of 60 scans, large": lambda: scans(60),
    "a small JPEG of 200 scans": lambda: scans(200, 64),
    "scans behind a restart mark": lambda: scans(0)[:-2] + b"\xff\xd0" + scans(200)[-200 * 75 :],
    "a JPEG of fill bytes": lambda: b"\xff\xd8" + b"\xff" * 40_000_000 + JPEG[2:],
    "a JPEG of empty comments": lambda: JPEG[:2] + b"\xff\xfe\0\2" * 9_000_000 + JPEG[2:],
    "EXIF in 700 segments": lambda: JPEG[:2] + in_segments(exif(65535, 45_000_000)) + JPEG[2:],
    "EXIF behind a restart mark and junk": lambda: (
        JPEG[:2] + b"\xff\xd0\0x" + in_segments(exif(65535, 10_000_000)) + JPEG[2:]
    ),
    "a PNG of empty chunks": lambda: PNG[:33] + chunk(b"aaAa", b"") * 3_000_000 + PNG[33:],
    "a PNG of empty data": lambda: PNG[:33] + chunk(b"IDAT", b"") * 3_000_000 + PNG[33:],
    "a PNG of texts": lambda: (
        PNG[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * 10_000 + PNG[33:]
    ),
    "a GIF of comments": lambda: GIF[:GIF_HEAD] + b"\x21\xfe\1x\0" * 9_000_000 + GIF[GIF_HEAD:],
    "a BMP in runs of one": lambda: BMP + b"\1\1" * 20_000_000,
    "a BMP of line ends": lambda: BMP + b"\0\0" * 20_000_000,
}


@pytest.mark.parametrize("name", SLOW)
def test_no_picture_takes_longer_than_seconds(name):
    data, begin = SLOW[name](), time.thread_time()
    with pytest.raises(Refused), open_image(io.BytesIO(data)) as image:
        image.load()
    assert time.thread_time() - begin < 10


def test_a_picture_ends_with_its_seconds_whatever_it_does_with_them():
    profiles = PNG[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * 10_000 + PNG[33:]
    begin = time.thread_time()
    with pytest.raises(Refused, match="more than 0.5 s"):
        Image.open(Bounded(io.BytesIO(profiles), seconds=0.5))
    assert time.thread_time() - begin < 2


def test_real_pictures_are_far_from_the_bounds():
    photo = Image.effect_noise((3000, 2000), 50)
    for data in (
        saved(photo.convert("RGB"), "JPEG", progressive=True),
        saved(photo, "PNG"),
        saved(photo, "GIF"),
        saved(photo, "BMP"),
        saved(photo, "WEBP"),
        scans(9),
    ):
        bounded = Bounded(io.BytesIO(data))
        with Image.open(bounded) as image:
            image.load()
        assert bounded.left > 0.99 * image_files.MAX_READS
        with open_image(io.BytesIO(data)) as image:
            image.load()
    data = saved(photo, "JPEG", progressive=True)
    assert image_files.count_scans(data[data.index(b"\xff\xda") :]) == data.count(b"\xff\xda") == 6


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_a_picture_of_ten_thousand_warnings_is_one_note_at_most(kind, tmp_path):
    overlapping = exif(5300, 64_000)
    data = (
        JPEG[:2] + in_segments(overlapping) + JPEG[2:]
        if kind == "JPEG"
        else saved(Image.new("RGB", (64, 64)), kind, exif=overlapping)
    )
    (tmp_path / f"a.{kind.lower()}").write_bytes(data)
    code = "import sys; from llava_nb.base.image_files import open_image, oddities\nwith open_image(sys.argv[1]) as image: print(oddities(image, sys.argv[1])); image.load()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / f"a.{kind.lower()}")], capture_output=True, text=True, check=True
    )
    assert (
        done.stderr == "" and done.stdout.count("\n") == 1 and ("damaged" not in done.stdout or kind == "WEBP")
    )  # some Pillow reads a WEBP's tags late


FORGED = "\x1b[31mEVIL\x07\r\nllava_nb: all is well"


def clean(said: str) -> bool:
    return not set("\x1b\x07\r") & set(said) and not any(
        line.startswith("llava_nb: all is well") for line in said.splitlines()
    )


@pytest.mark.parametrize(
    "record",
    [
        {"id": FORGED},
        {"id": "a", "dataset": FORGED},
        {"id": "a", "image": FORGED + "/a.png"},
        {"id": "a", "conversations": [{"from": FORGED * 100_000, "value": "x"}]},
    ],
    ids=["id", "dataset", "image", "from"],
)
def test_a_record_cannot_write_to_the_terminal(world, tmp_path, record):
    (tmp_path / "r.json").write_text(json.dumps([{"conversations": []} | record]))
    file = config(world, "forged", data_path=str(tmp_path / "r.json"), output_dir=str(tmp_path / "out"))[0]
    for argv in (["doctor", str(file)], [str(file)]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "llava_nb" / "train.py"), *argv],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == 2 and clean(said) and len(said) < 20_000


def test_a_model_folder_cannot_write_to_the_terminal(start, capfd):
    header = json.dumps({FORGED: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (start / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for argv in ([str(start), "--ask", "What?"],):
        assert chat_command.main(argv) == 2
        out, err = capfd.readouterr()
        assert clean(out + err) and "a tensor is named" in err and str(start) in err


def test_no_secret_is_written_or_said(world, tmp_path):
    file = config(world, "secret", max_steps=1, save_strategy="no", output_dir=str(tmp_path / "out"))[0]
    done = run(file, 0, "--hub_token", "hf_TOPSECRETTOPSECRET")
    kept = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"TOPSECRET" in p.read_bytes()]
    assert not kept and "TOPSECRET" not in done.stdout + done.stderr
    done = run(file, 0, "--data_path", "http://user:TOPSECRET@127.0.0.1:9/r.json?sig=TOPSECRET")
    assert done.returncode == 2 and "TOPSECRET" not in done.stdout + done.stderr


# Versions, network


def test_libraries_with_known_holes_are_refused(monkeypatch, capsys):
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    assert {
        n: f for n, f in re.findall(r"([\w-]+)>=([\d.]+)", ini["DEFAULT"]["requirements"]) if n in trust.FLOORS
    } == trust.FLOORS
    trust.check_versions()
    for name, old in {
        "torch": "2.9.1+cu128",
        "transformers": "5.2.0",
        "safetensors": "0.8.0rc0",
        "pillow": "11.3.0",
    }.items():
        monkeypatch.setattr(trust, "version", lambda n, name=name, old=old: old if n == name else "99")
        for main, argv in (
            (train.main, ["--dry_run"]),
            (train.main, ["doctor", "c.json"]),
            (train.main, ["convert", "a.bin", "b"]),
            (chat_command.main, ["x", "--ask", "y"]),
        ):
            assert main(argv) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{name} {old}, at least" in said


def test_the_network_is_off_here_and_in_children(tmp_path):
    log = Path(os.environ["LLAVA_NB_NETWORK_LOG"])
    with pytest.raises(PermissionError, match="network is off"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(PermissionError, match="network is off"):
        socket.getaddrinfo("example.org", 443)
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        ],
        capture_output=True,
        text=True,
    )
    assert child.returncode and "network is off" in child.stderr and log.read_text().count("\n") == 3
    log.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()  # loopback is this machine


# Chat


def test_a_picture_is_a_path_never_an_address(start):
    talk = chat.Chat.from_pretrained(start, template="v1", device="cpu")
    for address in (
        "http://127.0.0.1:9/a.png",
        "https://example.org/a.png",
        "file:///etc/hostname",
        "data:image/png;base64,iVBORw0KGgo=",
        "ftp://x/y.png",
    ):
        with pytest.raises((OSError, ValueError)):
            talk.ask("What is this?", image=address)


def test_counts_context_and_template_of_a_question(start):
    talk = chat.Chat.from_pretrained(start, template="v1", device="cpu")
    with pytest.raises(ValueError, match="2 <image> and one image"):
        talk.ask("<image> <image>", image=Image.new("RGB", (60, 60)))
    with pytest.raises(ValueError, match="1 <image> and no image"):
        talk.ask("<image> what?")
    talk.prompter.context = 20
    with pytest.raises(ValueError, match="context ends at 20"):
        talk.ask("What is this?", image=Image.new("RGB", (60, 60)))
    with pytest.raises(ValueError, match="unknown"):
        chat.Chat.from_pretrained(start, template="v7", device="cpu")
    with pytest.raises(ValueError, match="names no template"):
        chat.Chat.from_pretrained(start, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_of_no_numbers_says_so(start, value, capsys):
    weights = load_file(start / "model.safetensors")
    name = next(n for n in weights if "lm_head" in n or "embed_tokens" in n)
    weights[name][:] = value
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    assert chat_command.main([str(start), "--ask", "What?", "--template", "v1", "--device", "cpu"]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_fault_of_code_is_not_told_as_a_folders():
    """What a library raises over a folder is one line; a name that does not exist is a traceback."""
    from llava_nb.base import trust

    with pytest.raises(ValueError, match="x: transformers cannot make a model of it"), trust.explained("x", "a model"):
        {}["key"]
    with pytest.raises(NameError), trust.explained("x", "a model"):
        nowhere  # noqa: F821
    with pytest.raises(AttributeError), trust.explained("x", "a model"):
        trust.nowhere
