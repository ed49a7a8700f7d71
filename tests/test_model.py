"""Packing, objective, model and optimizer: what must not change when the layout, the cut or the tower does."""

import contextlib
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_nb.checkpoint import save_llava, save_projector
from llava_nb.fast.attention import BACKENDS, check_attention_backend, choose_attention, record_lengths, use_attention
from llava_nb.fast.cross_entropy import (
    LOSS_KERNELS,
    check_loss_kernel,
    linear_cross_entropy,
    text_logits,
    use_loss_kernel,
    weighted_cross_entropy,
)
from llava_nb.fast.recompute import RECOMPUTE, set_recompute
from llava_nb.llava import (
    add_image_token,
    build_llava,
    freeze,
    load_llava,
    load_projector,
    load_tower,
    parts,
    projector_state,
    tiny_llava,
    unused_layers,
)
from llava_nb.masking import IGNORE_INDEX, tiny_tokenizer
from llava_nb.objective import OBJECTIVES, padded_loss, row_loss, token_weights
from llava_nb.optim import parameter_groups
from llava_nb.packing import collate_packed, collate_padded

SHAPE = (3, 56, 56)


def siglip_qwen(tokenizer):
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    return build_llava(
        AutoModelForCausalLM.from_config(text), AutoModel.from_config(vision), tokenizer, select_strategy="full"
    )


MODELS = {"clip + llama": tiny_llava, "siglip + tied qwen2": siglip_qwen}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    model = MODELS[request.param](tiny_tokenizer())
    freeze(model, 2)
    return model


def sample(model, image: bool, words: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    features = model.config.image_seq_length
    ids = torch.cat(
        [torch.full((features * image,), model.config.image_token_id), torch.randint(5, 2000, (words,), generator=g)]
    )
    labels = torch.where(torch.arange(len(ids)) >= len(ids) - max(1, words // 3), ids, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(SHAPE, generator=g) if image else None}


def samples(model, n: int = 6) -> list[dict]:
    return [sample(model, k % 3 != 1, 5 + 7 * k, k) for k in range(n)]


def loss_and_gradients(model, loss_of, *rows):
    model.zero_grad()
    total = sum(
        loss_of(model, row, model.config.llava_nb["text_vocab_size"], model.config.image_token_id) for row in rows
    )
    total.backward()
    return float(total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(a, b, tolerance=1e-6):
    assert a[0] == pytest.approx(b[0], abs=tolerance)
    for name, g in a[1].items():
        assert torch.allclose(g, b[1][name], atol=tolerance), name


def test_packed_equals_padded(model):
    pool = samples(model)
    packed = loss_and_gradients(model, row_loss, collate_packed(pool, SHAPE))
    padded = loss_and_gradients(model, padded_loss, collate_padded(pool, SHAPE))
    assert_equal(packed, padded)


DEVICE, DTYPE = "cpu", torch.float32  # a GPU has test_gpu: these must not start CUDA in every process
HERE = [b for b in BACKENDS if not check_attention_backend(b, DEVICE, DTYPE, (4, 2, 16))]  # what this machine has


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("changed", range(4))
def test_a_record_does_not_see_the_others(model, changed, backend):
    assert use_attention(model, backend, DEVICE, DTYPE) == (backend, {})
    pool = samples(model, 4)
    row = collate_packed(pool, SHAPE)
    lengths = record_lengths(row["position_ids"])
    other = dict(row, input_ids=row["input_ids"].clone(), pixel_values=row["pixel_values"].clone())
    start = sum(lengths[:changed])
    own = slice(start, start + lengths[changed])
    words = other["input_ids"][0, own] != model.config.image_token_id
    other["input_ids"][0, own][words] = 7
    if pool[changed]["pixel_values"] is not None:
        other["pixel_values"][sum(s["pixel_values"] is not None for s in pool[:changed])] += 1

    on = model.to(DEVICE, DTYPE)

    def logits(r):
        with torch.no_grad():
            return on(
                **{k: r[k].to(DEVICE) for k in ("input_ids", "position_ids")},
                pixel_values=r["pixel_values"].to(DEVICE, DTYPE),
                use_cache=False,
            ).logits[0]

    before, after = logits(row).split(lengths), logits(other).split(lengths)
    for k, (a, b) in enumerate(zip(before, after)):
        assert torch.equal(a, b) == (k != changed)
    model.to("cpu", torch.float32)


def test_a_kernel_that_does_not_prove_itself_is_not_taken(monkeypatch):
    assert "sdpa" in HERE and choose_attention("auto", "cpu", torch.float32) == ("sdpa", {})
    with pytest.raises(ValueError, match="attention 'warp' is unknown; use auto, varlen"):
        choose_attention("warp", "cpu", torch.float32)
    monkeypatch.setitem(
        BACKENDS,
        "varlen",
        lambda module, q, k, v, position_ids, **kw: BACKENDS["sdpa"](
            module, q, k, v, torch.arange(q.shape[2])[None], **kw
        ),
    )
    with pytest.raises(ValueError, match=r"cannot be used on cpu .*differs from sdpa by"):
        choose_attention("varlen", "cpu", torch.float32)
    monkeypatch.setitem(BACKENDS, "varlen", lambda *a, **kw: 1 / 0)
    with pytest.raises(ValueError, match=r"does not run here \(ZeroDivisionError"):
        choose_attention("varlen", "cpu", torch.float32)
    monkeypatch.setitem(BACKENDS, "varlen", BACKENDS["sdpa"])
    assert choose_attention("varlen", "cpu", torch.float32) == ("varlen", {})


def test_a_loss_kernel_that_does_not_prove_itself_is_not_taken(monkeypatch):
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    with pytest.raises(ValueError, match="loss_kernel 'warp' is unknown; use chunked, liger"):
        use_loss_kernel(model, "warp", "cpu", torch.float32)
    with pytest.raises(
        ValueError, match="'liger' cannot be used on cpu in torch.float32: .*; 'chunked' runs everywhere"
    ):
        use_loss_kernel(model, "liger", "cpu", torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    chunked = LOSS_KERNELS["chunked"]
    monkeypatch.setitem(
        LOSS_KERNELS,
        "liger",
        lambda hidden, rows, bias, targets, weights, *rest: chunked(
            hidden, rows, bias, targets, torch.ones_like(weights), *rest
        ),
    )
    assert check_loss_kernel("liger", "cpu", torch.float32).startswith("it differs from chunked by")
    monkeypatch.setitem(LOSS_KERNELS, "liger", lambda *given: 1 / 0)
    assert "does not run here (ZeroDivisionError" in check_loss_kernel("liger", "cpu", torch.float32)

    def counted(*given):
        calls.append(1)
        return chunked(*given)

    monkeypatch.setitem(LOSS_KERNELS, "liger", counted)
    expected, calls = loss_and_gradients(model, row_loss, collate_packed(samples(model), SHAPE)), []
    use_loss_kernel(model, "liger", "cpu", torch.float32)
    calls.clear()
    assert_equal(loss_and_gradients(model, row_loss, collate_packed(samples(model), SHAPE)), expected)
    assert calls == [1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_cut_of_a_global_batch_gives_the_same_gradient(objective):
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    pool = samples(model, 8)
    counts = [int((s["labels"] != IGNORE_INDEX).sum()) for s in pool]
    for s, w in zip(pool, itertools.chain(*token_weights(objective, [counts[:4], counts[4:]]))):
        s["weight"] = w
    whole = loss_and_gradients(model, row_loss, collate_packed(pool, SHAPE))
    cuts = {
        "1x4": [pool[i::4] for i in range(4)],
        "2x2": [pool[i : i + 2] for i in (0, 2, 4, 6)],
        "uneven": [pool[:1], pool[1:6], pool[6:]],
        "8": [[s] for s in pool],
    }
    for cut in cuts.values():
        assert_equal(loss_and_gradients(model, row_loss, *(collate_packed(c, SHAPE) for c in cut)), whole)
    assert_equal(loss_and_gradients(model, padded_loss, *(collate_padded(c, SHAPE) for c in cuts["2x2"])), whole)


def test_reference_weights_are_the_mean_of_micro_batch_means():
    counts = [[3, 30], [5], []]
    weights = token_weights("reference", counts)
    assert weights == [[1 / 66, 1 / 66], [1 / 10], []]


def test_the_image_row_stays_out_of_the_softmax(model):
    row = collate_packed(samples(model, 3), SHAPE)
    text_rows = model.config.llava_nb["text_vocab_size"]
    before, _ = loss_and_gradients(model, row_loss, row)
    head = model.get_output_embeddings().weight
    saved = head.detach()[text_rows:].clone()
    with torch.no_grad():
        head[text_rows:] = 9.0
    after, gradients = loss_and_gradients(model, row_loss, row)
    with torch.no_grad():
        head[text_rows:] = saved
    if not model.config.tie_word_embeddings:
        assert not gradients["lm_head.weight"][text_rows:].any()
    assert before == after


def test_a_row_without_pictures_gives_the_projector_an_exact_zero_gradient(model):
    loss_and_gradients(model, row_loss, collate_packed([sample(model, False, 9, 1)], SHAPE))
    assert all(p.grad is not None and not p.grad.any() for p in model.model.multi_modal_projector.parameters())


def test_stage_1_trains_on_a_text_row_without_an_error():
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 1)
    loss = row_loss(model, collate_packed([sample(model, False, 9, 1)], SHAPE), 2048, model.config.image_token_id)
    loss.backward()


def test_frozen_tower_stays_in_eval_mode():
    model = tiny_llava(tiny_tokenizer())
    for stage in (1, 2):
        freeze(model, stage)
        model.train()
        assert not any(m.training for m in model.model.vision_tower.modules())
        assert not any(p.requires_grad for p in parts(model)["vision tower"])
        assert all(p.requires_grad for p in parts(model)["language model"]) == (stage == 2)


def test_linear_projector_is_one_matrix_and_loads_in_plain_transformers(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_llava(tokenizer, projector_type="linear")
    freeze(model, 2)
    inside = model.model.multi_modal_projector
    features = torch.randn(2, 16, 48)
    assert torch.allclose(inside(features), inside.linear_1(features))
    assert not inside.linear_2.weight.requires_grad and inside.linear_1.weight.requires_grad
    model.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.allclose(plain.model.multi_modal_projector(features), inside(features))


def test_projector_round_trip_and_refusal_with_both_shapes(tmp_path):
    a, b = tiny_llava(tiny_tokenizer(), seed=1), tiny_llava(tiny_tokenizer(), seed=2)
    save_projector(a, tmp_path)
    load_projector(b, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(projector_state(a).values(), projector_state(b).values()))
    save_file({n: torch.zeros(3, 5) for n in projector_state(a)}, tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match=r"\[3, 5\].*\[64, 48\]"):
        load_projector(b, tmp_path)
    torch.save({"x": 1}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_projector(b, tmp_path / "mm_projector.bin")
    with pytest.raises(FileNotFoundError):
        load_projector(b, tmp_path / "nowhere")


def test_saved_folder_round_trip(model, tmp_path):
    from transformers import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    add_image_token(tokenizer)
    model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "square"}
    save_llava(
        model,
        tmp_path,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        max_shard_size="400KB",
    )
    again = load_llava(tmp_path)
    row = collate_packed(samples(model, 3), SHAPE)
    freeze(again, 2)
    assert loss_and_gradients(again, row_loss, row)[0] == loss_and_gradients(model, row_loss, row)[0]
    assert again.config.llava_nb["template"] == "v1"
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("projector_lr, expected", [(None, 2), (1e-4, 4), (0.0, 4)])
def test_every_trainable_parameter_is_in_exactly_one_group(projector_lr, expected):
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    groups = parameter_groups(model, 2e-5, 0.1, projector_lr)
    assert len(groups) == expected
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): n for n, p in model.named_parameters()}
    for g in groups:
        for p in g["params"]:
            assert (g["weight_decay"] == 0) == ("norm" in names[id(p)] or "bias" in names[id(p)])
            assert g["lr"] == (projector_lr if projector_lr is not None and "projector" in names[id(p)] else 2e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_equals_the_logits(bias):
    """Loss and every gradient, over uneven chunks, with `<image>` inside the vocabulary and after it."""
    torch.manual_seed(0)
    for image_token_id in (17, 36):
        hidden, weight = torch.randn(53, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
        b = torch.randn(40, requires_grad=True) if bias else None
        targets, weights = torch.randint(0, 16, (53,)), torch.rand(53)
        with_gradient = [t for t in (hidden, weight, b) if t is not None]
        whole = weighted_cross_entropy(
            text_logits(torch.nn.functional.linear(hidden, weight, b), 37, image_token_id), targets, weights
        )
        chunked = linear_cross_entropy(hidden, weight, b, targets, weights, 37, image_token_id, chunk=10)
        assert torch.allclose(whole, chunked)
        for a, c in zip(torch.autograd.grad(2 * whole, with_gradient), torch.autograd.grad(2 * chunked, with_gradient)):
            assert torch.allclose(a, c, atol=1e-5)


def test_linear_cross_entropy_computes_no_gradient_that_nobody_asked_for():
    """A frozen head gets no gradient; evaluation computes the loss alone; an empty row is an exact zero."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8)
    linear_cross_entropy(hidden, weight, None, torch.arange(5), torch.rand(5), 12, 12).backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    weight.requires_grad_()
    with torch.no_grad(), torch.profiler.profile() as profile:
        assert not linear_cross_entropy(hidden, weight, None, torch.arange(5), torch.rand(5), 12, 12).requires_grad
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::mm") == 1  # the logits, and neither gradient
    loss = linear_cross_entropy(hidden[:0], weight, None, torch.arange(0), torch.rand(0), 12, 12)
    loss.backward()
    assert loss == 0 and weight.grad.abs().sum() == 0


def test_linear_cross_entropy_in_bf16_sums_in_float32():
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(4096, 32, dtype=torch.bfloat16),
        torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True),
    )
    targets, weights = torch.randint(0, 64, (4096,)), torch.full((4096,), 1 / 4096)
    exact = weight.detach().float().requires_grad_()
    weighted_cross_entropy(hidden.float() @ exact.T, targets, weights).backward()
    linear_cross_entropy(hidden, weight, None, targets, weights, 64, 64, chunk=64).backward()
    assert (weight.grad.float() - exact.grad).abs().max() < 0.01 * exact.grad.abs().max()


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_float16_gradients_do_not_underflow_before_the_loss_scale(autocast, alike):
    """Gradients of a step of 15,000 tokens under a loss scale of 65,536, compared with float32."""
    torch.manual_seed(0)
    hidden, head, bias, targets = (
        torch.randn(700, 64),
        torch.randn(4000, 64) / 8,
        torch.randn(4000),
        torch.randint(0, 4000, (700,)),
    )
    weights = torch.full((700,), 1 / 15_000) if alike else torch.rand(700) / 15_000

    def gradients(dtype, cast):
        given = [t.to(dtype).requires_grad_() for t in (hidden, head, bias)]
        with torch.autocast("cpu", torch.float16, enabled=cast):
            loss = linear_cross_entropy(*given, targets, weights, 4000, 4000, chunk=256)
        return float(loss.detach()), [g.float() / 65_536 for g in torch.autograd.grad(65_536 * loss, given)]

    (expected, exact), (loss, found) = (
        gradients(torch.float32, False),
        gradients(torch.float32 if autocast else torch.float16, autocast),
    )
    assert loss == pytest.approx(expected, rel=1e-3)
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(exact, found)) < 2e-3


def test_float16_sums_of_many_alike_tokens_do_not_overflow():
    """The same target 4,096 times with a large state: float16 overflows before the weights, not with them."""
    hidden, head = (
        torch.full((4096, 8), 40.0, dtype=torch.float16),
        torch.zeros(16, 8, dtype=torch.float16, requires_grad=True),
    )
    linear_cross_entropy(
        hidden, head, None, torch.zeros(4096, dtype=torch.long), torch.full((4096,), 1 / 4096), 16, 16
    ).backward()
    assert head.grad.isfinite().all() and head.grad[0, 0] == pytest.approx(-40 * 15 / 16, rel=1e-3)


@contextlib.contextmanager
def graphs_of_tower(model):
    """Gradient functions of all outputs of the tower's modules, and the tensors saved for its backward pass."""
    found, saved = [], []
    tower = model.model.vision_tower

    def note(module, args, out):
        tensors = [
            t
            for t in torch.utils._pytree.tree_leaves((out, dict(out) if hasattr(out, "keys") else ()))
            if isinstance(t, torch.Tensor)
        ]
        found.extend(t.grad_fn or t.requires_grad for t in tensors)

    inside = []
    handles = [m.register_forward_hook(note) for m in tower.modules()]
    handles += [
        tower.register_forward_pre_hook(lambda *a: inside.append(1) and None),
        tower.register_forward_hook(lambda *a: inside.clear()),
    ]

    def pack(t):
        if inside:
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found, saved
    for h in handles:
        h.remove()


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_frozen_tower_has_no_graph_whatever_is_recomputed(model, stage, how):
    freeze(model, stage)
    model.train()
    set_recompute(model, how)
    with graphs_of_tower(model) as (found, saved):
        row_loss(model, collate_packed(samples(model), SHAPE), 2048, model.config.image_token_id).backward()
    assert len(found) > 10 and not any(found) and not saved
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    set_recompute(model, "none")
    freeze(model, 2)


def calls_of(module) -> list:
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(1))
    return seen


def test_a_picture_that_several_records_show_goes_through_the_tower_once_and_changes_nothing():
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    found = samples(model)
    found[3]["pixel_values"] = found[0]["pixel_values"]
    shared, apart = (
        collate_packed(found, SHAPE),
        collate_packed(
            [s | {"pixel_values": None if s["pixel_values"] is None else s["pixel_values"].clone()} for s in found],
            SHAPE,
        ),
    )
    assert len(shared["pixel_values"]) == len(apart["pixel_values"]) - 1 and shared["picture_of"].tolist() == [
        0,
        1,
        0,
        2,
    ]
    assert_equal(loss_and_gradients(model, row_loss, shared), loss_and_gradients(model, row_loss, apart))


def test_a_tower_that_no_rank_needs_is_not_run_and_the_projector_gets_its_zero():
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    row, seen = (
        collate_packed([sample(model, False, 9, 0), sample(model, False, 20, 1)], SHAPE),
        calls_of(
            model.model.vision_tower.encoder.layers[0]
            if hasattr(model.model.vision_tower, "encoder")
            else model.model.vision_tower.vision_model.encoder.layers[0]
        ),
    )
    run, skipped = (
        loss_and_gradients(model, row_loss, row | {"tower": True}),
        loss_and_gradients(model, row_loss, row | {"tower": False}),
    )
    assert len(seen) == 1
    assert_equal(run, skipped, 0)
    projector = [g for n, g in skipped[1].items() if "projector" in n]
    assert len(projector) == 4 and not any(g.any() for g in projector)
    row_loss(model, collate_packed(samples(model), SHAPE), 2048, model.config.image_token_id)
    assert len(seen) == 2  # the next row has its tower again


def test_layers_behind_the_used_one_are_not_computed_but_kept(model, tmp_path):
    unused = unused_layers(model)
    assert len(unused) == 1  # features of the last layer but one
    pixels = torch.randn(2, *SHAPE)
    ours = model.get_image_features(pixels).pooler_output
    for p in unused[0].parameters():
        p.data.fill_(float("nan"))  # read by nobody
    assert all(torch.equal(a, b) for a, b in zip(ours, model.get_image_features(pixels).pooler_output))
    for p in unused[0].parameters():
        p.data.normal_()
    save_llava(
        model,
        tmp_path,
        tiny_tokenizer(),
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    )
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = plain.model.get_image_features(pixels).pooler_output
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))
    kept, saved = unused[0].state_dict(), plain.state_dict()
    assert all(
        any(k.endswith(n) and torch.equal(v, w) for k, w in saved.items() if "vision_tower" in k)
        for n, v in kept.items()
    )


def test_weights_that_are_not_there_are_refused_and_not_made_up(tmp_path):
    tokenizer = tiny_tokenizer()
    save_llava(
        tiny_llava(tokenizer),
        tmp_path,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    )
    (file,) = tmp_path.glob("model*.safetensors")
    kept = load_file(file)
    for load, part in (
        (load_llava, "language_model.model.layers.1.mlp.up_proj.weight"),
        (load_tower, "vision_tower.vision_model.pre_layrnorm.bias"),
    ):
        save_file({k: v for k, v in kept.items() if k != part}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 weights of \w+ are not in it, \S+ the first; it holds another"):
            load(tmp_path)
    save_file(kept, file, metadata={"format": "pt"})
    load_llava(tmp_path), load_tower(tmp_path)
