"""The book's Trainer makes the steps of a bare loop, however they are cut, and runs without the layers behind it."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Trainer, TrainerCallback, get_scheduler

from llava_nb.conversation import get_template
from llava_nb.dataset import LlavaDataset
from llava_nb.fast.engine import accumulating
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import freeze, tiny_llava
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.objective import row_loss, token_weights
from llava_nb.optim import parameter_groups
from llava_nb.packing import collate_packed
from llava_nb.safe.reliable_trainer import ReliableTrainer
from llava_nb.trainer import LlavaTrainer, LlavaTrainingArguments, on_device

STEPS = 8
ROOT = Path(__file__).resolve().parent.parent


class Substeps(TrainerCallback):
    """How often a row was done that is not a step's last."""

    def __init__(self):
        self.seen = []

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def new_model():
    model = tiny_llava(tiny_tokenizer(), seed=3)
    freeze(model, stage=2)
    model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "pad"}
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twenty records, every fourth without an image, of many lengths."""
    where, tokenizer, records = tmp_path_factory.mktemp("world"), tiny_tokenizer(), []
    Image.new("RGB", (60, 40), "teal").save(where / "a.png")
    for k in range(20):
        mark = {} if k % 4 == 3 else {"image": "a.png"}
        question = ("<image>\n" if mark else "") + f"What is {k}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a number " * (k + 1)}]
        records.append({"id": str(k), "conversations": turns} | mark)
    config = new_model().config
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    encoder = Encoder(tokenizer, config.image_token_id, config.image_seq_length, max_length=256)
    return (
        tokenizer,
        processor,
        LlavaDataset(records, get_template("v1"), encoder, ImageTransform(processor, "pad"), where),
    )


def arguments(folder: Path, **changes) -> LlavaTrainingArguments:
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return LlavaTrainingArguments(**usual | changes)


def trainer_for(world, args, callbacks=()) -> LlavaTrainer:
    tokenizer, processor, dataset = world
    return LlavaTrainer(new_model(), args, dataset, tokenizer, processor, callbacks=list(callbacks))


def bare_loop(dataset, plan) -> tuple[list[float], dict]:
    """The reference's micro-batches, one after another, in plain PyTorch."""
    model, losses = new_model(), []
    optimizer = torch.optim.AdamW(parameter_groups(model, 2e-3, 0.1))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    for k in range(STEPS):
        batches = plan.for_epoch(k // plan.steps).micro_batches(k % plan.steps)
        weights = token_weights("reference", [dataset.supervised[b].tolist() for b in batches])
        losses.append(0.0)
        for batch, weight in zip(batches, weights):
            if not len(batch):
                continue
            row = collate_packed([dataset[i] | {"weight": w} for i, w in zip(batch, weight)], (3, 56, 56))
            loss = row_loss(model, row, model.config.llava_nb["text_vocab_size"], model.config.image_token_id)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_tokens": 160}, {"max_tokens": 4096}, {"dataloader_num_workers": 2, "max_tokens": 200}],
    ids=str,
)
def test_the_trainer_makes_the_steps_of_a_bare_loop(world, tmp_path, changes):
    trainer = trainer_for(world, arguments(tmp_path, **changes))
    trainer.train()
    losses, weights = bare_loop(world[2], trainer.plan_sampler.plan.for_epoch(0))
    assert [h["loss"] for h in trainer.state.log_history if "loss" in h] == pytest.approx(losses, abs=2e-5)
    found = trainer.model.state_dict()
    assert max(float((found[name] - w).abs().max()) for name, w in weights.items()) < 1e-4


def test_transformers_counts_one_batch_a_step_and_divides_nothing(world, tmp_path):
    """Its loop, accelerate and the step itself: the gradient is the sum of the rows'."""
    args = arguments(tmp_path)
    trainer = trainer_for(world, args)
    assert (
        args.gradient_accumulation_steps == 2
        and trainer.args.gradient_accumulation_steps == 1 == trainer.accelerator.gradient_accumulation_steps
    )
    assert (
        len(trainer.get_train_dataloader()) == trainer.plan_sampler.plan.steps
        and trainer.get_total_train_batch_size(args) == 4
    )
    trainer._prepare_for_training(STEPS, trainer.get_train_dataloader(), None)
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model_wrapped, rows)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    parts = [trainer.compute_loss(trainer.model, on_device(row, trainer)) for row in rows]
    sum(parts).backward()
    assert len(rows) == 2 and loss.item() == pytest.approx(sum(parts).item(), rel=1e-6)
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, atol=1e-7), name


def test_rows_of_a_step_are_chosen_step_by_step_and_told_to_callbacks(world, tmp_path):
    substeps = Substeps()
    trainer = trainer_for(world, arguments(tmp_path, max_tokens=160, max_steps=5), [substeps])
    trainer.train()
    counts = [len(trainer.plan_sampler.step(k)) for k in range(5)]
    assert len(set(counts)) > 1 and [substeps.seen.count(k) for k in range(5)] == [n - 1 for n in counts]


def test_a_second_trainer_may_take_the_same_arguments(world, tmp_path):
    args = arguments(tmp_path, max_steps=2, max_tokens=160, save_total_limit=2)
    losses = []
    for _ in range(2):
        trainer = trainer_for(world, args)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert losses[0] == losses[1] and args.gradient_accumulation_steps == 2 and args.save_total_limit == 2


def test_loss_weights_stay_float32_where_pixels_do_not(world, tmp_path):
    trainer = trainer_for(world, arguments(tmp_path))
    trainer.model.to(torch.bfloat16)
    trainer.is_deepspeed_enabled = True
    row = on_device(next(iter(trainer.get_train_dataloader()))[0], trainer)
    assert (
        row["loss_weights"].dtype == torch.float32
        and row["pixel_values"].dtype == torch.bfloat16
        and row["input_ids"].dtype == torch.int64
    )


def test_the_last_row_alone_completes_the_gradients():
    class Accelerator:
        """accelerate on several ranks without DeepSpeed."""

        def __init__(self):
            self.state, self.seen, self.sync_gradients = type("State", (), {"deepspeed_plugin": None})(), [], True

        def no_sync(self, model):
            self.seen.append("put off")
            import contextlib

            return contextlib.nullcontext()

    accelerator = Accelerator()
    for last in (False, False, True):
        with accumulating(accelerator, None, last):
            accelerator.seen.append(accelerator.sync_gradients)
    assert accelerator.seen == ["put off", False, "put off", False, True]
    accelerator.state.deepspeed_plugin, accelerator.seen = object(), []
    with accumulating(accelerator, None, False):
        assert not accelerator.sync_gradients and accelerator.seen == []  # the engine asks for the boundary


def overridden(cls: type) -> set[str]:
    """Private methods of transformers' Trainer that a class and its parents replace."""
    own = [c for c in cls.__mro__ if c not in Trainer.__mro__]
    return {
        name
        for c in own
        for name in vars(c)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }


def test_few_private_methods_of_transformers_are_overridden():
    """Eleven until November 2026: each may change its name or meaning with any version."""
    assert overridden(LlavaTrainer) == set()
    assert overridden(ReliableTrainer) == {
        "_save_checkpoint",
        "_prepare_for_training",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_run_epoch",
    }
