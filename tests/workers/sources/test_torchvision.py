"""torchvision's datasets without torchvision: the same images and labels as its own readers give."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import UserError
from tests.workers.sources.makers import encoded
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.images import decode
from workers.model import ModelInput
from workers.sources.address import check_address, parse_address
from workers.sources.opening import open_source
from workers.sources.source import Source

RNG = np.random.default_rng(0)


def opened(name: str, root: Path) -> Source:
    return open_source(parse_address(f"torchvision:{name}?root={root}"))


def refused(name: str, root: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(name, root)
    assert caught.value.param == "dataset" and caught.value.remedy
    return caught.value


def pixels(source: Source, name: str, mode: str) -> np.ndarray:
    return np.asarray(decode(source.read(name), mode))


def idx(root: Path, name: str = "MNIST", count: int = 12, side: int = 28) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = RNG.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 2051, count, side, side)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_idx_files_are_read_as_torchvision_reads_them(tmp_path: Path, name: str) -> None:
    idx(tmp_path, name)
    source = opened(name, tmp_path)
    theirs = getattr(torchvision.datasets, name)(tmp_path, train=False)
    assert source.test_files is not None
    for number, label in enumerate(theirs.classes):
        (first, *_) = source.test_files[source.classes[number]]
        assert name == "MNIST" or source.classes[number] == label
        row = int(first.rpartition("#")[2])
        assert theirs[row][1] == number and np.array_equal(np.asarray(theirs[row][0]), pixels(source, first, "L"))
    data = open_dataset(JobSpec(dataset=f"torchvision:{name}?root={tmp_path}"), ModelInput(28, 1, (0.5,), (0.5,), ""))
    assert (data.num_train, data.num_test, data.skipped) == (12, 12, [])


def cifar(root: Path, number: int) -> dict[str, np.ndarray]:
    folder = root / ("cifar-10-batches-bin" if number == 10 else "cifar-100-binary")
    folder.mkdir(parents=True)
    names = [f"name {label}" for label in range(number)]
    (folder / ("batches.meta.txt" if number == 10 else "fine_label_names.txt")).write_text("\n".join(names) + "\n\n")
    parts = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if number == 10 else ["train", "test"]
    written = {}
    for part in parts:
        images = RNG.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(number, dtype=np.uint8)[:, None]
        head = labels if number == 10 else np.concatenate([labels // 5, labels], 1)
        records = np.concatenate([head, images.reshape(number, -1)], 1)
        (folder / f"{part}.bin").write_bytes(records.tobytes())
        written[f"{part}.bin"] = images.transpose(0, 2, 3, 1)
    return written


@pytest.mark.parametrize("number", [10, 100])
def test_cifar_s_binary_version_is_read(tmp_path: Path, number: int) -> None:
    written = cifar(tmp_path, number)
    source = opened(f"CIFAR{number}", tmp_path)
    assert source.classes == tuple(f"name {label}" for label in range(number))
    for files in (source.train_files, source.test_files or {}):
        for label, name in enumerate(source.classes):
            for image in files[name]:
                part, _, row = image.rpartition("#")
                assert int(row) == label and np.array_equal(pixels(source, image, "RGB"), written[part][label])


def test_cifar_s_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    for name, folder in (("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")):
        (tmp_path / folder).mkdir()
        error = refused(name, tmp_path)
        assert error.code == "dataset_is_pickled" and error.remedy is not None and "binary version" in error.remedy


def test_stl10_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"c{n}" for n in range(10)))
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(RNG.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(range(1, 11)))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    theirs, source = torchvision.datasets.STL10(tmp_path, split="test"), opened("STL10", tmp_path)
    assert source.test_files is not None and list(source.classes) == theirs.classes
    for row, name in enumerate(source.classes):
        (image,) = source.test_files[name]
        assert theirs[row][1] == row and np.array_equal(np.asarray(theirs[row][0]), pixels(source, image, "RGB"))


def pets(root: Path, *lines: str) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    for split in ("trainval", "test"):
        (folder / f"annotations/{split}.txt").write_text("\n".join(["#Image CLASS-ID SPECIES BREED ID", *lines]))


def test_pets_are_read_by_their_lists(tmp_path: Path) -> None:
    pets(tmp_path, "Abyssinian_1 1 1 1", "american_bulldog_20 2 2 1", "Abyssinian_3 1 1 1")
    for name in ("Abyssinian_1", "Abyssinian_3", "american_bulldog_20"):
        (tmp_path / f"oxford-iiit-pet/images/{name}.jpg").write_bytes(encoded(kind="JPEG"))
    source = opened("OxfordIIITPet", tmp_path)
    assert source.train_files == {
        "Abyssinian": ("images/Abyssinian_1.jpg", "images/Abyssinian_3.jpg"),
        "american_bulldog": ("images/american_bulldog_20.jpg",),
    }
    assert pixels(source, "images/Abyssinian_1.jpg", "RGB").shape == (16, 20, 3)
    for bad in ("../../etc/passwd_1 1 1 1", "Abyssinian 1 1 1", "Abyssinian_1 0 1 1", "x_1 1 1 1"):
        pets(tmp_path, "Abyssinian_1 1 1 1", "b_2 2 1 1", bad)
        assert refused("OxfordIIITPet", tmp_path).code == "bad_dataset_file"


def test_what_is_not_there_is_cut_or_leads_out_is_refused(tmp_path: Path) -> None:
    for name in ("MNIST", "CIFAR10", "STL10", "OxfordIIITPet"):
        assert refused(name, tmp_path).code == "dataset_not_found"
    idx(tmp_path / "cut")
    images = tmp_path / "cut/MNIST/raw/train-images-idx3-ubyte"
    content = images.read_bytes()
    for bad in (content[:-1], content + b"x", b"", content[:8], b"\0" * len(content)):
        images.write_bytes(bad)
        assert refused("MNIST", tmp_path / "cut").code == "bad_dataset_file"
    images.unlink()
    images.symlink_to(tmp_path / "secret")
    assert refused("MNIST", tmp_path / "cut").code == "outside_roots"
    cifar(tmp_path / "odd", 10)
    with (tmp_path / "odd/cifar-10-batches-bin/data_batch_3.bin").open("ab") as file:
        file.write(b"x")
    assert refused("CIFAR10", tmp_path / "odd").code == "bad_dataset_file"
    with (tmp_path / "odd/cifar-10-batches-bin/data_batch_3.bin").open("r+b") as file:
        file.truncate(3073 * 10)
        file.write(b"\x0a")  # an eleventh class
    assert refused("CIFAR10", tmp_path / "odd").code == "bad_label"


@pytest.mark.parametrize("name", ["SVHN", "Flowers102", "ImageNet", "FakeData", "Omniglot", "X"])
def test_others_are_refused_by_name(tmp_path: Path, name: str) -> None:
    error = refused(name, tmp_path)
    assert error.code == "unsupported_dataset" and name in error.message and "MNIST" in str(error.remedy)


def test_the_root_is_held_against_the_roots(tmp_path: Path) -> None:
    assert check_address(f"torchvision:MNIST?root={tmp_path}", [tmp_path]).path == str(tmp_path)
    for uri, code in (
        ("torchvision:MNIST?root=/etc", "outside_roots"),
        (f"torchvision:MNIST?root={tmp_path}/../x", "outside_roots"),
        ("torchvision:MNIST", "bad_dataset_uri"),
        ("torchvision:MNIST?root=here", "bad_dataset_uri"),
        (f"torchvision:MNIST?root={tmp_path}&download=True", "bad_dataset_uri"),
        (f"torchvision:../x?root={tmp_path}", "bad_dataset_uri"),
    ):
        with pytest.raises(UserError) as caught:
            check_address(uri, [tmp_path])
        assert caught.value.code == code


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(max_size=60), kind=st.sampled_from(["folder:", "parquet:", "hf:", "torchvision:", "folder+s3:", ""])
)
def test_no_address_does_anything_but_parse_or_be_refused(text: str, kind: str) -> None:
    for uri in (kind + text, f"{kind}//{text}", f"{kind}///{text}"):
        try:
            address = parse_address(uri)
        except UserError as error:
            assert error.code == "bad_dataset_uri"
            continue
        assert address.store is not None or address.path.startswith("/")
        assert "\0" not in address.path
