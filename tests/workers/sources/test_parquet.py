"""Tables of images: the hub's layout, lazy reading, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import UserError
from tests.workers.sources.makers import BLUE, RED, encoded, table
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import ModelInput
from workers.sources import parquet
from workers.sources.address import parse_address
from workers.sources.opening import open_source
from workers.sources.source import Source

COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")


def opened(path: Path, query: str = "") -> Source:
    return open_source(parse_address(f"parquet://{path}{query}"))


def refused(path: Path, query: str = "") -> UserError:
    with pytest.raises(UserError) as caught:
        opened(path, query)
    assert caught.value.param == "dataset" and caught.value.remedy
    return caught.value


def test_the_hubs_layout_is_read_with_its_class_names_in_their_order(tmp_path: Path) -> None:
    for shard in range(2):
        table(tmp_path / f"data/train-0000{shard}-of-00002.parquet", [1, 0] * 5, names=["zebra", "ant", "unused"])
    table(tmp_path / "data/validation-00000-of-00001.parquet", [0, 1], names=["zebra", "ant", "unused"])
    source = opened(tmp_path)
    assert source.classes == ("zebra", "ant")
    assert [len(files) for files in source.train_files.values()] == [10, 10]
    assert source.test_files == {
        "zebra": ("validation-00000-of-00001.parquet#000000000",),
        "ant": ("validation-00000-of-00001.parquet#000000001",),
    }
    data = open_dataset(JobSpec(dataset=f"parquet://{tmp_path}"), COLOUR)
    assert (data.num_train, data.num_test, data.classes) == (20, 2, ("zebra", "ant"))
    images, labels = data.test_batch(np.array([0, 1]))
    assert labels.tolist() == [0, 1]
    red = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0 - 0.3) / 0.5])
    torch.testing.assert_close(images[1], red[:, None, None].expand(3, 16, 16))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=30).filter(lambda labels: len(set(labels)) > 1),
    group=st.integers(1, 7),
    plain=st.booleans(),
    words=st.booleans(),
    cache=st.integers(0, 400),
)
def test_every_row_is_found_under_its_label_with_its_own_bytes(
    tmp_path_factory: pytest.TempPathFactory, labels: list[int], group: int, plain: bool, words: bool, cache: int
) -> None:
    images: list[bytes | None] = [bytes([row]) * (row + 1) for row in range(len(labels))]
    given_labels: list[int | str | None] = [f"class {label}" if words else label for label in labels]
    path = tmp_path_factory.mktemp("rows") / "t.parquet"
    table(path, given_labels, images=images, plain=plain, group=group)
    source = opened(path)
    kept, parquet.CACHE_BYTES = parquet.CACHE_BYTES, cache
    try:
        found = {
            int(name.rpartition("#")[2]): (label, source.read(name))
            for label, names in source.train_files.items()
            for name in names
        }
    finally:
        parquet.CACHE_BYTES = kept
    assert found == {row: (str(given_labels[row]), images[row]) for row in range(len(labels))}
    assert source.classes == tuple(sorted({str(label) for label in given_labels}))


def test_numbers_are_sorted_as_numbers_and_twin_names_are_told_apart(tmp_path: Path) -> None:
    assert opened(table(tmp_path / "a.parquet", [10, 9, 2])).classes == ("2", "9", "10")
    twins = table(tmp_path / "b.parquet", [0, 1, 2], names=["crane", "owl", "crane"])
    assert opened(twins).classes == ("crane (0)", "owl", "crane (2)")


def test_row_groups_are_read_when_they_are_asked_for_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "t.parquet", [0, 1] * 6, group=4)
    source = opened(path)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: (read.append(i), real(self, i, **options))[1]
    )
    for name in ("t.parquet#000000005", "t.parquet#000000006", "t.parquet#000000005"):
        assert source.read(name) in (encoded(RED), encoded(BLUE))
    assert read == [1]


def test_many_threads_read_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[bytes | None] = [bytes([row]) * 100 for row in range(60)]
    source = opened(table(tmp_path / "t.parquet", [0, 1] * 30, images=images, group=7))
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1500)
    names = [f"t.parquet#{row:09d}" for row in np.random.default_rng(0).integers(0, 60, 600)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(source.read, names))
    assert found == [images[int(name.rpartition("#")[2])] for name in names]
    assert not [thread for thread in threading.enumerate() if "pool" in thread.name.lower() and thread.daemon is False]


def test_other_columns_are_named_in_the_address(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [0, 1], columns=("img", "fine_label"))
    assert "'img', 'fine_label'" in refused(path).message and refused(path).code == "missing_column"
    assert opened(path, "?image=img&label=fine_label").classes == ("0", "1")
    assert refused(path, "?image=img&label=img").code == "bad_column"
    assert refused(path, "?image=fine_label&label=fine_label").code == "bad_column"
    with pytest.raises(UserError, match="'split' is not one"):
        parse_address(f"parquet://{path}?split=train")


def test_each_broken_table_is_refused_by_name(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").code == "dataset_not_found"
    assert refused(tmp_path).code == "dataset_no_train"
    assert refused(table(tmp_path / "empty.parquet", [])).code == "empty_split"
    assert refused(table(tmp_path / "one.parquet", [3, 3, 3])).code == "one_class"
    missing = refused(table(tmp_path / "null.parquet", [0, 1, None]))
    assert missing.code == "missing_label" and "Row 2" in missing.message
    assert refused(table(tmp_path / "names.parquet", [0, 2], names=["a", "b"])).code == "bad_label"
    cases = refused(table(tmp_path / "cases.parquet", ["Cat", "cat", "dog"]))
    assert cases.code == "ambiguous_classes" and "'Cat', 'cat'" in cases.message
    table(tmp_path / "odd/train.parquet", ["cat", "dog"])
    table(tmp_path / "odd/test.parquet", ["cat", "fox"])
    unknown = refused(tmp_path / "odd")
    assert unknown.code == "unknown_test_class" and "'fox'" in unknown.message
    table(tmp_path / "odd/test.parquet", ["cat", "dog"], columns=("picture", "label"))
    assert refused(tmp_path / "odd").code == "missing_column"
    table(tmp_path / "hidden/train.parquet", [0, 1])
    table(tmp_path / "hidden/test.parquet", [-1, -1])
    assert refused(tmp_path / "hidden").code == "missing_label"


def test_a_link_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "secret.parquet", [0, 1])
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").symlink_to(tmp_path / "secret.parquet")
    assert refused(tmp_path / "set").code == "outside_roots"


def test_a_pipe_is_not_waited_for_and_a_link_put_there_since_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes/train.parquet")
    assert refused(tmp_path / "pipes").code == "bad_parquet"
    path = table(tmp_path / "t.parquet", [0, 1])
    source = opened(path)
    path.rename(tmp_path / "secret.parquet")
    path.symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(OSError):
        source.read("t.parquet#000000000")


def test_a_table_too_large_by_its_footer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "t.parquet", [0, 1] * 50)
    monkeypatch.setattr(parquet, "MAX_IMAGES", 99)
    assert refused(path).code == "too_many_images"
    monkeypatch.undo()
    for limit in ("MAX_LABEL_BYTES", "MAX_GROUP_BYTES"):
        monkeypatch.setattr(parquet, limit, 10)
        assert refused(path).code == "dataset_too_large"
        monkeypatch.undo()


def test_rows_without_a_picture_are_left_out_and_named(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded()] * 12
    images[3], images[7] = None, b"no picture"
    path = table(tmp_path / "t.parquet", [0, 1] * 6, images=images)
    data = open_dataset(JobSpec(dataset=f"parquet://{path}"), COLOUR)
    assert data.skipped == ["t.parquet#000000003", "t.parquet#000000007"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_table_is_refused_or_read_and_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(table(folder / "good.parquet", [0, 1] * 4, names=["a", "b"]).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "bad.parquet").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        source = opened(folder / "bad.parquet")
    except UserError as error:
        assert error.code
        return
    for names in source.train_files.values():
        for name in names:
            with contextlib.suppress(ValueError, OSError):
                source.read(name)


def test_a_table_of_strings_in_a_dictionary_is_read(tmp_path: Path) -> None:
    labels = pa.array(["dog", "cat", "dog"]).dictionary_encode()
    pq.write_table(pa.table({"image": pa.array([encoded()] * 3), "label": labels}), tmp_path / "t.parquet")
    assert opened(tmp_path / "t.parquet").classes == ("cat", "dog")
