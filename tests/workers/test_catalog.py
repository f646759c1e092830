"""The catalogue of timm's models."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import timm

import service.catalogue
from workers import anatomy, catalog
from workers.contract import DIGITS_MODEL
from workers.shapes import Measured, read_entry

SOME = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "deit_tiny_distilled_patch16_224",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_small_r26_s32_224",
    "cait_xxs24_224",
]


def test_some_known_models_are_judged_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_models", lambda: SOME)
    built = catalog.build_catalog()
    assert built["timm"] == timm.__version__
    assert built["format"] == catalog.FORMAT == service.catalogue.FORMAT
    sizes = {name: built["models"].pop(name) for name in (DIGITS_MODEL, *SOME[:3])}
    assert sizes[DIGITS_MODEL]["embed_dim"] == 96 and sizes[DIGITS_MODEL]["img_size"] == 28
    assert sizes["vit_small_patch14_dinov2"]["img_size"] == 518 and sizes["vit_small_patch14_dinov2"]["depth"] == 12
    assert sizes["vit_small_patch14_reg4_dinov2"]["reg_tokens"] == 4
    eva = read_entry(sizes["eva02_tiny_patch14_224"])
    assert isinstance(eva, Measured) and (eva.shape.num_blocks, eva.shape.num_heads, eva.shape.mlp_matrices) == (
        12,
        3,
        3,
    )
    assert built["models"] == {
        "deit_tiny_distilled_patch16_224": "architecture VisionTransformerDistilled is not a plain vision transformer",
        "resnet50": "architecture resnet is not a plain vision transformer (a convolutional network)",
        "swin_tiny_patch4_window7_224": "architecture swin_transformer is not a plain vision transformer"
        " (attention within windows)",
        "vit_small_r26_s32_224": "architecture vision_transformer_hybrid is not a plain vision transformer"
        " (convolutional stem)",
        "cait_xxs24_224": "architecture cait is not a plain vision transformer",
    }


def test_the_command_covers_every_name_that_timm_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new/catalog.json"
    monkeypatch.setattr(sys, "argv", ["catalog", "--out", str(path)])
    catalog.main()
    models = json.loads(path.read_text())["models"]
    assert set(models) == {DIGITS_MODEL, *timm.list_models()}
    supported = [name for name, entry in models.items() if isinstance(entry, dict)]
    assert len(supported) > 220
    assert f"{len(supported)} of {len(models)} models work" in capsys.readouterr().out
    assert catalog.table(models) in Path("workers/README.md").read_text()


def test_every_module_that_is_called_foreign_is_one_of_timms() -> None:
    modules = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    named = [module for modules in anatomy._FOREIGN.values() for module in modules]
    assert set(named) <= modules - anatomy.MODULES and len(named) == len(set(named))


def test_the_file_is_readable_by_all_and_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.json"
    catalog.write_atomically(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(catalog.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        catalog.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["catalog.json"]
