"""Augmentation: training images changed at random, where every draw is a pure function of (seed, epoch, position).

So workers agree on what a micro-batch looks like without a word, and a resumed run sees the images that it would have
seen. Draws come from numpy's `RandomState`, whose numbers stay the same in every version.

    crop          a part of the image, its size and shape drawn, fills the model's square (RandomResizedCrop)
    randaugment   timm's, on a private copy of its module: the original draws from the process's generators
    flip          mirrored or not
    erasing       a rectangle is put to the mean
    mixup, cutmix each image is mixed with its mirror place in the micro-batch, wholly or in a rectangle; labels follow

Axes: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import importlib.util
import math
import random
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from workers.contract import Augment
from workers.images import Box
from workers.order import AugmentKey

RATIO = (3 / 4, 4 / 3)  # of width to height of a crop
ERASED, ERASED_RATIO = (0.02, 1 / 3), (0.3, 3.3)  # share and shape of an erased rectangle, as in timm
TRIES = 10
_CROP, _DISTORT, _ERASE, _MIX = range(4)  # each kind of draw has its own stream


class Mix(NamedTuple):
    """How a micro-batch is mixed: `kept` of each image stays; with cutmix outside `hole` (top, left, bottom, right)."""

    kept: float
    hole: tuple[int, int, int, int] | None


class Augmentation:
    """What a job's `augment` does to the images of one model. For several threads."""

    def __init__(self, asked: Augment, img_size: int, in_chans: int) -> None:
        self.asked, self.img_size = asked, img_size
        self._distort = RandAugment(asked.randaugment, in_chans) if asked.randaugment else None

    def box(self, size: tuple[int, int], key: AugmentKey, place: int) -> Box | None:
        """The part of an image of `size` (width, height) that is shown; None means the model's own framing."""
        if self.asked.crop_scale is None:
            return None
        width, height = size
        draws = _draws(key, _CROP, place)
        for _ in range(TRIES):
            area = width * height * draws.uniform(*self.asked.crop_scale)
            ratio = math.exp(draws.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if wide <= width and high <= height:
                left, top = draws.uniform(0, width - wide), draws.uniform(0, height - high)
                return left, top, left + wide, top + high
        return None

    def distort(self, image: Image.Image, key: AugmentKey, place: int) -> Image.Image:
        """The square image after timm's RandAugment."""
        return image if self._distort is None else self._distort(image, _draws(key, _DISTORT, place))

    def finish(self, images_BCHW: Tensor, key: AugmentKey) -> Tensor:
        """Normalised images mirrored, erased and mixed."""
        if self.asked.flip:
            images_BCHW = _mirrored(images_BCHW, key)
        if self.asked.erasing:
            images_BCHW = images_BCHW.clone()
            for place, image_CHW in enumerate(images_BCHW):
                self._erase(image_CHW, _draws(key, _ERASE, place))
        mix = self.mix(key)
        if mix is None:
            return images_BCHW
        others_BCHW = images_BCHW.flip(0)
        if mix.hole is None:
            return images_BCHW * mix.kept + others_BCHW * (1 - mix.kept)
        top, left, bottom, right = mix.hole
        mixed_BCHW = images_BCHW.clone()
        mixed_BCHW[:, :, top:bottom, left:right] = others_BCHW[:, :, top:bottom, left:right]
        return mixed_BCHW

    def soften(self, labels_B: Tensor, num_classes: int, key: AugmentKey) -> Tensor:
        """Labels as they are, or [B, K] probabilities in float32 where images are mixed."""
        mix = self.mix(key)
        if mix is None:
            return labels_B
        sure_BK = F.one_hot(labels_B, num_classes).float()
        return sure_BK * mix.kept + sure_BK.flip(0) * (1 - mix.kept)

    def mix(self, key: AugmentKey) -> Mix | None:
        """With both asked for, a coin decides which it is."""
        mixup, cutmix = self.asked.mixup, self.asked.cutmix
        if not mixup and not cutmix:
            return None
        draws = _draws(key, _MIX, 0)
        cuts = bool(cutmix) and (not mixup or draws.uniform() < 0.5)
        alpha = cutmix if cuts else mixup
        kept = float(draws.beta(alpha, alpha))
        if not cuts:
            return Mix(kept, None)
        side = self.img_size * math.sqrt(1 - kept)
        middle = draws.uniform(0, self.img_size, 2)
        low, high = (np.clip(middle + half, 0, self.img_size).astype(int).tolist() for half in (-side / 2, side / 2))
        hole = (low[0], low[1], high[0], high[1])
        return Mix(1 - (hole[2] - hole[0]) * (hole[3] - hole[1]) / self.img_size**2, hole)

    def _erase(self, image_CHW: Tensor, draws: np.random.RandomState) -> None:
        if draws.uniform() >= self.asked.erasing:
            return
        height, width = image_CHW.shape[1:]
        for _ in range(TRIES):
            area = height * width * draws.uniform(*ERASED)
            ratio = math.exp(draws.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
            high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if high < height and wide < width:
                top, left = draws.randint(0, height - high + 1), draws.randint(0, width - wide + 1)
                image_CHW[:, top : top + high, left : left + wide] = 0
                return


class RandAugment:
    """timm's RandAugment by its own words ("rand-m9-mstd0.5"), with a generator of its own."""

    def __init__(self, words: str, in_chans: int) -> None:
        self._lock = threading.Lock()
        self._module: Any = _private_copy("timm.data.auto_augment")
        grey = 128 if in_chans == 1 else (128, 128, 128)
        self._change: Callable[[Image.Image], Image.Image] = self._module.rand_augment_transform(
            words, {"img_mean": grey}
        )

    def __call__(self, image: Image.Image, draws: np.random.RandomState) -> Image.Image:
        with self._lock:
            self._module.random = random.Random(int(draws.randint(2**31)))
            self._module.np = _Numpy(draws)
            return self._change(image)


class _Numpy:
    """numpy, but for its generator."""

    def __init__(self, draws: np.random.RandomState) -> None:
        self.random = draws

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _private_copy(name: str) -> ModuleType:
    """A module loaded once more, for its globals to be changed without harm to others."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _draws(key: AugmentKey, kind: int, place: int) -> np.random.RandomState:
    """The generator of one image's draws of one kind."""
    seed, epoch, position = key
    return np.random.RandomState([seed, epoch, position, kind, place])


def _mirrored(images_BCHW: Tensor, key: AugmentKey) -> Tensor:
    seed, epoch, position = key
    coins_B = np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, position]).random_raw(len(images_BCHW)) & 1
    mirrored_B111 = torch.from_numpy(coins_B.astype(bool))[:, None, None, None]
    return torch.where(mirrored_B111, images_BCHW.flip(3), images_BCHW)
