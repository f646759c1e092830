"""Datasets, and fetching ahead."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from scheduler.errors import UserError
from workers import data, digits, images
from workers.contract import Augment, JobSpec
from workers.data import Needs, Prefetcher, imbalance, open_dataset
from workers.model import ModelInput
from workers.order import AugmentKey, MicroBatches

GREY = ModelInput(28, 1, (0.5,), (0.5,), "bicubic")
COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")


def save(
    path: Path, size: tuple[int, int] = (20, 16), colour: tuple[int, ...] = (255, 0, 0), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode != "L" else colour[0]).save(path)


def folder(root: Path, num: int = 20, *, test: bool = True) -> JobSpec:
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        for i in range(num):
            save(root / f"train/{name}/{i:03d}.png", colour=colour)
        if test:
            save(root / f"test/{name}/t.png", colour=colour)
    return JobSpec(dataset=f"folder://{root}")


def every(num: int) -> np.ndarray:
    return np.arange(num)


def test_digits_are_split_800_to_997_without_overlap_and_with_every_class() -> None:
    digits = open_dataset(JobSpec(), GREY)
    assert (digits.num_train, digits.num_test, digits.skipped) == (800, 997, [])
    images, labels = digits.train_batch(every(800))
    assert images.shape == (800, 1, 28, 28) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert min(torch.bincount(labels).tolist()) >= 77
    train_rows, test_rows = set(digits._train.tolist()), set(digits._test.tolist())  # type: ignore[attr-defined]
    assert not train_rows & test_rows
    assert torch.equal(digits.train_labels(every(800)), labels)


def test_digits_do_not_depend_on_the_seed_and_fit_three_channels() -> None:
    one, other = (open_dataset(JobSpec(seed=seed), COLOUR).test_batch(every(5)) for seed in (0, 7))
    assert torch.equal(one.images_BCHW, other.images_BCHW)
    assert one.images_BCHW.shape == (5, 3, 16, 16)


def test_images_per_class_limits_training_alone(tmp_path: Path) -> None:
    digits = open_dataset(JobSpec(images_per_class=3), GREY)
    assert torch.bincount(digits.train_batch(every(30)).labels_B).tolist() == [3] * 10
    assert digits.num_test == 997
    spec = folder(tmp_path).model_copy(update={"images_per_class": 4})
    limited = open_dataset(spec, COLOUR)
    assert (limited.num_train, limited.num_test) == (8, 2)
    assert [file.name for file in limited._train[:4]] == [f"train/blue/{i:03d}.png" for i in range(4)]  # type: ignore[attr-defined]


def test_a_folder_is_decoded_and_normalised(tmp_path: Path) -> None:
    dataset = open_dataset(folder(tmp_path), COLOUR)
    assert dataset.classes == ("blue", "red")
    images, labels = dataset.test_batch(np.array([0, 1]))
    assert labels.tolist() == [0, 1]
    expected = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0 - 0.3) / 0.5])
    torch.testing.assert_close(images[1], expected[:, None, None].expand(3, 16, 16))
    grey = open_dataset(folder(tmp_path), GREY).test_batch(np.array([0]))
    assert grey.images_BCHW.shape == (1, 1, 28, 28)


def test_a_batch_of_nothing_has_the_shape_of_a_batch(tmp_path: Path) -> None:
    """A worker's share of an evaluation may be empty."""
    none = np.array([], dtype=np.int64)
    for dataset, inputs in ((open_dataset(JobSpec(), GREY), GREY), (open_dataset(folder(tmp_path), COLOUR), COLOUR)):
        images, labels = dataset.test_batch(none)
        assert images.shape == (0, inputs.in_chans, inputs.img_size, inputs.img_size)
        assert labels.shape == (0,) and labels.dtype == torch.int64


def test_without_a_test_split_the_same_tenth_of_each_class_is_held_out(tmp_path: Path) -> None:
    spec = folder(tmp_path, test=False)
    dataset = open_dataset(spec, COLOUR)
    assert (dataset.num_train, dataset.num_test) == (36, 4)
    assert dataset.test_batch(every(4)).labels_B.tolist() == [0, 0, 1, 1]
    again = open_dataset(spec.model_copy(update={"seed": 5}), COLOUR)
    assert again._test == dataset._test  # type: ignore[attr-defined]
    assert not set(dataset._test) & set(dataset._train)  # type: ignore[attr-defined]


def test_unreadable_files_are_dropped_and_named(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    (tmp_path / "train/red/zero.jpg").write_bytes(b"")
    (tmp_path / "train/red/text.png").write_text("not an image")
    good = (tmp_path / "train/red/000.png").read_bytes()
    (tmp_path / "train/red/torn.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "test/red/gif.png").write_bytes(b"GIF89a" + bytes(40))
    dataset = open_dataset(spec, COLOUR)
    assert sorted(dataset.skipped) == [
        "test/red/gif.png",
        "train/red/text.png",
        "train/red/torn.png",
        "train/red/zero.jpg",
    ]
    assert (dataset.num_train, dataset.num_test) == (40, 2)
    trusting = open_dataset(spec, COLOUR, skipped=dataset.skipped)
    assert trusting.num_train == 40


def test_too_many_unreadable_files_refuse_the_dataset(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    for i in range(11):
        (tmp_path / f"train/red/bad{i:02d}.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        open_dataset(spec, COLOUR)
    assert caught.value.code == "unreadable_images"
    assert "11 of 53" in caught.value.message and "bad00.jpg" in caught.value.message


def test_a_class_whose_images_are_all_unreadable_refuses_the_dataset(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    (tmp_path / "train/grey").mkdir()
    (tmp_path / "train/grey/only.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        open_dataset(spec, COLOUR)
    assert caught.value.code == "empty_class" and "'grey'" in caught.value.message


def test_a_dataset_without_any_image_for_testing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(folder(tmp_path, num=1, test=False), COLOUR)
    assert caught.value.code == "empty_test"


def test_a_pipe_and_a_folder_with_an_image_name_are_dropped_not_waited_for(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    os.mkfifo(tmp_path / "train/red/pipe.jpg")
    (tmp_path / "train/red/folder.jpg").mkdir()
    assert sorted(open_dataset(spec, COLOUR).skipped) == ["train/red/folder.jpg", "train/red/pipe.jpg"]


def test_a_file_swapped_for_a_link_that_leads_out_is_not_opened(tmp_path: Path) -> None:
    spec = folder(tmp_path / "set")
    dataset = open_dataset(spec, COLOUR)
    save(tmp_path / "secret.png")
    (tmp_path / "set/train/blue/000.png").unlink()
    (tmp_path / "set/train/blue/000.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="outside"):
        dataset.train_batch(np.array([0]))


def test_an_image_with_too_many_pixels_is_dropped_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = folder(tmp_path)
    save(tmp_path / "train/red/huge.png", size=(6000, 5000), mode="L")
    loaded: list[tuple[int, int]] = []
    load = Image.Image.load
    monkeypatch.setattr(images.Image.Image, "load", lambda self: (loaded.append(self.size), load(self))[1])
    assert open_dataset(spec, COLOUR).skipped == ["train/red/huge.png"]
    assert (6000, 5000) not in loaded


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "I;16"])
def test_every_common_pixel_format_is_read(tmp_path: Path, mode: str) -> None:
    spec = folder(tmp_path, num=2)
    image = Image.new("RGBA", (9, 30), (200, 10, 10, 128))
    converted = Image.new("I;16", (9, 30), 7) if mode == "I;16" else image.convert(mode)
    options = {"transparency": b"\x00\x80"} if mode == "P" else {}
    path = tmp_path / "test/red/t.png"
    (converted.convert("P") if mode == "PA" else converted).save(path, **options)
    dataset = open_dataset(spec, COLOUR)
    assert dataset.skipped == []
    assert torch.isfinite(dataset.test_batch(every(2)).images_BCHW).all()


@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("size", [(57, 40), (40, 57), (33, 33), (9, 30)])
def test_an_image_is_what_timm_would_show_the_model(tmp_path: Path, size: tuple[int, int], crop_pct: float) -> None:
    spec = folder(tmp_path, num=2)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    image.save(tmp_path / "test/red/t.png")
    config = {"input_size": (3, 16, 16), "crop_pct": crop_pct, "interpolation": "bicubic"}
    transform = timm.data.create_transform(**config, mean=COLOUR.mean, std=COLOUR.std)
    images = open_dataset(spec, COLOUR._replace(crop_pct=crop_pct)).test_batch(np.array([1])).images_BCHW
    # timm rounds to whole pixels, we do not: a fraction of a pixel at the edges.
    assert (images[0] - transform(image)).abs().mean() < (0.05 if crop_pct == 1 else 0.12)


def test_a_long_strip_does_not_grow_without_bound(tmp_path: Path) -> None:
    spec = folder(tmp_path, num=2)
    save(tmp_path / "test/red/t.png", size=(5_000_000, 1))
    assert open_dataset(spec, COLOUR).test_batch(np.array([1])).images_BCHW.shape == (1, 3, 16, 16)


def test_mirroring_is_decided_by_the_key_alone(tmp_path: Path) -> None:
    spec = folder(tmp_path, num=40)
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 8, 16))
    for path in tmp_path.glob("train/*/*.png"):
        half.save(path)
    dataset = open_dataset(spec.model_copy(update={"augment": Augment(flip=True)}), COLOUR)
    plain = dataset.train_batch(every(80)).images_BCHW
    first = dataset.train_batch(every(80), (1, 2, 3)).images_BCHW
    assert torch.equal(first, dataset.train_batch(every(80), (1, 2, 3)).images_BCHW)
    assert not torch.equal(first, dataset.train_batch(every(80), (1, 2, 4)).images_BCHW)
    mirrored = (first != plain).flatten(1).any(1)
    assert torch.equal(first[mirrored], plain[mirrored].flip(3))
    assert 20 < mirrored.sum() < 60


def test_uneven_classes_are_told_with_their_counts(tmp_path: Path) -> None:
    spec = folder(tmp_path, num=4)
    assert imbalance(open_dataset(spec, COLOUR)) is None and imbalance(open_dataset(JobSpec(), GREY)) is None
    for i in range(10):
        save(tmp_path / f"train/red/more{i}.png")
    told = imbalance(open_dataset(spec, COLOUR))
    assert told == {"ratio": 3.5, "largest": "red", "smallest": "blue", "counts": {"blue": 4, "red": 14}}


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=40))
def test_the_ratio_is_of_the_largest_to_the_smallest_class(counts: list[int]) -> None:
    dataset = Counting()
    dataset.classes = tuple(f"c{k:02d}" for k in range(len(counts)))  # type: ignore[assignment]
    dataset.num_train = sum(counts)
    labels = np.repeat(np.arange(len(counts)), counts)
    dataset.train_labels = lambda indices, augment_key=None: torch.from_numpy(labels[indices])  # type: ignore[method-assign]
    told = imbalance(dataset)
    assert (told is None) == (max(counts) < 3 * min(counts))
    if told is not None:
        assert told["ratio"] == round(max(counts) / min(counts), 2)
        assert all(counts[int(name[1:])] == count for name, count in told["counts"].items())
        assert len(told["counts"]) == min(20, len(counts))


def test_a_model_of_two_channels_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(JobSpec(), GREY._replace(in_chans=2))
    assert caught.value.code == "unsupported_channels"


class Counting:
    """A dataset whose images hold their own index; it records what was decoded and in which thread."""

    classes, num_train, num_test, skipped = ("a",), 40, 0, list[str]()

    def __init__(self) -> None:
        self.decoded: list[tuple[int, str]] = []
        self.keys: list[AugmentKey | None] = []

    def train_batch(self, indices: np.ndarray, augment_key: AugmentKey | None = None) -> data.Batch:
        self.decoded.append((int(indices[0]), threading.current_thread().name))
        self.keys.append(augment_key)
        return data.Batch(torch.from_numpy(indices).float()[:, None, None, None], torch.from_numpy(indices))

    def train_labels(self, indices: np.ndarray, augment_key: AugmentKey | None = None) -> torch.Tensor:
        return torch.from_numpy(indices)

    test_batch = train_batch


ORDER_OF_40 = MicroBatches(40, 4, 5, seed=0)


def test_only_what_is_needed_is_decoded_and_the_next_step_ahead() -> None:
    dataset = Counting()
    needs = Needs(frozenset({1, 3}), frozenset({0}))
    with Prefetcher(dataset, ORDER_OF_40, lambda step: needs if step < 4 else None) as prefetcher:
        for step in range(4):
            got = prefetcher.get(step)
            assert sorted(got.images) == [1, 3] and sorted(got.labels) == [0]
            for m, images in got.images.items():
                assert images.flatten().tolist() == ORDER_OF_40.indices(step)[m].tolist()
    assert len(dataset.decoded) == 8
    assert [name.startswith("prefetch") for _, name in dataset.decoded] == [False] * 2 + [True] * 6
    assert set(dataset.keys) == {None}


def test_a_plan_that_changed_after_fetching_is_served_in_full() -> None:
    asked: list[int] = []

    def needs(step: int) -> Needs:
        asked.append(step)
        return Needs(frozenset({0}), frozenset()) if len(asked) <= 2 else Needs(frozenset({0, 2}), frozenset({2}))

    dataset = Counting()
    with Prefetcher(dataset, ORDER_OF_40, needs, augment=True) as prefetcher:
        prefetcher.get(0)
        got = prefetcher.get(1)
        assert sorted(got.images) == [0, 2] and sorted(got.labels) == [2]
        assert sorted(prefetcher.get(5).images) == [0, 2]
    assert ORDER_OF_40.augment_key(1, 2) in dataset.keys


def test_an_error_in_the_thread_is_raised_to_the_caller_and_closing_ends_the_thread(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    dataset = open_dataset(spec, COLOUR)
    order = MicroBatches(dataset.num_train, 4, 2, seed=0)
    needs = Needs(frozenset({0}), frozenset())
    with Prefetcher(dataset, order, lambda step: needs if step != 1 or gone else None) as prefetcher:
        gone: list[bool] = []
        prefetcher.get(0)
        gone.append(True)
        for path in tmp_path.glob("train/*/*.png"):
            path.unlink()
        with pytest.raises(UserError) as caught:
            prefetcher.get(1)
        assert caught.value.code == "unreadable_images"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_digits_and_their_split_are_those_of_scikit_learn():
    known = load_digits()
    pixels_BHW, labels_B = digits.load_digits()
    assert np.array_equal(pixels_BHW, known.images) and np.array_equal(labels_B, known.target)
    places = np.arange(len(labels_B))
    drawn = train_test_split(places, train_size=800, stratify=labels_B, random_state=0)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(digits.split_digits(1797), drawn, strict=True))
