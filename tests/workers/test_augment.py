"""Random changes of training images: the key alone decides them, and labels follow the images."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from scheduler.domain import Op, Placement, uniform_ops
from tests.workers.engine import costs_for, gathered_gradients, images_and_labels, run_step, tiny_vit
from tests.workers.judge import masked_loss
from tests.workers.test_session import run_job
from workers.augment import Augmentation, RandAugment
from workers.contract import RANDAUGMENT, Augment, JobSpec
from workers.data import open_dataset
from workers.model import ModelInput
from workers.partition import model_shape

COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")
ALL = Augment(
    flip=True, crop_scale=(0.2, 1.0), randaugment="rand-m9-n2-mstd0.5-inc1", erasing=0.5, mixup=0.8, cutmix=1.0
)
KEYS = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10_000), st.integers(0, 10**6))
ALPHAS = st.just(0.0) | st.floats(0.01, 4)
NOISE = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noisy")
    for n, pixels in enumerate(NOISE):
        path = root / f"train/{'cat' if n % 2 else 'dog'}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def data_of(root: Path, augment: Augment, inputs: ModelInput = COLOUR) -> Any:
    return open_dataset(JobSpec(dataset=f"folder://{root}", augment=augment), inputs, skipped=())


@pytest.mark.parametrize("inputs", [COLOUR, ModelInput(16, 1, (0.5,), (0.5,), "bicubic")], ids=["colour", "grey"])
def test_two_workers_and_a_resumed_run_see_the_same_images_whatever_else_draws(noisy: Path, inputs: ModelInput) -> None:
    one, other = data_of(noisy, ALL, inputs), data_of(noisy, ALL, inputs)
    places = np.arange(one.num_train)
    keys = [(3, epoch, position) for epoch in range(2) for position in range(6)]
    random.seed(1)
    expected = [one.train_batch(places, key) for key in keys]
    for global_seed in (1, 2):
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda key: other.train_batch(places, key), reversed(keys)))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
        for left, right in zip(expected, reversed(found), strict=True):
            assert torch.equal(left.images_BCHW, right.images_BCHW) and torch.equal(left.labels_B, right.labels_B)
    assert len({float(batch.images_BCHW.sum()) for batch in expected}) == len(keys)


def test_labels_alone_are_those_that_come_with_the_images(noisy: Path) -> None:
    data = data_of(noisy, ALL)
    for position in range(20):
        labels_BK = data.train_labels(np.array([0, 3, 5]), (1, 0, position))
        assert torch.equal(labels_BK, data.train_batch(np.array([0, 3, 5]), (1, 0, position)).labels_B)
        assert labels_BK.shape == (3, 2) and labels_BK.dtype == torch.float32
        torch.testing.assert_close(labels_BK.sum(1), torch.ones(3))
    assert data.train_labels(np.array([0, 3]), None).tolist() == [0, 1]


def test_without_a_key_and_in_tests_nothing_is_changed(noisy: Path) -> None:
    changed, plain = data_of(noisy, ALL), data_of(noisy, Augment())
    assert torch.equal(changed.train_batch(np.arange(4)).images_BCHW, plain.train_batch(np.arange(4)).images_BCHW)
    assert torch.equal(changed.test_batch(np.arange(2)).images_BCHW, plain.test_batch(np.arange(2)).images_BCHW)
    assert torch.equal(plain.train_batch(np.arange(4)).images_BCHW, plain.train_batch(np.arange(4), (1, 2, 3))[0])


@settings(max_examples=200, deadline=None)
@given(
    key=KEYS,
    place=st.integers(0, 4095),
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
)
def test_a_crop_lies_in_the_image_and_has_the_share_and_shape_asked_for(
    key: tuple[int, int, int], place: int, size: tuple[int, int], scale: list[float]
) -> None:
    box = Augmentation(Augment(crop_scale=(scale[0], scale[1])), 16, 3).box(size, key, place)
    if box is None:  # no such shape fits a strip
        return
    left, top, right, bottom = box
    assert left >= 0 and top >= 0 and right <= size[0] * (1 + 1e-9) and bottom <= size[1] * (1 + 1e-9)
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    assert scale[0] * (1 - 1e-6) <= share <= scale[1] * (1 + 1e-6)
    assert 0.74 < (right - left) / (bottom - top) < 1.34


@settings(max_examples=100, deadline=None)
@given(key=KEYS, mixup=ALPHAS, cutmix=ALPHAS, num=st.integers(1, 6))
def test_images_and_labels_are_mixed_by_the_same_share(
    key: tuple[int, int, int], mixup: float, cutmix: float, num: int
) -> None:
    changes = Augmentation(Augment(mixup=mixup, cutmix=cutmix), 12, 1)
    values_B = torch.arange(num).float()
    mixed_BCHW = changes.finish(values_B[:, None, None, None].expand(-1, 1, 12, 12).clone(), key)
    labels = changes.soften(torch.arange(num), num, key)
    if changes.mix(key) is None:
        assert not mixup and not cutmix and labels.tolist() == list(range(num))
        return
    # An image's mean is the mean of the classes that it is made of.
    torch.testing.assert_close(mixed_BCHW.mean((1, 2, 3)), labels @ values_B, atol=1e-5, rtol=1e-5)
    assert (labels >= 0).all()


def test_erasing_blanks_a_rectangle_of_as_many_images_as_asked_for() -> None:
    changes = Augmentation(Augment(erasing=0.25), 32, 3)
    batches = [changes.finish(torch.ones(16, 3, 32, 32), (0, 0, position)) for position in range(30)]
    blank_B = (torch.cat(batches) == 0).all(1).float().mean((1, 2))
    assert 0.18 < (blank_B > 0).float().mean() < 0.32
    assert blank_B[blank_B > 0].min() > 0.01 and blank_B.max() < 0.36


@settings(max_examples=60, deadline=None)
@given(words=st.from_regex(RANDAUGMENT, fullmatch=True), grey=st.booleans())
def test_whatever_passes_the_check_is_understood_by_timm(words: str, grey: bool) -> None:
    image = Image.fromarray(NOISE[0]).convert("L" if grey else "RGB")
    out = RandAugment(words, 1 if grey else 3)(image, np.random.RandomState(0))
    assert out.size == image.size and out.mode == image.mode


@pytest.mark.parametrize(
    ("given_words", "said"),
    [
        ({"randaugment": "augmix-m3"}, "randaugment"),
        ({"randaugment": "rand-m9-x1"}, "randaugment"),
        ({"crop_scale": [0.9, 0.1]}, "smallest"),
        ({"crop_scale": [0, 0.5]}, "crop_scale"),
        ({"mixup": -1}, "mixup"),
        ({"cutmix": 1e-9}, "cutmix"),
        ({"erasing": 1.5}, "erasing"),
        ({"blur": 1}, "blur"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_field(given_words: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"dataset": "folder:///x", "augment": given_words})
    assert said in str(caught.value)


def test_digits_are_not_augmented() -> None:
    with pytest.raises(ValidationError, match="leave it away"):
        JobSpec(augment=Augment(flip=True))


def test_mixed_labels_train_as_in_plain_timm() -> None:
    model = tiny_vit()
    hard = images_and_labels(model, 2, 4)
    soft = [(x, torch.softmax(torch.randn(4, 5, generator=torch.Generator().manual_seed(m)), 1))
            for m, (x, _) in enumerate(hard)]  # fmt: skip
    placement = Placement.make([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], 2)
    ops = uniform_ops(model_shape(model), 2, Op.FULL)
    _, found = run_step(model, placement, ops, soft, costs=costs_for(model, 2, 2, 4))
    loss = masked_loss(model, [(x, y.double()) for x, y in soft], ops)
    loss.backward()
    assert found[0][0].loss == pytest.approx(loss.item(), abs=1e-9)
    grads = gathered_gradients(model, [shard for _, shard in found])
    for name, param in model.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y.argmax(1)).sum()) for x, y in soft)
    assert found[0][0].correct == right


def test_a_job_trains_with_everything_on_and_tells_of_uneven_classes(noisy: Path, tmp_path: Path) -> None:
    uneven = shutil.copytree(noisy, tmp_path / "uneven")
    for n, pixels in enumerate(NOISE):
        Image.fromarray(pixels[::-1]).save(uneven / f"train/dog/more{n}.png")
    spec = JobSpec(dataset=f"folder://{uneven}", augment=ALL, steps=4, micro_batches=2, micro_batch_size=3, window=2)
    losses = []
    for turn in range(2):
        _, events = run_job(spec, tmp_path / str(turn))
        losses.append([event["data"]["loss"] for event in events if event["type"] == "metrics"])
        (told,) = [event for event in events if event["type"] == "data.imbalanced"]
        assert told["level"] == "warning" and told["data"]["counts"] == {"cat": 3, "dog": 11}
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-4)
