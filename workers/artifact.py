"""The result of a job: one folder with plain timm weights, the config that rebuilds the model, and the ledger.

    model.safetensors    the state dict under timm's keys
    config.json          architecture, model_args, labels, preprocessing
    classes.json         the name of each class by its index: {"0": "ant", "1": "bee"}
    preprocessing.json   what to do with an image, in words that need no timm
    model.onnx           the same model, where the job asks for it (`export`)
    adapter_config.json, adapter_model.safetensors   with LoRA: the adapter for the weights that training began with, as
                         PEFT reads it; model.safetensors has it merged in
    README.md            the model card (`card`)
    ledger.json          predicted and measured cost, accuracy before and after
    manifest.json        bytes and SHA-256 of all the others

`timm.create_model("local-dir:DIRECTORY", pretrained=True)` rebuilds the model from the folder alone. The folder appears
whole or not at all.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from workers.card import model_card
from workers.contract import JobSpec
from workers.disk import sha256_of, sync
from workers.export import ONNX_FILE, export_onnx
from workers.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter, merged
from workers.model import ModelInput, resolve

_LOG = logging.getLogger(__name__)
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.json"
PREPROCESSING_FILE = "preprocessing.json"
CARD_FILE = "README.md"
LEDGER_FILE = "ledger.json"
MANIFEST_FILE = "manifest.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, CLASSES_FILE, PREPROCESSING_FILE, CARD_FILE, LEDGER_FILE)
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
FILE_MODE = 0o644  # a result is for whoever may enter its parent


@dataclass(frozen=True)
class Artifact:
    """One file of the result; `sha256` in hex."""

    name: str
    path: str
    bytes: int
    sha256: str


def write_result(
    directory: str | Path,
    state_dict: Mapping[str, Tensor],
    *,
    spec: JobSpec,
    model_input: ModelInput,
    classes: Sequence[str],
    ledger: Mapping[str, Any],
    warn: Callable[[str], None] = _LOG.warning,
) -> list[Artifact]:
    """Write the result folder, replacing an older one, and return its files.

    Everything is written and synced beside the target and renamed into place, so that a crash leaves no half result.
    What was asked for beside the weights and fails is left away, and `warn` told.
    """
    target = Path(directory).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        lora = spec.method.lora
        plain = state_dict if lora is None else merged(state_dict, lora)
        _write_weights(draft / WEIGHTS_FILE, plain)
        if lora is not None:
            weights, told = adapter(state_dict, lora)
            _write_weights(draft / ADAPTER_WEIGHTS, weights)
            _write_json(draft / ADAPTER_CONFIG, told)
        _write_json(draft / CONFIG_FILE, timm_config(state_dict, spec, model_input, classes))
        _write_json(draft / CLASSES_FILE, {str(index): name for index, name in enumerate(classes)})
        _write_json(draft / PREPROCESSING_FILE, preprocessing(spec, model_input))
        has_onnx = spec.export.onnx and export_onnx(draft, warn)
        _write_text(draft / CARD_FILE, model_card(spec, model_input, classes, ledger, has_onnx=has_onnx))
        _write_json(draft / LEDGER_FILE, ledger)
        names = (*FILES, *([ONNX_FILE] if has_onnx else []), *(ADAPTER_FILES if lora is not None else []))
        artifacts = [_describe(draft / name, target) for name in names]
        _write_json(draft / MANIFEST_FILE, {"files": [_without_path(artifact) for artifact in artifacts]})
        artifacts.append(_describe(draft / MANIFEST_FILE, target))
        draft.chmod(0o755)  # mkdtemp lets only the owner in
        sync(draft)
        _move_into_place(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return artifacts


def timm_config(
    state_dict: Mapping[str, Tensor], spec: JobSpec, model_input: ModelInput, classes: Sequence[str]
) -> dict[str, Any]:
    """What timm's "local-dir:" and "hf-hub:" sources read: how to build the model, and how to feed it."""
    resolved = resolve(spec)
    size, channels = model_input.img_size, model_input.in_chans
    return {
        "architecture": resolved.timm_name.partition(".")[0],
        "num_classes": len(classes),
        "num_features": state_dict["head.weight"].shape[1],
        "label_names": list(classes),
        "model_args": {**resolved.model_args, "img_size": size, "in_chans": channels},
        "pretrained_cfg": {
            "input_size": [channels, size, size],
            "fixed_input_size": True,
            "interpolation": model_input.interpolation,
            "crop_pct": shown_part(spec, model_input),
            "crop_mode": "center",
            "mean": list(model_input.mean),
            "std": list(model_input.std),
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def shown_part(spec: JobSpec, model_input: ModelInput) -> float:
    """How much of an image's shorter side the model is shown; digits are shown whole."""
    return 1.0 if spec.dataset == "digits" else model_input.crop_pct


def preprocessing(spec: JobSpec, model_input: ModelInput) -> dict[str, Any]:
    """What to do with an image before the model sees it, in the order of the keys.

    `crop_pct` is of the shorter side; `interpolation` is Pillow's; pixels of 0 to 255 are multiplied by `scale`, then
    each channel has its `mean` taken away and is divided by its `std`. Where an image says that it is turned (EXIF),
    nobody heeds it.
    """
    size = model_input.img_size
    return {
        "channels": model_input.in_chans,
        "mode": "L" if model_input.in_chans == 1 else "RGB",
        "crop": "square in the centre",
        "crop_pct": shown_part(spec, model_input),
        "size": [size, size],
        "interpolation": model_input.interpolation,
        "scale": 1 / 255,
        "mean": list(model_input.mean),
        "std": list(model_input.std),
        "layout": "batch, channel, row, column",
        "dtype": "float32",
    }


def _write_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    tensors = {key: _alone(tensor.detach().cpu()) for key, tensor in state_dict.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(FILE_MODE)  # safetensors lets only the owner read
    sync(path)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own, as safetensors wants it; copied only where it is a view of another."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.contiguous().clone()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(FILE_MODE)  # the service runs with a umask that keeps others out of its own files
    sync(path)


def _describe(path: Path, target: Path) -> Artifact:
    return Artifact(path.name, str(target / path.name), path.stat().st_size, sha256_of(path))


def _without_path(artifact: Artifact) -> dict[str, Any]:
    return {key: value for key, value in asdict(artifact).items() if key != "path"}


def _move_into_place(draft: Path, target: Path) -> None:
    """Rename; an older result steps aside first, because a rename does not replace a folder that has files."""
    aside = draft.with_name(f"{draft.name}.old")
    if target.exists():
        target.rename(aside)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
