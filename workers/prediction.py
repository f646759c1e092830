"""A result tried on images: loaded from its folder as it was exported, fed as training fed it.

Axes: C channels, H W pixels, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from scheduler.errors import UserError
from workers.anatomy import Model
from workers.artifact import CONFIG_FILE, WEIGHTS_FILE
from workers.images import centre, decode, fill_square
from workers.model import load_weights


class Predictor:
    """The model of a result folder. Raises UserError "bad_result" for a folder that holds none of ours."""

    def __init__(self, directory: Path) -> None:
        self._model, config = load_model(directory)
        with _readable():
            self.labels = [_shown(label) for label in config["label_names"]]
            told = config["pretrained_cfg"]
            self._channels, self._size, _ = told["input_size"]
            self._interpolation, self._crop_pct = told["interpolation"], float(told["crop_pct"])
            self._mean_C11, self._std_C11 = (torch.tensor(told[key])[:, None, None] for key in ("mean", "std"))

    @torch.inference_mode()
    def top(self, content: bytes, count: int) -> list[dict[str, Any]]:
        """The most probable classes of an image file, best first: {"index", "label", "probability"} each.

        Raises whatever Pillow does with a file that is no image.
        """
        image = decode(content, "L" if self._channels == 1 else "RGB")
        square = fill_square(image, centre(image.size, self._crop_pct), self._size, self._interpolation)
        pixels_HWC = np.array(square, dtype=np.uint8).reshape(self._size, self._size, self._channels)
        image_CHW = (torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() / 255 - self._mean_C11) / self._std_C11
        probabilities_K = self._model(image_CHW[None]).softmax(1)[0]
        best = probabilities_K.topk(min(count, len(self.labels)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"index": index, "label": self.labels[index], "probability": value} for index, value in found]


def load_model(directory: Path) -> tuple[Model, dict[str, Any]]:
    """(the model of a result, to be asked, its config). Raises UserError "bad_result" and those of `load_weights`."""
    with _readable():
        config = json.loads((directory / CONFIG_FILE).read_text())
        model = _build(config)
    load_weights(model, directory / WEIGHTS_FILE)
    return model.eval(), config


def _shown(label: str) -> str:
    """A class name as Unicode: a byte of a folder's name that is none becomes a question mark in a diamond."""
    return label.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def weights_bytes(directory: Path) -> int:
    """The size of a result's weights. Raises UserError "bad_result"."""
    with _readable():
        return (directory / WEIGHTS_FILE).stat().st_size


@contextmanager
def _readable() -> Iterator[None]:
    """What goes wrong in here is the result's fault."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"The result cannot be read: {error}.", code="bad_result") from error


def _build(config: dict[str, Any]) -> Model:
    name = config["architecture"]
    if not timm.is_model(name):  # timm would take some names for addresses
        raise ValueError(f"there is no model '{name}'")
    model = timm.create_model(name, pretrained=False, num_classes=config["num_classes"], **config["model_args"])
    assert isinstance(model, Model)
    return model
