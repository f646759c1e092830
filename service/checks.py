"""What can be known wrong about a job when it is submitted: its model, the model's arguments, weights and dataset.

No torch: file headers and directory listings only. Every check returns the issues it found, remedies included; a path
outside the roots is not looked at further.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from scheduler.errors import UserError
from service.catalogue import Models
from service.errors import InvalidRequestError, Issue
from workers.contract import DIGITS_MODEL, HUB, JobSpec
from workers.shapes import Entry, resized
from workers.sources.address import check_address, check_inside
from workers.sources.opening import open_source

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def needs_catalogue(spec: JobSpec) -> bool:
    """The bundled model as it is is known without timm, so that the first job need not wait for the catalogue."""
    return spec.model != DIGITS_MODEL or bool(spec.model_args) or spec.img_size is not None


def check_model(name: str, models: Models) -> list[Issue]:
    """The model is one of timm's that can be cut into heads."""
    plain = _plain(name, models)
    entry = models.get(plain)
    if isinstance(entry, str):
        return [Issue("model", f"'{name}' cannot be trained here: {entry.rstrip('.')}.", "model_refused")]
    if entry is not None:
        return []
    trainable = [known for known, sizes in models.items() if not isinstance(sizes, str)]
    near = difflib.get_close_matches(plain, trainable, n=3, cutoff=0.6)
    hint = (
        f"Did you mean {', '.join(near)}?"
        if near
        else "Take a vision transformer's name from timm.list_models('vit_*')."
    )
    return [Issue("model", f"There is no model '{name[:100]}'. {hint}", "unknown_model")]


def check_arguments(spec: JobSpec, models: Models) -> list[Issue]:
    """The model can be built with the job's arguments, as a plan of it would be told; it is one of `models`."""
    return _issues(lambda: resized(sizes_of(spec.model, models), spec.model_args, spec.img_size))


def sizes_of(name: str, models: Models) -> Entry:
    """The sizes of a model. Raises InvalidRequestError where `check_model` finds something wrong."""
    if issues := check_model(name, models):
        raise InvalidRequestError(issues)
    sizes = models[_plain(name, models)]
    assert not isinstance(sizes, str)
    return sizes


def check_paths(spec: JobSpec, roots: Sequence[str | Path]) -> list[Issue]:
    """The weights and the dataset lie under the roots and are what they should be; at the hub's the workers look."""
    is_file = spec.weights is not None and not spec.weights.startswith(HUB)
    issues = [] if not is_file else _issues(lambda: _check_weights(str(spec.weights), roots))
    if spec.dataset != "digits":
        issues += _issues(lambda: _check_dataset(spec.dataset, roots))
    return issues


def _plain(name: str, models: Models) -> str:
    """The name without its pretraining tag: sizes do not depend on that."""
    return name if name in models else name.partition(".")[0]


def _check_dataset(uri: str, roots: Sequence[str | Path]) -> None:
    address = check_address(uri, roots)
    if address.store is None:  # what lies elsewhere is read by the workers alone: they have the credentials
        open_source(address)


def _check_weights(weights: str, roots: Sequence[str | Path]) -> None:
    if not Path(weights).is_absolute():
        raise _bad_weights(f"'{weights}' is not an absolute path.")
    path = check_inside(weights, roots, param="weights")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _check_header(path, file, size)
    except OSError as error:
        raise _bad_weights(f"'{weights}' cannot be read: {error.strerror}.") from error


def _check_header(path: Path, file: BinaryIO, size: int) -> None:
    """A safetensors file: the length of a JSON header in 8 bytes, the header, then as many bytes as it promises."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _not_safetensors(path)
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _not_safetensors(path) from None
    if not ends:
        raise _bad_weights(f"'{path}' holds no tensors.")
    if max(ends) != size - 8 - length:
        raise _bad_weights(f"'{path}' is cut short: its header promises {max(ends)} bytes of tensors.")


def _not_safetensors(path: Path) -> UserError:
    return _bad_weights(f"'{path}' is not a safetensors file.")


def _bad_weights(message: str) -> UserError:
    remedy = "Give the absolute path of a .safetensors file; other formats can be converted with safetensors.torch."
    return UserError(message, code="bad_weights", param="weights", remedy=remedy)


def _issues(check: Callable[[], object]) -> list[Issue]:
    try:
        check()
    except UserError as error:
        text = " ".join(part for part in (error.message, error.remedy) if part)
        return [Issue(error.param or "", text, error.code)]
    return []
