"""Inherited training arguments: each acts, shown by a run of the tiny model, or is refused; none is taken and ignored."""

import contextlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava_nb import train
from llava_nb.conversation import get_template
from llava_nb.dataset import LlavaDataset
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import freeze, tiny_llava
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.run import checks, translate
from llava_nb.safe import reliable_trainer
from llava_nb.safe.inherited import ACTS, AS_IT_IS, REFUSED, refused
from llava_nb.safe.reliable_trainer import (
    OWN,
)
from llava_nb.safe.reliable_trainer import (
    ReliableTrainer as LlavaTrainer,
)
from llava_nb.safe.reliable_trainer import (
    ReliableTrainingArguments as LlavaTrainingArguments,
)
from llava_nb.trainer import loading

FIELDS = {f.name: f for f in fields(TrainingArguments) if f.init}


class Counted(TrainerCallback):
    """Rows of evaluations."""

    rows = 0

    def on_prediction_step(self, *args, **kwargs):
        self.rows += 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten records of a tiny model, two of them with a picture."""
    where, tokenizer = tmp_path_factory.mktemp("world"), tiny_tokenizer()
    Image.new("RGB", (60, 40), "teal").save(where / "a.png")
    turns = lambda k, mark: [
        {"from": "human", "value": mark + f"What is {k}?"},
        {"from": "gpt", "value": "a number " * (k + 1)},
    ]
    records = [
        {"conversations": turns(k, "")} if k < 8 else {"image": "a.png", "conversations": turns(k, "<image>\n")}
        for k in range(10)
    ]
    model = tiny_llava(tokenizer)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    encoder = Encoder(tokenizer, model.config.image_token_id, model.config.image_seq_length, max_length=256)
    return (
        where,
        tokenizer,
        processor,
        LlavaDataset(records, get_template("v1"), encoder, ImageTransform(processor, "pad"), where),
    )


@pytest.fixture
def made(world, tmp_path):
    """A Trainer with these arguments, not yet trained."""
    where, tokenizer, processor, dataset = world

    def make(**given):
        model = tiny_llava(tokenizer, seed=3)
        freeze(model, stage=2)
        model.config.llava_nb |= {"template": "v1", "image_aspect_ratio": "pad"}
        usual = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        evaluated = dataset if given.get("eval_strategy", "no") != "no" else None
        done = LlavaTrainer(
            model,
            LlavaTrainingArguments(**usual | given),
            dataset,
            tokenizer,
            processor,
            evaluated,
            callbacks=[Counted()],
        )
        done.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        return done

    return make


@pytest.fixture
def ran(made):
    def run(**given):
        done = made(**given)
        done.train()
        return done

    return run


def logged(done, key="loss") -> list:
    return [h["step"] for h in done.state.log_history if key in h]


def rates(done) -> list:
    return [h["learning_rate"] for h in done.state.log_history if "loss" in h]


def lost(done) -> list:
    return [h["loss"] for h in done.state.log_history if "loss" in h]


def saved(done) -> list:
    return sorted(int(p.name.split("-")[1]) for p in Path(done.args.output_dir).glob("checkpoint-*"))


def order(done) -> list:
    return done.plan_sampler.plan.order.tolist()


def group(done) -> dict:
    return (done.create_optimizer() or done.optimizer).param_groups[0]


def callbacks(done) -> set:
    return {type(c) for c in done.callback_handler.callbacks}


def farthest(done) -> float:
    return max(float((p.detach() - done.start[name]).abs().max()) for name, p in done.model.named_parameters())


EVALS = {"eval_strategy": "steps", "eval_steps": 2}
ACT = {  # how each shows
    "output_dir": lambda made, ran, tmp: (
        saved(ran(output_dir=str(tmp / "there"), save_strategy="steps", save_steps=2)) == [2, 4]
        and (tmp / "there" / "checkpoint-2").is_dir()
    ),
    "seed": lambda made, ran, tmp: order(made(seed=1)) != order(made(seed=2)),
    "data_seed": lambda made, ran, tmp: order(made(seed=1, data_seed=2)) == order(made(seed=2)) != order(made(seed=1)),
    "full_determinism": lambda made, ran, tmp: (
        lost(ran(full_determinism=True)),
        torch.are_deterministic_algorithms_enabled(),
    )[1],
    "use_cpu": lambda made, ran, tmp: made(use_cpu=True).args.device.type == "cpu",
    "bf16": lambda made, ran, tmp: lost(ran(bf16=True)) != lost(ran()),
    "fp16": lambda made, ran, tmp: (
        checks.precision(LlavaTrainingArguments(output_dir=str(tmp), fp16=True, report_to="none"))[1] is torch.float16
    ),
    "num_train_epochs": lambda made, ran, tmp: (
        ran(max_steps=-1, num_train_epochs=2).state.global_step == 2 * made().plan_sampler.plan.steps
    ),
    "max_steps": lambda made, ran, tmp: len(lost(ran(max_steps=3))) == 3,
    "per_device_train_batch_size": lambda made, ran, tmp: (
        len(made(per_device_train_batch_size=2).plan_sampler.plan.global_batch(0)) == 2
    ),
    "gradient_accumulation_steps": lambda made, ran, tmp: (
        len(made(gradient_accumulation_steps=2, per_device_train_batch_size=2).plan_sampler.step(0)) == 2
    ),
    "learning_rate": lambda made, ran, tmp: group(made(learning_rate=0.5))["lr"] == 0.5,
    "optim": lambda made, ran, tmp: (
        lambda t: t.create_optimizer() is t.optimizer and type(t.optimizer) is torch.optim.SGD
    )(made(optim="sgd")),
    "weight_decay": lambda made, ran, tmp: group(made(weight_decay=0.3))["weight_decay"] == 0.3,
    "adam_beta1": lambda made, ran, tmp: group(made(adam_beta1=0.5))["betas"][0] == 0.5,
    "adam_beta2": lambda made, ran, tmp: group(made(adam_beta2=0.5))["betas"][1] == 0.5,
    "adam_epsilon": lambda made, ran, tmp: group(made(adam_epsilon=0.5))["eps"] == 0.5,
    "max_grad_norm": lambda made, ran, tmp: (
        farthest(ran(optim="sgd", learning_rate=1.0, max_grad_norm=1e-6))
        < 1e-5
        < farthest(ran(optim="sgd", learning_rate=1.0))
    ),
    "lr_scheduler_type": lambda made, ran, tmp: (
        rates(ran(lr_scheduler_type="constant", learning_rate=0.01)) == [0.01] * 4
    ),
    "lr_scheduler_kwargs": lambda made, ran, tmp: (
        min(
            rates(ran(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5}, warmup_steps=0))
        )
        >= 5e-4
    ),
    "warmup_steps": lambda made, ran, tmp: (
        rates(ran(warmup_steps=2))[:2] == [0, 5e-4] and rates(ran(warmup_steps=0))[0] == 1e-3
    ),
    "activation_checkpointing": lambda made, ran, tmp: made(activation_checkpointing=True).args.recompute == "full",
    "gradient_checkpointing": lambda made, ran, tmp: made(gradient_checkpointing=True).args.recompute == "full",
    "dataloader_num_workers": lambda made, ran, tmp: (
        made(dataloader_num_workers=1).get_train_dataloader().num_workers == 1
    ),
    "dataloader_persistent_workers": lambda made, ran, tmp: (
        [
            made(dataloader_num_workers=1, dataloader_persistent_workers=p).get_train_dataloader().persistent_workers
            for p in (True, False)
        ]
        == [True, False]
    ),
    "dataloader_prefetch_factor": lambda made, ran, tmp: (
        made(dataloader_num_workers=1, dataloader_prefetch_factor=5).get_train_dataloader().prefetch_factor == 5
    ),
    "dataloader_multiprocessing_context": lambda made, ran, tmp: (
        lost(ran(dataloader_num_workers=1, dataloader_multiprocessing_context="spawn", max_steps=2))
        == lost(ran(max_steps=2))
    ),
    "eval_strategy": lambda made, ran, tmp: (
        len(logged(ran(eval_strategy="epoch", max_steps=-1, num_train_epochs=2), "eval_loss")) == 2
    ),
    "eval_steps": lambda made, ran, tmp: logged(ran(**EVALS), "eval_loss") == [2, 4],
    "eval_delay": lambda made, ran, tmp: logged(ran(**EVALS, eval_delay=3), "eval_loss") == [4],
    "eval_on_start": lambda made, ran, tmp: logged(ran(**EVALS, eval_on_start=True), "eval_loss")[0] == 0,
    "per_device_eval_batch_size": lambda made, ran, tmp: (
        [
            next(
                c.rows
                for c in ran(
                    eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=b
                ).callback_handler.callbacks
                if isinstance(c, Counted)
            )
            for b in (2, 5)
        ]
        == [5, 2]
    ),
    "save_strategy": lambda made, ran, tmp: (
        len(saved(ran(save_strategy="epoch", max_steps=-1, num_train_epochs=2))) == 2
    ),
    "save_steps": lambda made, ran, tmp: saved(ran(save_strategy="steps", save_steps=3)) == [3, 4],
    "save_total_limit": lambda made, ran, tmp: (
        saved(ran(save_strategy="steps", save_steps=1, save_total_limit=2)) == [3, 4]
    ),
    "logging_strategy": lambda made, ran, tmp: (
        logged(ran(logging_strategy="no")) == []
        and len(logged(ran(logging_strategy="epoch", max_steps=-1, num_train_epochs=2))) == 2
    ),
    "logging_steps": lambda made, ran, tmp: logged(ran(logging_steps=2)) == [2, 4],
    "logging_first_step": lambda made, ran, tmp: logged(ran(logging_steps=2, logging_first_step=True)) == [1, 2, 4],
    "log_level": lambda made, ran, tmp: (
        (made(log_level="error"), transformers.logging.get_verbosity())[1] == transformers.logging.ERROR
    ),
    "disable_tqdm": lambda made, ran, tmp: (
        ProgressCallback in callbacks(made(disable_tqdm=False)) and PrinterCallback in callbacks(made())
    ),
    "report_to": lambda made, ran, tmp: (
        "TensorBoardCallback" in {c.__name__ for c in callbacks(made(report_to="tensorboard"))}
    ),
    "run_name": lambda made, ran, tmp: made(run_name="mine").args.run_name == "mine",  # for the reporters that show it
}
ELSEWHERE = {
    "deepspeed",
    "load_best_model_at_end",
    "tf32",
    "torch_empty_cache_steps",
    "dataloader_pin_memory",
    "log_level_replica",
    "log_on_each_node",
}


@contextlib.contextmanager
def as_before():
    """What a run sets in this process."""
    verbosity = transformers.logging.get_verbosity()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ACT)
def test_a_field_that_is_taken_acts(name, made, ran, tmp_path):
    if name not in FIELDS:
        pytest.skip("another version of transformers has it")
    with as_before():
        assert ACT[name](made, ran, tmp_path)


def test_memory_is_given_back_every_so_many_steps(ran, monkeypatch):
    calls = []
    monkeypatch.setattr(reliable_trainer, "clear_device_cache", lambda *a, **k: calls.append(1))
    ran(torch_empty_cache_steps=2)
    assert len(calls) == 2


def test_pages_are_pinned_where_there_is_a_gpu(tmp_path, monkeypatch):
    args = [
        LlavaTrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=pin, report_to="none")
        for pin in (True, False)
    ]
    args[0].dataloader_pin_memory = True  # transformers switches it off without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [loading(a)["pin_memory"] for a in args] == [True, False]


def test_other_ranks_say_what_they_are_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(LlavaTrainingArguments, "local_process_index", 0)
    monkeypatch.setattr(LlavaTrainingArguments, "process_index", 1)
    quiet = LlavaTrainingArguments(
        output_dir=str(tmp_path), log_level="info", log_level_replica="error", log_on_each_node=False, report_to="none"
    )
    assert quiet.get_process_log_level() == transformers.logging.ERROR
    quiet.log_on_each_node = True
    assert quiet.get_process_log_level() == transformers.logging.INFO


@pytest.mark.gpu
def test_tf32_is_switched(tmp_path):
    before = torch.backends.cuda.matmul.allow_tf32
    for on in (True, False):
        LlavaTrainingArguments(output_dir=str(tmp_path), tf32=on, report_to="none")
        assert torch.backends.cuda.matmul.allow_tf32 is on
    torch.backends.cuda.matmul.allow_tf32 = before


def test_every_field_is_on_one_list():
    assert set(ACT) | ELSEWHERE == ACTS and not ACTS & set(REFUSED)
    assert set(FIELDS) <= ACTS | set(REFUSED) | set(translate.MEANINGLESS) | set(OWN)


OTHERS = {
    "greater_is_better": True,
    "metric_for_best_model": "accuracy",
    "hub_strategy": "end",
    "prediction_loss_only": "maybe",
    "include_for_metrics": ["inputs"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "include_num_input_tokens_seen": "all",
    "local_rank": 3,
    "project": "mine",
    "average_tokens_across_devices": False,
    "eval_do_concat_batches": False,
    "dataloader_in_order": False,
    "parallelism_config": "{}",
}


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS)))  # this transformers has them
def test_a_field_that_does_not_act_is_refused_when_it_is_set_and_taken_when_it_is_not(name):
    known = fields(LlavaTrainingArguments)
    default = FIELDS[name].default
    other = OTHERS.get(
        name, True if default in (False, None) or name in OWN else 3 if isinstance(default, (int, float)) else "other"
    )
    for value in (other, str(other)):
        found = refused({name: value}, known, OWN)
        assert (
            len(found) == 1
            and found[0].startswith(f"--{name}")
            and "is not supported: " in found[0]
            and "\n" not in found[0]
        )
    usual = False if name in OWN else [] if name == "include_for_metrics" else default
    for value in (usual, *([] if usual == [] else [str(usual)]), *AS_IT_IS.get(name, ())):
        assert refused({name: value}, known, OWN) == []


PARTS = [
    "--language_model",
    "lmsys/vicuna-7b-v1.5",
    "--vision_tower",
    "openai/clip-vit-large-patch14-336",
    "--projector",
    "random",
    "--dry_run",
]


@pytest.mark.parametrize(
    "name, value",
    [
        ("label_smoothing_factor", "0.1"),
        ("auto_find_batch_size", "True"),
        ("push_to_hub", "True"),
        ("torch_compile", "True"),
        ("fsdp", "full_shard"),
        ("neftune_noise_alpha", "5"),
        ("dataloader_drop_last", "True"),
        ("include_for_metrics", "inputs"),
        ("hub_token", "hf_" + "a" * 34),
    ],
)
def test_the_command_refuses_it_in_a_dry_run(name, value, capsys):
    assert train.main([*PARTS, f"--{name}", value]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--{name}" in err and "aaaa" not in err


def test_the_python_interface_refuses_it_too(tmp_path):
    with pytest.raises(ValueError, match="(?s)2 things are wrong:.*label_smoothing_factor 0.1.*neftune_noise_alpha"):
        LlavaTrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=0.1, neftune_noise_alpha=5.0, report_to="none"
        )


def test_everything_that_is_wrong_is_said_at_once(capsys):
    wrong = [
        "--label_smoothing_factor",
        "0.1",
        "--learnin_rate",
        "1",
        "--bits",
        "4",
        "--sampler",
        "len",
        "--max_steps",
        "0",
        "--lora_r",
        "64",
    ]
    assert train.main([*PARTS, *wrong]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 7 and "5 things are wrong" in err and "did you mean 'learning_rate'" in err
    for name in (
        "label_smoothing_factor",
        "bits 4",
        "sampler 'len'",
        "max_steps 0",
        "besides, --lora_r means nothing here",
    ):
        assert name in err, name


IMPOSSIBLE = {
    "learning_rate -1": ["--learning_rate", "-1"],
    "learning_rate nan": ["--learning_rate", "nan"],
    "weight_decay -0.1": ["--weight_decay", "-0.1"],
    "adam_beta1 1.5": ["--adam_beta1", "1.5"],
    "bf16 and fp16": ["--bf16", "True", "--fp16", "True"],
    "dataloader_num_workers -1": ["--dataloader_num_workers", "-1"],
    "needs `dataloader_num_workers`": ["--dataloader_prefetch_factor", "4"],
    "save_steps 1.5": ["--save_steps", "1.5"],
    "logging_steps 0": ["--logging_steps", "0"],
    "save_total_limit 0": ["--save_total_limit", "0"],
    "num_train_epochs 0": ["--num_train_epochs", "0"],
    "changes the rate by the results of evaluations": ["--lr_scheduler_type", "reduce_lr_on_plateau"],
    "optim 'lomo'": ["--optim", "lomo"],
    "save_strategy 'best'": ["--save_strategy", "best"],
    "lr_scheduler_kwargs": ["--lr_scheduler_kwargs", '{"cycles": 2}'],
    "needs `eval_data_path`": ["--eval_on_start", "True"],
    "per_device_eval_batch_size 0": ["--per_device_eval_batch_size", "0"],
    "is a file; name a folder": ["--output_dir", __file__],
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_values_that_cannot_be_are_refused_before_anything_is_built(message, capsys):
    assert train.main([*PARTS, *IMPOSSIBLE[message]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_schedule_with_settings_of_its_own_is_planned_as_it_will_be(capsys):
    assert (
        train.main(
            [
                *PARTS,
                "--lr_scheduler_type",
                "cosine_with_min_lr",
                "--lr_scheduler_kwargs",
                '{"min_lr_rate": 0.5}',
                "--learning_rate",
                "2e-5",
            ]
        )
        == 0
    )
    assert "1.00e-05" in capsys.readouterr().out.split("schedule")[1]
