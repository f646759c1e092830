"""The model as ONNX: the same numbers in another program, and no run that fails for the want of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

from tests.workers.test_artifact import LEDGER, TINY
from workers import export
from workers.artifact import Artifact, write_result
from workers.contract import Export, JobSpec
from workers.model import build_model, model_input


def written(directory: Path, said: list[str], **args: object) -> list[Artifact]:
    """A result of which an ONNX model is asked for."""
    told = {**TINY, **args}
    job = JobSpec(model="vit_tiny_patch16_224", model_args=told, seed=3, export=Export(onnx=True))
    model = build_model(job, 3, load=False)
    return write_result(
        directory, model.state_dict(), spec=job, model_input=model_input(model), classes=("a", "b", "c"),
        ledger=LEDGER, warn=said.append,
    )  # fmt: skip


@pytest.mark.parametrize("args", [{}, {"in_chans": 1, "global_pool": "avg", "init_values": 0.1}], ids=["rgb", "grey"])
def test_onnxruntime_says_what_timm_says_for_any_batch(tmp_path: Path, args: dict[str, object]) -> None:
    said: list[str] = []
    artifacts = written(tmp_path / "result", said, **args)
    assert not said and "model.onnx" in [found.name for found in artifacts]
    path = tmp_path / "result" / "model.onnx"
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert path.stat().st_mode & 0o777 == 0o644
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = timm.create_model(f"local-dir:{tmp_path / 'result'}", pretrained=True).eval()
    for batch in (1, 2, 7):
        images_BCHW = torch.randn(batch, *model.pretrained_cfg["input_size"])
        (logits_BK,) = runtime.run(None, {"images": images_BCHW.numpy()})
        expected_BK = model(images_BCHW).detach()
        assert (torch.from_numpy(logits_BK) - expected_BK).abs().max() <= 1e-4 * expected_BK.abs().max()
    listed = [entry["name"] for entry in json.loads((tmp_path / "result/manifest.json").read_text())["files"]]
    assert "model.onnx" in listed and "model.onnx" in (tmp_path / "result/README.md").read_text()


def test_without_the_package_the_result_is_there_and_a_warning_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else real(name))
    said: list[str] = []
    artifacts = written(tmp_path / "result", said)
    assert "model.onnx" not in [found.name for found in artifacts] and (tmp_path / "result/model.safetensors").exists()
    assert len(said) == 1 and "d2ft[onnx]" in said[0]
    assert "model.onnx" not in (tmp_path / "result/README.md").read_text()


@pytest.mark.parametrize(("module", "word"), [("this", "ended with 0"), ("workers.no_such_module", "No module named")])
def test_an_export_that_fails_leaves_a_warning_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, word: str
) -> None:
    monkeypatch.setattr(export, "ONNX_MODULE", module)
    said: list[str] = []
    artifacts = written(tmp_path / "result", said)
    assert len(said) == 1 and word in said[0]
    assert "model.onnx" not in [found.name for found in artifacts]


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    said: list[str] = []
    assert not export.export_onnx(tmp_path, said.append, timeout_s=0.01)
    assert "timed out" in said[0]


def test_it_is_not_made_unless_it_is_asked_for() -> None:
    assert JobSpec().export == Export(onnx=False, tensorboard=True)
