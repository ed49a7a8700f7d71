"""The feature cache: the same training as from pixels; a row is used only for the tower and image it belongs to."""

import json
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, farthest, launch, make_world, run, weights
from transformers import CLIPImageProcessorPil

import llava_nb.store.features as features
import llava_nb.train as train
from llava_nb.conversation import get_template
from llava_nb.fast.meter import Work
from llava_nb.imageproc import ImageTransform
from llava_nb.llava import load_llava, load_tower, tiny_llava
from llava_nb.masking import Encoder, tiny_tokenizer
from llava_nb.store.dataset import ValidatedDataset
from llava_nb.store.features import Extractor, cached_features

SHORT = {"max_steps": 4, "save_steps": 4, "sampler": "modality"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def from_pixels(world):
    return launch(config(world, "pixels", **SHORT)[0], 0)


@pytest.mark.parametrize(
    "ranks,changes",
    [
        (0, {"dataloader_num_workers": 1}),
        pytest.param(2, {"zero": 3, "gradient_accumulation_steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_training_from_features_is_training_from_pixels(world, from_pixels, ranks, changes):
    file, settings = config(world, f"features{ranks}", feature_cache=str(world / "cache"), **SHORT, **changes)
    assert launch(file, ranks) == pytest.approx(from_pixels, abs=1e-5 if ranks else 1e-6)
    assert farthest(weights(world / "pixels"), weights(world / f"features{ranks}")) < 1e-6
    pictures = sum("image" in r for r in json.loads((world / "records.json").read_text()))
    (folder,) = [p for p in (world / "cache").iterdir() if p.is_dir()]
    assert (folder / "features.bin").stat().st_size == pictures * 17 * 48 * 4


def test_neither_meter_nor_dealing_counts_a_tower_that_is_not_run(world):
    ready = {}
    with ExitStack() as held:
        for name, more in (("counted", {}), ("not-counted", {"feature_cache": str(world / "cache")})):
            ready[name] = train.prepare(train.parse([str(config(world, name, use_cpu=True, **SHORT, **more)[0])]), held)
    work = Work(Counter({50: 4}), supervised=20, images=3)
    assert ready["counted"].meter.shape.flops(work)["tower"] > 0 and ready["counted"].plan_sampler.dealer.image > 0
    assert (
        ready["not-counted"].meter.shape.flops(work)["tower"] == 0
        and ready["not-counted"].plan_sampler.dealer.image == 0
    )


@pytest.fixture
def dataset(tmp_path):
    for k in range(6):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{k}.png")
    record = lambda k: {
        "id": k,
        "image": f"{k % 6}.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{k}."}],
    }  # noqa: E731
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return ValidatedDataset(
        [record(k) for k in range(9)],
        get_template("v1"),
        Encoder(tiny_tokenizer(), 2048, 16, 128),
        ImageTransform(clip, "pad"),
        tmp_path,
    )


def extractor(seed=0, layer=-2):
    return Extractor(tiny_llava(tiny_tokenizer(), seed).model.vision_tower, layer)


def test_a_fill_that_was_stopped_goes_on_and_a_torn_row_is_not_believed(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "AT_ONCE", 2)
    monkeypatch.setattr(features, "SAFE", 1)
    whole, calls = cached_features(dataset, extractor(), tmp_path / "whole"), []
    pixels = ValidatedDataset.pixels

    def stops(self, i):
        calls.append(i)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return pixels(self, i)

    monkeypatch.setattr(ValidatedDataset, "pixels", stops)
    with pytest.raises(KeyboardInterrupt):
        cached_features(dataset, extractor(), tmp_path / "stopped")
    (folder,) = [p for p in (tmp_path / "stopped").iterdir() if p.is_dir()]
    with (folder / "features.bin").open("ab") as f:
        f.write(b"torn")
    again = cached_features(dataset, extractor(), tmp_path / "stopped")
    assert len(calls) == 5 + 2 and all(torch.equal(again[k], whole[k]) for k in range(6))


@pytest.mark.parametrize("name", ["index.arrow", "features.bin"])
@pytest.mark.parametrize("harm", ["cut", "empty", "another shape", "gone"])
def test_a_damaged_cache_is_computed_again(dataset, tmp_path, name, harm):
    "A file that is shorter than its index would otherwise have been filled up with zeros."
    whole = cached_features(dataset, extractor(), tmp_path / "cache")
    rows = [whole[k].clone() for k in range(6)]
    file = whole.folder / name
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": file.read_bytes()[:-200], "empty": b"", "another shape": b"[]"}[harm])
    again = cached_features(dataset, extractor(), tmp_path / "cache")
    assert all(torch.equal(again[k], rows[k]) for k in range(6))


def test_another_tower_layer_processor_or_padding_has_a_cache_of_its_own(dataset, tmp_path):
    folder = lambda e=extractor(): cached_features(dataset, e, tmp_path / "cache").folder  # noqa: E731
    found = {folder(), folder(extractor(seed=1)), folder(extractor(layer=-1))}
    dataset.image_transform.aspect = "square"
    found.add(folder())
    dataset.image_transform.processor.image_mean = [0.1, 0.2, 0.3]
    found.add(folder())
    assert len(found) == 5


def test_a_tower_read_from_a_model_folder_is_the_models(world):
    a, b = load_tower(world / "start").state_dict(), load_llava(world / "start").model.vision_tower.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_bad_picture_is_named_before_the_model_is_read(world):
    Image.effect_noise((400, 300), 60).save(world / "broken.png")
    (world / "broken.png").write_bytes((world / "broken.png").read_bytes()[:9000])  # its header is whole
    records = [
        {
            "id": "bad",
            "image": "broken.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
        }
    ]
    (world / "bad.json").write_text(json.dumps(records))
    done = run(config(world, "bad-run", data_path=str(world / "bad.json"), feature_cache=str(world / "cache"))[0], 0)
    assert (
        done.returncode == 2 and "record 0 (id bad)" in done.stderr and "broken.png: cannot be decoded" in done.stderr
    )
