"""Data: a job's dataset as batches of tensors, and the next step's fetched while this one computes.

The test split does not depend on the job's seed, so that the accuracies of jobs compare.

Axes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scheduler.errors import UserError
from workers.augment import Augmentation
from workers.contract import Augment, JobSpec
from workers.digits import load_digits, split_digits
from workers.images import centre, fill_square, find_unreadable, read_image
from workers.model import ModelInput
from workers.order import AugmentKey, IndexArray, permutation
from workers.sources.address import parse_address
from workers.sources.opening import open_source
from workers.sources.source import Source

SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.1
UNEVEN = 3  # from how many times as many images in the largest class as in the smallest it is worth a warning


class Batch(NamedTuple):
    """Normalised float32 images [B, C, H, W]; labels are int64 classes [B], or float32 [B, K] where mixed."""

    images_BCHW: Tensor
    labels_B: Tensor


class Dataset(Protocol):
    """Labelled images by index, in a training and a test split.

    `skipped` names the files that were dropped because they cannot be decoded.
    """

    classes: tuple[str, ...]
    num_train: int
    num_test: int
    skipped: list[str]

    def train_batch(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Batch:
        """Images and labels of training images; augmented where a key is given and the kind of data allows it."""

    def train_labels(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Tensor:
        """The labels alone, without decoding."""

    def test_batch(self, indices: IndexArray) -> Batch:
        """Images and labels of test images."""


def open_dataset(
    spec: JobSpec,
    model_input: ModelInput,
    *,
    skipped: Sequence[str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Dataset:
    """Open the spec's dataset for a model's input.

    All images are decoded once, to find the bad ones; with `skipped`, the names another worker found, they
    are taken on trust instead, and all workers count alike. `progress` is called now and then, since that takes
    minutes where there is much. Raises UserError (dataset): those of
    `open_source`, and "unreadable_images"; (model_args) "unsupported_channels".
    """
    if model_input.in_chans not in (1, 3):
        raise UserError(
            f"Images have 1 or 3 channels, the model wants {model_input.in_chans}.",
            code="unsupported_channels",
            param="model_args",
            remedy="Set in_chans to 1 or 3.",
        )
    if spec.dataset == "digits":
        return DigitsDataset(model_input, spec.images_per_class)
    source = open_source(parse_address(spec.dataset), progress)
    train, test = split(source, spec.images_per_class)
    if skipped is None:
        skipped = find_unreadable(source.read, [file.name for file in (*train, *test)], progress)
    return SourceDataset(source, model_input, train, test, skipped, spec.augment)


def imbalance(dataset: Dataset) -> dict[str, Any] | None:
    """How uneven the classes are in training, for the event `data.imbalanced`; None where it is not worth telling."""
    labels_B = dataset.train_labels(np.arange(dataset.num_train))
    counts = torch.bincount(labels_B, minlength=len(dataset.classes)).tolist()
    by_count = sorted(zip(counts, dataset.classes, strict=True))
    smallest, largest = by_count[0], by_count[-1]
    if largest[0] < UNEVEN * smallest[0]:
        return None
    return {
        "ratio": round(largest[0] / max(smallest[0], 1), 2),
        "largest": largest[1],
        "smallest": smallest[1],
        "counts": {name: count for count, name in (*by_count[:10], *by_count[10:][-10:])},
    }


class DigitsDataset:
    """scikit-learn's 1,797 hand-written digits of 8 × 8 pixels, 800 for training and 997 for testing."""

    def __init__(self, model_input: ModelInput, images_per_class: int | None = None) -> None:
        pixels_BHW, labels_B = load_digits()
        train, test = split_digits(len(labels_B))
        if images_per_class is not None:
            train = np.sort(np.concatenate([train[labels_B[train] == k][:images_per_class] for k in range(10)]))
        self.classes = tuple(str(k) for k in range(10))
        self.num_train, self.num_test = len(train), len(test)
        self.skipped: list[str] = []
        self._input = model_input
        self._images_BCHW = torch.from_numpy(pixels_BHW / 16).float()[:, None]
        self._labels_B = torch.from_numpy(labels_B)
        self._train, self._test = torch.from_numpy(train), torch.from_numpy(test)

    def train_batch(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Batch:
        """Never augmented: a turned or mirrored digit is another digit."""
        return self._batch(self._train[indices])

    def train_labels(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Tensor:
        return self._labels_B[self._train[indices]]

    def test_batch(self, indices: IndexArray) -> Batch:
        return self._batch(self._test[indices])

    def _batch(self, rows: Tensor) -> Batch:
        size = (self._input.img_size, self._input.img_size)
        resized_BCHW = F.interpolate(self._images_BCHW[rows], size=size, mode="bicubic", align_corners=False)
        images_BCHW = resized_BCHW.clamp(0, 1).expand(-1, self._input.in_chans, -1, -1)
        return Batch(_normalise(images_BCHW, self._input), self._labels_B[rows])


class SourceDataset:
    """Images of a source, but for those that are `skipped`."""

    def __init__(
        self,
        source: Source,
        model_input: ModelInput,
        train: Sequence[File],
        test: Sequence[File],
        skipped: Sequence[str],
        augment: Augment,
    ) -> None:
        self.classes, self.skipped = source.classes, list(skipped)
        dropped = set(skipped)
        self._read, self._input = source.read, model_input
        self._augmentation = Augmentation(augment, model_input.img_size, model_input.in_chans)
        self._train = [file for file in train if file.name not in dropped]
        self._test = [file for file in test if file.name not in dropped]
        self.num_train, self.num_test = len(self._train), len(self._test)
        _check_left(source, self._train, self._test, self.skipped)

    def train_batch(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Batch:
        """With a key the images are changed as the job's `augment` says; the key alone decides how."""
        files = [self._train[index] for index in indices]
        images_BCHW = self._images(files, augment_key)
        if augment_key is not None:
            images_BCHW = self._augmentation.finish(images_BCHW, augment_key)
        return Batch(images_BCHW, self.train_labels(indices, augment_key))

    def train_labels(self, indices: IndexArray, augment_key: AugmentKey | None = None) -> Tensor:
        labels_B = _labels([self._train[index] for index in indices])
        if augment_key is None:
            return labels_B
        return self._augmentation.soften(labels_B, len(self.classes), augment_key)

    def test_batch(self, indices: IndexArray) -> Batch:
        files = [self._test[index] for index in indices]
        return Batch(self._images(files), _labels(files))

    def _images(self, files: list[File], augment_key: AugmentKey | None = None) -> Tensor:
        size, channels, interpolation = self._input.img_size, self._input.in_chans, self._input.interpolation
        pixels_BHWC = np.empty((len(files), size, size, channels), dtype=np.uint8)
        for place, file in enumerate(files):
            image = read_image(self._read, file.name, channels)
            box = None if augment_key is None else self._augmentation.box(image.size, augment_key, place)
            square = fill_square(image, box or centre(image.size, self._input.crop_pct), size, interpolation)
            if augment_key is not None:
                square = self._augmentation.distort(square, augment_key, place)
            pixels_BHWC[place] = np.asarray(square, dtype=np.uint8).reshape(size, size, channels)
        return _normalise(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255, self._input)


class File(NamedTuple):
    """An image by its name in the source, and its class by number."""

    name: str
    label: int


class Order(Protocol):
    """Which images a step reads."""

    def indices(self, step: int) -> list[IndexArray]:
        """M arrays of training indices."""

    def augment_key(self, step: int, micro_batch: int) -> AugmentKey:
        """What decides the augmentation of one micro-batch."""


class Needs(NamedTuple):
    """The micro-batches of a step whose images and whose labels a worker wants."""

    images: frozenset[int]
    labels: frozenset[int]


@dataclass(frozen=True)
class StepData:
    """What a worker asked for, by micro-batch: images [B, C, H, W] and labels, as in `Batch`."""

    images: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, Tensor] = field(default_factory=dict)


class Prefetcher:
    """Decodes the next step in one background thread while this one computes.

    `needs(step)` is asked on the caller's thread, for the step at hand and for the next; None means that the next step
    is not planned yet, and nothing is fetched ahead. What a changed plan needs beyond what was fetched is decoded on
    the spot.
    """

    def __init__(
        self, dataset: Dataset, order: Order, needs: Callable[[int], Needs | None], *, augment: bool = False
    ) -> None:
        self._dataset, self._order, self._needs, self._augment = dataset, order, needs, augment
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[StepData]] | None = None

    def get(self, step: int) -> StepData:
        """The data of `step`; starts fetching `step + 1`. Errors of the background thread are raised here."""
        needs = self._needs(step) or Needs(frozenset(), frozenset())
        fetched = self._take(step)
        missing = Needs(needs.images - fetched.images.keys(), needs.labels - fetched.labels.keys())
        rest = self._load(step, self._order.indices(step), missing)
        following = self._needs(step + 1)
        if following is not None:
            # The order may change with every step, so it is asked for here and not when the thread gets to it.
            indices = self._order.indices(step + 1)
            self._ahead = step + 1, self._thread.submit(self._load, step + 1, indices, following)
        return StepData({**fetched.images, **rest.images}, {**fetched.labels, **rest.labels})

    def close(self) -> None:
        """Wait for the thread to end; what it fetched is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, step: int) -> StepData:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return StepData()
        fetched_step, future = ahead
        return future.result() if fetched_step == step else StepData()

    def _load(self, step: int, indices: Sequence[IndexArray], needs: Needs) -> StepData:
        data = StepData()
        for m in sorted(needs.images):
            key = self._order.augment_key(step, m) if self._augment else None
            data.images[m] = self._dataset.train_batch(indices[m], key).images_BCHW
        for m in sorted(needs.labels):
            key = self._order.augment_key(step, m) if self._augment else None
            data.labels[m] = self._dataset.train_labels(indices[m], key)
        return data


def _labels(files: list[File]) -> Tensor:
    return torch.tensor([file.label for file in files], dtype=torch.int64)


def _normalise(images_BCHW: Tensor, model_input: ModelInput) -> Tensor:
    mean_C11 = torch.tensor(model_input.mean)[:, None, None]
    std_C11 = torch.tensor(model_input.std)[:, None, None]
    return (images_BCHW - mean_C11) / std_C11


def split(source: Source, images_per_class: int | None = None) -> tuple[list[File], list[File]]:
    """Training and test images, class by class; the limit holds for training alone.

    Where the source has no split for testing, a tenth of each class is held out.
    """
    train: list[File] = []
    test: list[File] = []
    for label, name in enumerate(source.classes):
        files = [File(file, label) for file in source.train_files[name]]
        held_out = _held_out(len(files), label) if source.test_files is None else frozenset()
        test += [File(file, label) for file in (source.test_files or {}).get(name, ())]
        test += [files[index] for index in sorted(held_out)]
        train += [file for index, file in enumerate(files) if index not in held_out][:images_per_class]
    return train, test


def _held_out(num: int, label: int) -> frozenset[int]:
    """A tenth of a class, at least one image, but never its only one."""
    count = max(1, round(HELD_OUT_FRACTION * num)) if num > 1 else 0
    return frozenset(permutation(num, SPLIT_SEED, label)[:count].tolist())


def _check_left(source: Source, train: list[File], test: list[File], skipped: list[str]) -> None:
    labels = {file.label for file in train}
    lost = [name for label, name in enumerate(source.classes) if label not in labels]
    if lost:
        raise UserError(
            f"No readable training image is left in the class '{lost[0]}'; unreadable: {', '.join(skipped[:3])}.",
            code="empty_class",
            param="dataset",
            remedy="Replace the unreadable files or remove the class.",
        )
    if not test:
        raise UserError(
            f"No image of {source.origin} is left for testing.",
            code="empty_test",
            param="dataset",
            remedy="Give readable images for testing, or at least two training images in some class.",
        )
