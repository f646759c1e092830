"""The result folder: complete, loadable by timm alone, there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from workers import artifact
from workers.artifact import Artifact, timm_config, write_result
from workers.contract import JobSpec
from workers.images import centre, decode, fill_square
from workers.model import build_model, model_input

LEDGER = {"compute_fraction": {"predicted": 0.6, "measured": 0.61}}
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
BUILDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of one channel": {"global_pool": "avg", "in_chans": 1, "class_token": False},
    "layer scale": {"init_values": 0.1, "qkv_bias": False},
}


def spec(**args: Any) -> JobSpec:
    return JobSpec(model="vit_tiny_patch16_224.augreg_in21k", model_args={**TINY, **args}, seed=3)


def written(
    directory: Path, job: JobSpec, classes: tuple[str, ...] = ("ant", "bee")
) -> tuple[VisionTransformer, list[Artifact]]:
    model = build_model(job, len(classes), load=False).eval()
    inputs = model_input(model)
    return model, write_result(
        directory, model.state_dict(), spec=job, model_input=inputs, classes=classes, ledger=LEDGER
    )


@pytest.mark.parametrize("name", BUILDS)
def test_timm_rebuilds_the_model_from_the_folder_alone(tmp_path: Path, name: str) -> None:
    model, _ = written(tmp_path / "result", spec(**BUILDS[name]))
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'result'}", pretrained=True).eval()
    images_BCHW = torch.randn(4, model.in_chans, 16, 16)
    assert torch.equal(rebuilt(images_BCHW), model(images_BCHW))
    assert rebuilt.pretrained_cfg["label_names"] == ["ant", "bee"]
    config = timm.data.resolve_model_data_config(rebuilt)
    assert config["input_size"] == (model.in_chans, 16, 16)
    assert (tuple(config["mean"]), config["crop_pct"]) == (model_input(model).mean, 1.0)


@pytest.mark.parametrize("name", BUILDS)
def test_timm_loads_the_weights_as_a_checkpoint(tmp_path: Path, name: str) -> None:
    model, _ = written(tmp_path / "result", spec(**BUILDS[name]))
    config = json.loads((tmp_path / "result/config.json").read_text())
    rebuilt = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        checkpoint_path=tmp_path / "result/model.safetensors",
        **config["model_args"],
    ).eval()
    images_BCHW = torch.randn(4, model.in_chans, 16, 16)
    assert torch.equal(rebuilt(images_BCHW), model(images_BCHW))


def test_the_bundled_model_and_its_result_as_weights_go_round(tmp_path: Path) -> None:
    model, artifacts = written(tmp_path / "result", JobSpec(), tuple("0123456789"))
    again = build_model(JobSpec(weights=artifacts[0].path, seed=8), 10)
    images_BCHW = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.eval()(images_BCHW), model(images_BCHW))


def test_every_file_is_returned_with_its_size_and_hash(tmp_path: Path) -> None:
    _, artifacts = written(tmp_path / "result", spec())
    names = [
        "model.safetensors", "config.json", "classes.json", "preprocessing.json", "README.md", "ledger.json",
        "manifest.json",
    ]  # fmt: skip
    assert [found.name for found in artifacts] == names
    for found in artifacts:
        content = Path(found.path).read_bytes()
        assert (found.bytes, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    manifest = json.loads((tmp_path / "result/manifest.json").read_text())
    assert {entry["name"]: entry["sha256"] for entry in manifest["files"]} == {a.name: a.sha256 for a in artifacts[:-1]}
    assert json.loads((tmp_path / "result/ledger.json").read_text()) == LEDGER


def test_another_program_is_told_the_classes_and_what_to_do_with_an_image(tmp_path: Path) -> None:
    """Done by hand from the two files, the model sees what training showed it."""
    job = spec(in_chans=3)
    written(tmp_path / "result", job)
    told = json.loads((tmp_path / "result/preprocessing.json").read_text())
    assert json.loads((tmp_path / "result/classes.json").read_text()) == {"0": "ant", "1": "bee"}
    pixels_HWC = np.random.default_rng(5).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels_HWC)
    image.save(tmp_path / "image.png")
    resampling = Image.Resampling[told["interpolation"].upper()]
    side = 24 * told["crop_pct"]
    box = (20 - side / 2, 12 - side / 2, 20 + side / 2, 12 + side / 2)
    square = image.convert(told["mode"]).resize(tuple(told["size"]), resampling, box=box)
    by_hand_HWC = (np.asarray(square) * told["scale"] - told["mean"]) / told["std"]
    inputs = model_input(build_model(job, 2, load=False))
    read = decode((tmp_path / "image.png").read_bytes(), "RGB")
    ours = fill_square(read, centre(read.size, told["crop_pct"]), inputs.img_size, inputs.interpolation)
    ours_HWC = np.asarray(ours) / 255
    assert np.allclose(by_hand_HWC, (ours_HWC - np.array(inputs.mean)) / np.array(inputs.std))


def test_views_of_one_storage_and_transposed_tensors_are_written(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    tensors = {"head.weight": flat[:12].view(3, 4).T, "head.bias": flat[12:16]}
    inputs = model_input(build_model(spec(), 2, load=False))
    write_result(tmp_path / "r", tensors, spec=spec(), model_input=inputs, classes=("a", "b"), ledger={})
    assert timm_config(tensors, spec(), inputs, ("a", "b"))["num_features"] == 3


def test_an_older_result_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    written(tmp_path / "result", spec(init_values=0.1))
    (tmp_path / "result/stale").write_text("x")
    written(tmp_path / "result", spec())
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert not (tmp_path / "result/stale").exists()


def test_whoever_may_enter_the_parent_may_read_the_result(tmp_path: Path) -> None:
    _, artifacts = written(tmp_path / "result", spec())
    assert (tmp_path / "result").stat().st_mode & 0o777 == 0o755
    assert {Path(found.path).stat().st_mode & 0o044 for found in artifacts} == {0o044}


def test_a_failure_half_way_leaves_the_older_result_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = written(tmp_path / "result", spec())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "_describe", fail)
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path / "result", spec(init_values=0.1))
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert hashlib.sha256(Path(before[0].path).read_bytes()).hexdigest() == before[0].sha256
