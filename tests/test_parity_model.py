"""The reference's losses, gradients and twelve training steps, through the kit's own path.

Dataset, collator, model, objective and parameter groups are the kit's; only the weights come from the goldens' formula.
"""
import json
import zlib

import numpy as np
import pytest
import torch
from goldens import folder, golden_image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llava_nb.checkpoint import published_state
from llava_nb.conversation import get_template
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import build_llava, freeze
from llava_nb.masking import Encoder
from llava_nb.objective import row_loss
from llava_nb.optim import parameter_groups
from llava_nb.packing import collate_packed
from llava_nb.records import LlavaDataset

GOLDENS = json.loads((folder() / "model.json").read_text())
BATCHES = [k for k, v in GOLDENS.items() if "records" in v]


def golden_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"): return torch.from_numpy(1 + 0.1 * x)
    if "norm" in name and name.endswith("bias"): return torch.from_numpy(0.1 * x)
    return torch.from_numpy(0.08 * x)


def golden_tokenizer():
    return AutoTokenizer.from_pretrained(folder() / "tokenizer")


def golden_model(tokenizer, stage: int = 2):
    """The goldens' model: every weight of the reference's vocabulary is a function of its published name."""
    vocab = len(tokenizer)
    text = LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-5, rope_theta=10_000.0)
    vision = CLIPVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
    model = build_llava(AutoModelForCausalLM.from_config(text), AutoModel.from_config(vision), tokenizer)
    with torch.no_grad():
        for name, p in published_state(model, dict(model.named_parameters())).items():
            rows = vocab if "embed_tokens" in name or "lm_head" in name else p.shape[0]
            p[:rows] = golden_weight(name, (rows, *p.shape[1:]))
    freeze(model, stage)
    return model.train()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("images")
    for batch in BATCHES:
        for r in GOLDENS[batch]["records"]:
            if "image" in r: golden_image(*r["image"]).save(where / name_of(r["image"]))
    return where


def name_of(image: list[int]) -> str:
    return "-".join(map(str, image)) + ".png"


def packed_row(name, model, tokenizer, image_folder):
    """One golden batch as the kit's packed row, all of it one reference micro-batch."""
    golden = GOLDENS[name]
    records = [{"id": k, **r, **({"image": name_of(r["image"])} if "image" in r else {})} for k, r in enumerate(golden["records"])]
    encoder = Encoder(tokenizer, model.config.image_token_id, model.config.image_seq_length, 2048)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    dataset = LlavaDataset(records, get_template(golden["template"]), encoder, ImageTransform(processor, golden["aspect"]), image_folder)
    return collate_packed([dataset[i] for i in range(len(dataset))], image_shape=(3, 56, 56))


def loss_of(model, row):
    return row_loss(model, row, model.config.llava_nb["text_vocab_size"], model.config.image_token_id)


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_every_gradient_equal_the_reference(name, image_folder):
    tokenizer = golden_tokenizer()
    model, golden = golden_model(tokenizer), GOLDENS[name]
    row = packed_row(name, model, tokenizer, image_folder)
    assert len(row["targets"]) == golden["n_supervised"]
    if not row["blank"]: assert float(row["pixel_values"].double().sum()) == pytest.approx(golden["pixel_sum"], rel=1e-6)
    loss = loss_of(model, row)
    assert float(loss.detach()) == pytest.approx(golden["loss"], abs=1e-5)
    loss.backward()
    grads = published_state(model, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    norms = {n: float(g.norm()) for n, g in grads.items() if n in golden["grad_norms"]}
    assert norms.keys() == golden["grad_norms"].keys()
    for n, norm in norms.items():
        assert norm == pytest.approx(golden["grad_norms"][n], rel=1e-4, abs=1e-9), n


def test_twelve_steps_of_training_equal_the_reference(image_folder):
    golden, tokenizer = GOLDENS["train12"], golden_tokenizer()
    model = golden_model(tokenizer)
    rows = [packed_row(name, model, tokenizer, image_folder) for name in golden["order"]]
    groups = parameter_groups(model, golden["lr"], golden["weight_decay"], golden["projector_lr"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(len(golden["losses"])):
        loss = loss_of(model, rows[step % len(rows)])
        losses.append(float(loss.detach()))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert len(groups) == 4
    assert losses == pytest.approx(golden["losses"], abs=1e-4)
