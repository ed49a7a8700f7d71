"""The reference's losses, gradients and twelve training steps, through the kit's own path.

Dataset, collator, model, objective and parameter groups are the kit's; only the weights come from the goldens' formula.
"""

import json
import zlib

import numpy as np
import pytest
import torch
from goldens import folder, golden_image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
)

from llava_nb.checkpoint import published_state
from llava_nb.conversation import get_template
from llava_nb.dataset import LlavaDataset
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import build_llava, freeze
from llava_nb.masking import Encoder
from llava_nb.objective import padded_loss, row_loss
from llava_nb.optim import parameter_groups
from llava_nb.packing import collate_packed, collate_padded
from llava_nb.sampler import Plan
from llava_nb.trainer import PlanSampler

GOLDENS = json.loads((folder() / "model.json").read_text())
BATCHES = [k for k, v in GOLDENS.items() if "records" in v]


def golden_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return torch.from_numpy(1 + 0.1 * x)
    if "norm" in name and name.endswith("bias"):
        return torch.from_numpy(0.1 * x)
    return torch.from_numpy(0.08 * x)


def golden_tokenizer():
    return AutoTokenizer.from_pretrained(folder() / "tokenizer")


def golden_model(tokenizer, stage: int = 2):
    """The goldens' model: every weight of the reference's vocabulary is a function of its published name."""
    vocab = len(tokenizer)
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
    )
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
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
            if "image" in r:
                golden_image(*r["image"]).save(where / name_of(r["image"]))
    return where


def name_of(image: list[int]) -> str:
    return "-".join(map(str, image)) + ".png"


def dataset_of(names, model, tokenizer, image_folder) -> LlavaDataset:
    """The records of golden batches that share a template, as the kit's dataset."""
    golden = GOLDENS[names[0]]
    raw = [r for name in names for r in GOLDENS[name]["records"]]
    records = [{"id": k, **r, **({"image": name_of(r["image"])} if "image" in r else {})} for k, r in enumerate(raw)]
    encoder = Encoder(tokenizer, model.config.image_token_id, model.config.image_seq_length, 2048)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaDataset(
        records, get_template(golden["template"]), encoder, ImageTransform(processor, golden["aspect"]), image_folder
    )


def packed_row(name, model, tokenizer, image_folder):
    """One golden batch as the kit's packed row, all of it one reference micro-batch."""
    dataset = dataset_of([name], model, tokenizer, image_folder)
    return collate_packed([dataset[i] for i in range(len(dataset))], image_shape=(3, 56, 56))


def loss_of(model, row):
    return row_loss(model, row, model.config.llava_nb["text_vocab_size"], model.config.image_token_id)


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_every_gradient_equal_the_reference(name, image_folder):
    tokenizer = golden_tokenizer()
    model, golden = golden_model(tokenizer), GOLDENS[name]
    row = packed_row(name, model, tokenizer, image_folder)
    assert len(row["targets"]) == golden["n_supervised"]
    if len(row["picture_of"]):
        assert float(row["pixel_values"][row["picture_of"]].double().sum()) == pytest.approx(
            golden["pixel_sum"], rel=1e-6
        )
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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(groups) == 4
    assert losses == pytest.approx(golden["losses"], abs=1e-4)


@pytest.mark.parametrize(
    "collate,loss_of_batch", [(collate_packed, row_loss), (collate_padded, padded_loss)], ids=["packed", "padded"]
)
def test_every_deal_of_a_global_batch_gives_the_same_loss_and_gradients(collate, loss_of_batch, image_folder):
    """One optimizer step of the golden model, cut for ranks x rows: the reference's micro-batches set the weights."""
    tokenizer = golden_tokenizer()
    model = golden_model(tokenizer)
    same = max(
        ([n for n in BATCHES if GOLDENS[n]["template"] == t] for t in {GOLDENS[n]["template"] for n in BATCHES}),
        key=len,
    )
    data = dataset_of(same, model, tokenizer, image_folder)
    assert len(data) > 1

    def step(collate, loss_of_batch, world, micro_steps):
        model.zero_grad()
        plan, total = (
            Plan("random", data.lengths, batch_size=-(-len(data) // 4), world_size=world, accumulation=4 // world),
            0.0,
        )
        for rank in range(world):
            for row in PlanSampler(plan, data.supervised, rank=rank, rows=micro_steps).step(0):
                samples = [data[i] | {"weight": w} for i, w in row]
                loss = loss_of_batch(
                    model,
                    collate(samples, image_shape=(3, 56, 56)),
                    model.config.llava_nb["text_vocab_size"],
                    model.config.image_token_id,
                )
                loss.backward()
                total += float(loss.detach())
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected, gradients = step(collate_packed, row_loss, 1, 1)
    for world, micro_steps in ((1, 1), (1, 4), (2, 2), (4, 1)):
        loss, found = step(collate, loss_of_batch, world, micro_steps)
        assert loss == pytest.approx(expected, abs=1e-6)
        for n, g in gradients.items():
            assert torch.allclose(found[n], g, atol=1e-6), (world, micro_steps, n)
