"""Models: from a job's words to one of timm's vision transformers with weights, or a reason why not.

What the engine can run of timm says `anatomy`. Weights are safetensors in timm's own key names.

Axes: B images, C channels, H W pixels, N tokens, D width, K classes.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, eva
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from scheduler.errors import UserError
from workers import bundled
from workers.anatomy import Model, foreign_architecture, refusal
from workers.contract import DIGITS_MODEL, HUB, JobSpec
from workers.hub import located
from workers.shapes import read_entry, resized
from workers.sizing import entry_of, sizes_of

CLASSIFIER_STD = 0.02
# How timm fits a checkpoint to a model of its own: old names, positions and patches of another size.
_FITTING: dict[type, Callable[..., dict[str, Tensor]]] = {
    vit.VisionTransformer: vit.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
}
_HEAD_KEYS = ("head.weight", "head.bias")


class ModelInput(NamedTuple):
    """The images that a model wants: size and channels, how to normalise and resize them, and how much is cut off.

    `crop_pct` is the share of the shorter side that the model is shown in evaluation, as timm notes it.
    """

    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float = 1.0


class Resolved(NamedTuple):
    """What a spec's model means to timm; `weights` is a file, an address of the hub, or None for a random start."""

    timm_name: str
    model_args: dict[str, Any]
    weights: Path | str | None


def resolve(spec: JobSpec) -> Resolved:
    """timm name, model arguments and weights file of a spec; the bundled model's are its own unless overridden."""
    digits = spec.model == DIGITS_MODEL
    args: dict[str, Any] = {**(bundled.MODEL_ARGS if digits else {}), **spec.model_args}
    if spec.img_size is not None:
        args["img_size"] = spec.img_size
    weights: Path | str | None = bundled.WEIGHTS if digits else None
    if spec.weights is not None:
        weights = spec.weights if spec.weights.startswith(HUB) else Path(spec.weights)
    return Resolved(bundled.TIMM_NAME if digits else spec.model, args, weights)


def build_model(spec: JobSpec, num_classes: int, *, load: bool = True) -> Model:
    """Build the spec's model for `num_classes` classes, in float32 on the CPU, with its weights unless `load` is False.

    Everything random is drawn from `spec.seed` in a forked generator: every worker gets the same bits, and the
    caller's generator does not move. Raises UserError "unknown_model", "model_refused", "bad_model_args", and
    those of `hub.located` and `load_weights`.
    """
    resolved = resolve(spec)
    _check_known(spec.model, resolved.timm_name)
    _refuse(spec.model, foreign_architecture(resolved.timm_name))
    if spec.model_args or spec.img_size is not None:
        _check_args(spec)
    with _seeded(spec.seed):
        model = _create(resolved, num_classes)
        _refuse(spec.model, refusal(model))
        assert isinstance(model, Model)
        if spec.model == DIGITS_MODEL:
            vars(model)["pretrained_cfg"]["crop_pct"] = 1.0  # it has learnt from whole digits
        init_classifier(model)
        if load and resolved.weights is not None:
            load_weights(model, located(resolved.weights))
    return model


def init_classifier(model: Model) -> None:
    """Start the classifier afresh from the current generator: truncated normal weights, zero bias."""
    assert isinstance(model.head, nn.Linear)
    nn.init.trunc_normal_(model.head.weight, std=CLASSIFIER_STD)
    nn.init.zeros_(model.head.bias)


def model_input(model: Model) -> ModelInput:
    """What images `model` wants; a one-channel model is given the mean of the channels' mean and std."""
    assert isinstance(model.patch_embed, PatchEmbed) and model.patch_embed.img_size is not None
    cfg: dict[str, Any] = vars(model)["pretrained_cfg"]
    in_chans = int(model.patch_embed.proj.in_channels)
    mean, std = (_per_channel(cfg[key], in_chans) for key in ("mean", "std"))
    crop_pct = float(cfg.get("crop_pct") or 1.0)
    return ModelInput(model.patch_embed.img_size[0], in_chans, mean, std, str(cfg["interpolation"]), crop_pct)


def load_weights(model: Model, path: str | Path) -> None:
    """Load a safetensors file into `model`, in place; float16 and bfloat16 become the model's dtype.

    What the model had before is let go of first, so that there are never two models, also where the file is refused.
    The position table and patch embedding are resampled to the model's sizes; `norm.*` serves as `fc_norm.*` where the
    model normalises after pooling, and the other way round; a classifier for another number of classes is left out, so
    that the model keeps its own. Raises UserError (weights): "weights_not_found", "weights_not_safetensors",
    "weights_mismatch".
    """
    path = Path(path)
    _let_go(model)
    own = model.state_dict()
    given = _read_safetensors(path)
    tensors = _fit(given, model, path)
    _check_match(tensors, own, given, path)
    model.load_state_dict({key: tensors.get(key, own[key]).to(own[key].dtype) for key in own}, assign=True)


def _let_go(model: Model) -> None:
    """Leave the parameters their shapes alone, but for the classifier's, which a file need not have."""
    for name, param in list(model.named_parameters()):
        if name not in _HEAD_KEYS:
            path, _, last = name.rpartition(".")
            shape_alone = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            setattr(model.get_submodule(path), last, shape_alone)


def _check_known(name: str, timm_name: str) -> None:
    if timm.is_model(timm_name):
        return
    near = difflib.get_close_matches(name, [*timm.list_models(), DIGITS_MODEL], n=3, cutoff=0.5)
    raise UserError(
        f"There is no model '{name}' in timm {timm.__version__}.",
        code="unknown_model",
        param="model",
        remedy=f"Did you mean {', '.join(near)}?"
        if near
        else "`python -m workers.catalog --out FILE` lists what works.",
    )


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise UserError(
            f"The model '{name}' cannot be cut into heads: {reason}.",
            code="model_refused",
            param="model",
            remedy="Choose a plain vision transformer: `python -m workers.catalog --out FILE` lists those that work.",
        )


def _check_args(spec: JobSpec) -> None:
    """Refuse what a plan would, by the entry that it counts by, which names the argument."""
    with _BUILDING:
        digits = spec.model == DIGITS_MODEL
        entry = sizes_of(bundled.TIMM_NAME, **bundled.MODEL_ARGS).to_dict() if digits else entry_of(spec.model)
    if isinstance(entry, str):
        _refuse(spec.model, entry)
    else:
        resized(read_entry(entry), spec.model_args, spec.img_size)


def _create(resolved: Resolved, num_classes: int) -> nn.Module:
    try:
        return timm.create_model(resolved.timm_name, pretrained=False, num_classes=num_classes, **resolved.model_args)
    # timm checks its arguments by asserting, or fails inside with whatever the bad value leads to.
    except (AssertionError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"timm cannot build '{resolved.timm_name}' with {resolved.model_args}: {error}.",
            code="bad_model_args",
            param="model_args",
            remedy="Correct model_args and img_size.",
        ) from error


# The generator is the process's: workers on threads would draw from each other's. So are timm's classes, which
# `sizing` has in hand for a moment.
_BUILDING = threading.Lock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # No devices: models are built on the CPU, and forking every CUDA generator is slow.
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if len(values) == in_chans:
        return tuple(values)
    return (sum(values) / len(values),) * in_chans


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"There is no weights file {path}.",
            code="weights_not_found",
            param="weights",
            remedy="Give the path of a safetensors file that the workers can read.",
        )
    try:
        return safetensors.torch.load_file(path, backend="pread")  # mapped pages would count beside the copies
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file: {error}.",
            code="weights_not_safetensors",
            param="weights",
            remedy="Convert it with safetensors.torch.save_file; pickled checkpoints (.pt, .bin) are never opened.",
        ) from error


def _fit(tensors: dict[str, Tensor], model: Model, path: Path) -> dict[str, Tensor]:
    """The file's tensors under the model's keys, as floats, resampled to the model's sizes."""
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    tensors = _move_norm(tensors, model)
    if any(tensors[key].shape[:1] != (model.num_classes,) for key in _HEAD_KEYS if key in tensors):
        tensors = {key: value for key, value in tensors.items() if key not in _HEAD_KEYS}
    try:
        return _FITTING[type(model)](tensors, model)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        # Resampling stumbles over tensors that do not belong; the plain comparison names them.
        _check_match(tensors, model.state_dict(), tensors, path)
        raise _mismatch(path, [f"they cannot be fitted to the model ({error})"]) from error


def _move_norm(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Rename the final norm to where the model has it: before the pooling (`norm`) or after (`fc_norm`)."""
    source, target = ("norm.", "fc_norm.") if isinstance(model.norm, nn.Identity) else ("fc_norm.", "norm.")
    if any(key.startswith(target) for key in tensors):
        return tensors
    return {target + key.removeprefix(source) if key.startswith(source) else key: v for key, v in tensors.items()}


def _check_match(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse tensors that are not the model's; the message shows shapes as the file has them, before resampling."""
    missing = [key for key in own if key not in tensors and key not in _HEAD_KEYS]
    unexpected = sorted(key for key in tensors if key not in own)
    wrong = [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
    if missing or unexpected or wrong:
        lines = [f"{key} is {_shape(given.get(key, tensors[key]))}, the model's {_shape(own[key])}" for key in wrong]
        lines += [f"{key} {_shape(own[key])} is missing" for key in missing]
        lines += [f"{key} {_shape(tensors[key])} is not in the model" for key in unexpected]
        raise _mismatch(path, lines)


def _mismatch(path: Path, lines: list[str]) -> UserError:
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return UserError(
        f"The weights {path} do not fit the model: {'; '.join(lines[:5])}{more}.",
        code="weights_mismatch",
        param="weights",
        remedy="Choose the model and model_args that these weights were saved from, with timm's key names.",
    )


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "scalar"
