"""Families of language models and towers: those that work are exact, others are refused before any weights."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_model import SHAPE, assert_equal, loss_and_gradients, sample
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    PaliGemmaConfig,
    Qwen2VLConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    VipLlavaConfig,
)

import llava_nb.fast.language_models as language_models
from llava_nb.chat import Reader
from llava_nb.checkpoint import save_llava
from llava_nb.fast.language_models import check_language_model
from llava_nb.llava import (
    build_llava,
    check_llava,
    freeze,
    load_language_model,
    load_llava,
    load_projector,
    load_tower,
    meta_llava,
    read_projector,
    tiny_llava,
)
from llava_nb.masking import tiny_tokenizer
from llava_nb.objective import padded_loss, row_loss
from llava_nb.packing import collate_packed, collate_padded
from llava_nb.vision import check_pixels, feature_count, strategy_for

TINY = dict(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    max_position_embeddings=512,
)
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WORK = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"sliding_window": 6},
    "ministral3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": WINDOWED,
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "olmo3": WINDOWED,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "exaone4": WINDOWED,
    "granite": {},
    "cohere2": {"logit_scale": 1.0, **WINDOWED},
}
REFUSED = {
    "gemma2": r"final_logit_softcapping 30.0 and attn_logit_softcapping 50.0",
    "cohere": "logit_scale 0.0625",
    "cohere2": "logit_scale 0.0625",
    "gpt_oss": "attention sinks",
    "gpt2": "no `embed_tokens`",
    "mpt": "no `embed_tokens`",
    "gpt_neo": "no `embed_tokens`",
    "opt": "no `embed_tokens`",
    "bloom": "no `embed_tokens`",
    "phi": "bias in its head",
    "persimmon": "does not pass position_ids",
    "jamba": "see each other",
    "bert": "no decoder with an `lm_head`",
    "t5": "no causal language model",
    "gemma3n_text": "softcapping",
}


def language_model(family: str):
    config = AutoConfig.for_model(family, **TINY | WORK[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def tower():
    torch.manual_seed(0)
    return AutoModel.from_config(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        )
    )


SINCE = {"ministral3": "5.20"}  # before, this decoder did not hand its positions on, and was refused


@pytest.fixture(
    params=[family for family in WORK if Version(transformers.__version__) >= Version(SINCE.get(family, "5"))],
    scope="module",
)
def pair(request):
    "A language model by its own class, and in a LLaVA."
    own = language_model(request.param)
    model = build_llava(language_model(request.param), tower(), tiny_tokenizer())
    return own, model


def test_a_packed_row_says_what_the_model_says_of_each_record_alone(pair):
    own, model = pair
    lengths = (11, 3, 20, 1, 7)  # beyond a window of 6 and within
    ids = torch.randint(5, 2000, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([own(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, 1)])
        row = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :, :2048]
    assert torch.allclose(row, alone, atol=1e-5), (row - alone).abs().max()


def test_packed_equals_padded_forward_and_backward(pair):
    model = pair[1]
    freeze(model, 2)
    pool = [sample(model, k % 2 == 0, 5 + 6 * k, k) for k in range(4)]
    assert_equal(
        loss_and_gradients(model, row_loss, collate_packed(pool, SHAPE)),
        loss_and_gradients(model, padded_loss, collate_padded(pool, SHAPE)),
        2e-6,
    )


def test_chat_reads_the_same_with_its_cache_and_without(pair):
    "Token by token, several at once, and after a part was taken back: behind a window too."
    own, model = pair
    ids = torch.randint(5, 2000, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    reader = Reader(model)
    for part in (ids[:9], ids[:10], ids[:11], ids[:30], ids[:31], ids[:20] + ids[30:], ids[:20] + ids[30:] + [7]):
        said = reader(part, [], [])
        with torch.no_grad():
            alone = own(input_ids=torch.tensor([part]), use_cache=False).logits[0, -1]
        assert torch.allclose(said[:2048], alone, atol=1e-5)
    assert reader.computed < sum(map(len, (ids[:9], ids[:10], ids[:11], ids[:30])))  # the cache was used


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_the_frame_would_change_is_refused_by_name(family):
    with pytest.raises(ValueError, match=REFUSED[family]) as e:
        check_language_model(AutoConfig.for_model(family), "folder")
    assert (
        str(e.value).startswith(f"folder: a '{family}' model ") and len(str(e.value)) < 600 and "llama" in str(e.value)
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "granite", "logits_scaling": 8.0},
        {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 16},
        {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
        {"model_type": "granitemoe", "logits_scaling": 2.0},
        {"model_type": "falcon_h1", "lm_head_multiplier": 0.5},
    ],
    ids=lambda c: c["model_type"],
)
def test_a_setting_that_the_frame_loses_is_named(config):
    with pytest.raises(
        ValueError,
        match="logits_scaling 8.0|logits_scaling 2.0|sliding_window may be why|layer_types conv may be why|"
        "final_logit_softcapping 30.0|lm_head_multiplier 0.5",
    ):
        check_language_model(AutoConfig.for_model(**config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_was_saved_in_half_precision_is_compared_in_float32(dtype):
    """Rounding to eight bits looks like another model; the demonstration's own language model is such a one."""
    check_language_model(AutoConfig.for_model("llama", dtype=dtype))


def test_a_kernel_that_forgets_windows_makes_windowed_models_refused(monkeypatch):
    import llava_nb.fast.attention as attention

    sdpa = attention.BACKENDS["sdpa"]
    monkeypatch.setitem(
        attention.BACKENDS, "sdpa", lambda *given, sliding_window=None, **others: sdpa(*given, **others)
    )
    language_models._FOUND.clear()
    try:
        with pytest.raises(ValueError, match="differ from its own by .* sliding_window may be why"):
            check_language_model(AutoConfig.for_model("mistral"))
        check_language_model(AutoConfig.for_model("llama"))
    finally:
        language_models._FOUND.clear()


@pytest.mark.parametrize(
    "config",
    [
        LlavaNextConfig(),
        VipLlavaConfig(),
        Qwen2VLConfig(),
        Gemma3Config(),
        PaliGemmaConfig(),
        AutoConfig.for_model("llava_onevision"),
        AutoConfig.for_model("mllama"),
        AutoConfig.for_model("idefics3", text_config={"model_type": "llama", "pad_token_id": 0}),
        AutoConfig.for_model("llama"),
        AutoConfig.for_model("clip"),
    ],
    ids=lambda c: c.model_type,
)
def test_any_other_model_is_refused_by_name_wherever_it_is_given(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    if config.model_type not in ("mllama",):
        config.save_pretrained(tmp_path)
    kind = config.model_type
    for load in (load_llava, lambda f: meta_llava(config), lambda f: check_llava(config, f)):
        with pytest.raises(ValueError, match=f"a '{kind}' model is not trained here, only LLaVA-1.5's"):
            load(tmp_path)
    if kind != "llama":
        with pytest.raises(ValueError, match=f"a '{kind}' model is more than a language model"):
            load_language_model(tmp_path)
    if kind != "clip":
        with pytest.raises(
            ValueError, match=f"a '{kind}' model is more than a vision tower|'{kind}' is no vision tower"
        ):
            load_tower(tmp_path)


def test_weights_that_a_model_has_no_place_for_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    save_llava(
        tiny_llava(tokenizer),
        tmp_path,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    )
    (file,) = tmp_path.glob("model*.safetensors")
    kept = load_file(file)
    save_file(
        kept | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        file,
        metadata={"format": "pt"},
    )
    load_llava(tmp_path)
    load_tower(tmp_path)
    read_projector(tmp_path)
    save_file(kept | {"image_newline": torch.ones(64)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 1 weights that Llava\w+ has no place for, image_newline the first"):
        load_llava(tmp_path)
    with pytest.raises(ValueError, match="1 tensors that LLaVA-1.5 has no place for, image_newline the first"):
        read_projector(tmp_path)
    save_file(
        kept | {"vision_tower.vision_model.encoder.layers.0.gate": torch.ones(64)}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="no place for, .*layers.0.gate the first"):
        load_tower(tmp_path)
    save_file(
        {k.removeprefix("multi_modal_projector."): v for k, v in kept.items() if "projector" in k}
        | {"sampler.query": torch.ones(2)},
        tmp_path / "projector.safetensors",
    )
    with pytest.raises(ValueError, match="sampler.query the first"):
        load_projector(tiny_llava(tokenizer), tmp_path)


def test_a_language_model_with_more_than_its_class_has_is_refused(tmp_path):
    language_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no place for, model.layers.0.self_attn.q_proj.bias the first"
    ):
        load_language_model(tmp_path)


SMALL = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
)
TOWERS = {
    "clip_vision_model": ("default", 16),
    "siglip_vision_model": ("full", 16),
    "dinov2": ("default", 16),
    "vit": ("default", 16),
    "ijepa": ("full", 16),
    "aimv2_vision_model": ("full", 16),
    "mlcd_vision_model": ("default", 16),
    "internvl_vision": ("default", 16),
    "beit": ("default", 16),
    "dinov3_vit": ("default", 16),
}


@pytest.mark.parametrize("family", TOWERS)
def test_the_strategy_follows_from_the_tower(family):
    config = AutoConfig.for_model(family, **SMALL)
    strategy, count = TOWERS[family]
    assert (strategy_for(config), feature_count(config)) == (strategy, count)
    if strategy == "default":
        assert feature_count(config, select_strategy="full") == count + 1  # the reference's cls_patch
    else:
        with pytest.raises(ValueError, match=f"'default' drops the first feature, and '{family}' has no class token"):
            strategy_for(config, -2, "default")
    with pytest.raises(ValueError, match=f"vision_feature_layer 9: '{family}' has hidden states -4 to 3"):
        feature_count(config, 9)
    assert feature_count(config, -4) == feature_count(config, 0) == feature_count(config, -1) == count


@pytest.mark.parametrize(
    "family,words",
    {
        "dinov2_with_registers": "5 more than the square of its patches",
        "deit": "2 more",
        "siglip2_vision_model": "NaFlex",
        "pixtral": "images of any size",
        "swin": "fewer|width|wide",
        "hiera": "not one row of features",
        "convnextv2": "not one row of features",
        "resnet": "no vision tower",
        "llama": "no vision tower",
        "vit_mae": "fewer",
    }.items(),
    ids=lambda v: v.split()[0],
)
def test_a_tower_that_llava_cannot_read_is_refused_by_name(family, words):
    with pytest.raises(ValueError, match=words) as e:
        strategy_for(AutoConfig.for_model(family))
    assert f"'{family}'" in str(e.value)


def test_a_tower_of_rectangles_is_refused():
    with pytest.raises(ValueError, match=r"\[56, 112\] is no square"):
        strategy_for(AutoConfig.for_model("internvl_vision", **SMALL | {"image_size": [56, 112]}))


def test_a_processor_that_is_not_the_towers_is_refused():
    config = CLIPVisionConfig(**SMALL)
    check_pixels(CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), config)
    with pytest.raises(
        ValueError,
        match=r"tower: its image processor gives pixels of the shape \[3, 42, 42\], its tower takes \[3, 56, 56\]",
    ):
        check_pixels(
            CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}), config, "tower"
        )


def test_a_llava_whose_count_of_features_is_not_its_towers_is_refused():
    text, vision = AutoConfig.for_model("llama", **TINY), SiglipVisionConfig(**SMALL)
    with pytest.raises(ValueError, match="folder: vision_feature_select_strategy 'default' drops"):
        check_llava(LlavaConfig(text_config=text, vision_config=vision), "folder")
    with pytest.raises(ValueError, match="image_seq_length 576, its tower gives 16 features"):
        check_llava(LlavaConfig(text_config=text, vision_config=vision, vision_feature_select_strategy="full"))


@pytest.mark.parametrize("strategy", [None, "full"])
@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_a_saved_model_runs_in_plain_transformers_as_here(family, strategy, tmp_path):
    from PIL import Image

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = build_llava(
        language_model("llama"),
        AutoModel.from_config(AutoConfig.for_model(family, **SMALL)),
        tokenizer,
        select_strategy=strategy,
    ).eval()
    size = {"height": 56, "width": 56}
    processor = (
        SiglipImageProcessorPil(size=size)
        if family.startswith("siglip")
        else CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size)
    )
    save_llava(model, tmp_path, tokenizer, processor)
    plain, read = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path, backend="pil"),
    )
    asked = read(
        images=Image.new("RGB", (90, 60), "red"), text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt"
    )
    assert int((asked["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length
    with torch.no_grad():
        theirs = plain(**asked).logits
        ours = model(
            input_ids=asked["input_ids"],
            position_ids=torch.arange(asked["input_ids"].shape[1])[None],
            pixel_values=asked["pixel_values"],
            use_cache=False,
        ).logits
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert plain.generate(**asked, max_new_tokens=3, do_sample=False).shape[1] >= asked["input_ids"].shape[1] + 1


def test_three_dimensional_pixels_are_features_only_when_they_are_said_to_be():
    model = tiny_llava(tiny_tokenizer())
    freeze(model, 2)
    pool = [sample(model, True, 9, 0)]
    states = (
        model.model.vision_tower(pool[0]["pixel_values"][None], output_hidden_states=True).hidden_states[-2][0].detach()
    )
    given = collate_packed([pool[0] | {"pixel_values": states}], tuple(states.shape))
    assert given["features"] and "features" not in collate_packed(pool, SHAPE)
    assert_equal(
        loss_and_gradients(model, row_loss, given), loss_and_gradients(model, row_loss, collate_packed(pool, SHAPE))
    )
    with pytest.raises(Exception):
        row_loss(model, {k: v for k, v in given.items() if k != "features"}, 2048, model.config.image_token_id)
