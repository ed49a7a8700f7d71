"""Attention's GPU kernels on a CPU: their own interfaces run, with dense arithmetic in place of CUDA (`stand_ins`)."""

import inspect
import os
import subprocess
import sys
import venv

import pytest
import torch
from runs import ROOT, TIMEOUT, config, launch, make_world
from stand_ins import CALLS, VERSIONS, stood_in, torch_version
from test_model import SHAPE, assert_equal, loss_and_gradients, samples
from torch._dynamo.utils import counters

from llava_nb.fast.attention import BACKENDS, check_attention_backend, choose_attention, record_lengths, use_attention
from llava_nb.fast.memory import expand_segments
from llava_nb.fast.recompute import RECOMPUTE, set_recompute
from llava_nb.llava import freeze, tiny_llava
from llava_nb.masking import tiny_tokenizer
from llava_nb.objective import row_loss
from llava_nb.packing import collate_packed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run, in test_gpu")
GPU_KERNELS = [b for b in BACKENDS if b != "sdpa"]


@pytest.fixture(autouse=True)
def kernels():
    with stood_in():
        yield


@pytest.fixture(scope="module")
def model():
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    return model.train()


@pytest.fixture(scope="module")
def expected(model):
    use_attention(model, "sdpa", "cpu", torch.float32)
    set_recompute(model, "none")
    return loss_and_gradients(model, row_loss, collate_packed(samples(model, 4), SHAPE))


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 16)], ids=["as many keys", "shared keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("window", [None, 2, 7, 130], ids=lambda w: f"window {w}")
def test_a_kernel_agrees_with_sdpa_forward_and_backward(backend, heads, dtype, window):
    assert not check_attention_backend(
        backend, "cpu", dtype, heads, window, tolerance=1e-5 if dtype == torch.float32 else 2e-2
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 16)], ids=["as many keys", "shared keys"])
def test_varlen_runs_with_the_signature_of_each_version_of_torch(version, heads):
    with torch_version(version):
        assert [
            check_attention_backend("varlen", "cpu", torch.float32, heads, window, tolerance=1e-5)
            for window in (None, 7)
        ] == [
            "",
            "",
        ]


def test_the_signature_of_the_newest_version_is_the_installed_one():
    import torch.nn.attention.varlen as varlen

    names = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    if torch.__version__.startswith("2.13"):
        assert names(varlen.varlen_attn) == names(VERSIONS["2.13"])


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_a_kernel_that_forgets_the_window_is_caught(backend, monkeypatch):
    kernel = BACKENDS[backend]
    monkeypatch.setitem(BACKENDS, backend, lambda *given, sliding_window=None, **others: kernel(*given, **others))
    assert not check_attention_backend(backend, "cpu", torch.float32)
    assert check_attention_backend(backend, "cpu", torch.float32, window=4096).startswith("it differs from sdpa by")


def test_all_ranks_take_the_back_end_that_none_objects_to(monkeypatch):
    """Two ranks, one of which cannot run the first kernel: both take the second, and say whose objection it was."""
    objections = [{"varlen": "it differs from sdpa by 9.0%"}, {"flash": "the package flash-attn is not installed"}]

    def chosen(rank: int, wanted: str = "auto"):
        asked = iter(BACKENDS) if wanted == "auto" else iter([wanted])

        def gather(mine: str) -> list[str]:
            backend = next(asked)
            assert mine == objections[rank].get(backend, "")
            return [said.get(backend, "") for said in objections]

        monkeypatch.setattr(
            "llava_nb.fast.attention.check_attention_backend", lambda backend, *rest: objections[rank].get(backend, "")
        )
        return choose_attention(wanted, "cuda", torch.bfloat16, gather=gather)

    assert (
        chosen(0)
        == chosen(1)
        == (
            "flex",
            {
                "varlen": "rank 0: it differs from sdpa by 9.0%",
                "flash": "rank 1: the package flash-attn is not installed",
            },
        )
    )
    for rank in (0, 1):
        with pytest.raises(ValueError, match="'flash' cannot be used on cuda .*: rank 1: the package"):
            chosen(rank, "flash")


def test_the_allocator_is_set_before_cuda_starts_and_never_over_the_users_own(monkeypatch):
    for own in ({}, {"PYTORCH_ALLOC_CONF": ""}):
        assert expand_segments(own, cuda=True) and own == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for own in (
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:1"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
    ):
        assert not expand_segments(changed := dict(own), cuda=True) and changed == own
    assert not expand_segments(none := {}, cuda=False) and none == {}
    monkeypatch.setattr(torch.version, "cuda", None)  # a build without CUDA, or for ROCm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not expand_segments(none) and none == {}


def test_auto_says_what_it_refuses_and_why(monkeypatch):
    monkeypatch.setattr(
        "llava_nb.fast.attention.check_attention_backend",
        lambda backend, device, dtype, heads, window: (
            "it is warm" if backend == "varlen" else "it is far" if backend == "flash" and window else ""
        ),
    )
    assert choose_attention("auto", "cuda", torch.bfloat16, windows=(None, 512)) == (
        "flex",
        {"varlen": "it is warm", "flash": "it is far"},
    )
    assert choose_attention("auto", "cuda", torch.bfloat16) == ("flash", {"varlen": "it is warm"})
    with pytest.raises(ValueError, match="'flash' cannot be used on cuda .*: it is far; 'auto' takes"):
        choose_attention("flash", "cuda", torch.bfloat16, windows=(None, 512))
    monkeypatch.setattr("llava_nb.fast.attention.check_attention_backend", lambda backend, *rest: "no")
    assert choose_attention("auto", "cuda", torch.bfloat16) == (
        "sdpa",
        dict.fromkeys(("varlen", "flash", "flex"), "no"),
    )


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("how", RECOMPUTE)
def test_a_row_has_the_same_loss_and_gradients_with_every_kernel_and_recomputation(model, expected, backend, how):
    assert use_attention(model, backend, "cpu", torch.float32) == (backend, {})
    set_recompute(model, how)
    CALLS.clear()
    assert_equal(loss_and_gradients(model, row_loss, collate_packed(samples(model, 4), SHAPE)), expected)
    if backend != "flex":
        assert dict(CALLS) == {
            "forward": 4 if how == "full" else 2,
            "backward": 2,
        }  # two layers; "cheap" keeps what attention gave


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_a_record_does_not_see_the_others(model, backend):
    use_attention(model, backend, "cpu", torch.float32)
    set_recompute(model, "none")
    row = collate_packed(samples(model, 4), SHAPE)
    lengths = record_lengths(row["position_ids"])
    other = row["input_ids"].clone()
    own = torch.arange(other.shape[1]) >= sum(lengths[:3])
    other[0, own & (other[0] != model.config.image_token_id)] = 7
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=row["position_ids"], pixel_values=row["pixel_values"], use_cache=False)
            .logits[0]
            .split(lengths)
            for ids in (row["input_ids"], other)
        )
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True] * 3 + [False]


def test_rows_of_other_lengths_and_records_do_not_compile_flex_again(model):
    use_attention(model, "flex", "cpu", torch.float32)
    set_recompute(model, "none")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for seed in range(8):
        pool = [
            samples(model, 6)[k]
            for k in torch.randperm(6, generator=torch.Generator().manual_seed(seed))[: 2 + seed % 4]
        ]
        loss_and_gradients(model, row_loss, collate_packed(pool, SHAPE))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3] <= 4, graphs  # two functions; rows of one block are a second shape to it


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_two_ranks_train_through_zero_3_with_a_gpu_kernel(backend, tmp_path, monkeypatch):
    world, settings = make_world(tmp_path), {"zero": 3, "max_steps": 6, "recompute": "cheap"}
    expected = launch(config(world, "sdpa", attention="sdpa", **settings)[0], 2)
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import runpy, sys\nrunpy.run_path({str(ROOT / 'tests' / 'no_network' / 'sitecustomize.py')!r})\n"
        "if any(a.endswith('train.py') for a in sys.orig_argv):\n"
        f"    sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "    import stand_ins; kept = stand_ins.stood_in(); kept.__enter__()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ["PYTHONPATH"]]))
    assert launch(config(world, backend, attention=backend, **settings)[0], 2) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_ligers_fused_loss_agrees_in_tritons_interpreter(tmp_path):
    "In an environment of its own: the packages are large, and Triton here would change what transformers imports."
    venv.create(tmp_path / "env")
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "base.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # which takes the network away
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            packages,
            "-c",
            ROOT / "constraints.txt",
            "liger-kernel",
            "triton",
        ],
        env=env,
        check=True,
        timeout=TIMEOUT,
    )
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", ROOT / "tests" / "liger_agrees.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stdout.endswith("agrees\n"), done.stderr[-3000:]
