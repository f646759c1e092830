"""Datasets of the Hugging Face library: saved ones, other layouts, and the hub behind a stand-in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from scheduler.errors import UserError
from tests.workers.sources.makers import BLUE, RED, encoded, table
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import ModelInput
from workers.sources import hf
from workers.sources.address import check_address, parse_address
from workers.sources.opening import open_source
from workers.sources.source import Source

COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def made(labels: list[int], images: list[dict[str, Any]] | None = None, label: str = "label") -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=["zebra", "ant"])})
    stored = images or [{"bytes": encoded(RED if each else BLUE), "path": None} for each in labels]
    return datasets.Dataset.from_dict({"image": stored, label: labels}, features=features)


def saved(path: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def opened(path: Path, query: str = "") -> Source:
    return open_source(parse_address(f"hf:{path}{query}"))


def refused(uri: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_source(parse_address(uri))
    assert caught.value.param == "dataset" and caught.value.remedy
    return caught.value


def test_what_was_saved_is_read_with_class_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", train=made([0, 1] * 10).shuffle(seed=0), validation=made([1, 0]), other=made([0]))
    source = opened(path)
    assert source.classes == ("zebra", "ant")
    assert source.test_files == {"zebra": ("validation#000000001",), "ant": ("validation#000000000",)}
    for name, colour in (("zebra", BLUE), ("ant", RED)):
        assert [source.read(image) for image in source.train_files[name]] == [encoded(colour)] * 10
    data = open_dataset(JobSpec(dataset=f"hf:{path}"), COLOUR)
    assert (data.num_train, data.num_test) == (20, 2) and data.test_batch(np.arange(2)).labels_B.tolist() == [0, 1]


def test_a_single_split_is_for_training_and_a_tenth_held_out(tmp_path: Path) -> None:
    made([0, 1] * 10).save_to_disk(str(tmp_path / "x"))
    data = open_dataset(JobSpec(dataset=f"hf:{tmp_path / 'x'}"), COLOUR)
    assert (data.num_train, data.num_test) == (18, 2)


def test_a_test_split_without_labels_makes_way_for_the_next(tmp_path: Path) -> None:
    hidden = made([0, 0]).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=["zebra", "ant"]))
    path = saved(tmp_path / "x", train=made([0, 1]), test=hidden, validation=made([0, 1]))
    assert opened(path).test_files == {"zebra": ("validation#000000000",), "ant": ("validation#000000001",)}


def test_other_columns_are_named_and_missing_ones_are_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", train=made([0, 1], label="fine"))
    assert refused(f"hf:{path}").code == "missing_column"
    assert opened(path, "?label=fine").classes == ("zebra", "ant")
    assert refused(f"hf:{path}?image=fine&label=fine").code == "bad_column"


def test_directories_of_our_other_kinds_are_opened_by_them(tmp_path: Path) -> None:
    table(tmp_path / "p/data/train-0.parquet", [0, 1], names=["a", "b"])
    assert opened(tmp_path / "p").classes == ("a", "b")
    for label in ("x", "y"):
        (tmp_path / f"f/train/{label}").mkdir(parents=True)
        (tmp_path / f"f/train/{label}/1.png").write_bytes(encoded())
    assert opened(tmp_path / "f").classes == ("x", "y")
    assert refused(f"hf:{tmp_path}/none").code == "dataset_not_found"
    assert refused(f"hf:{saved(tmp_path / 'v', validation=made([0, 1]))}").code == "dataset_no_train"


def test_an_image_that_is_a_path_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    path = saved(tmp_path / "x", train=made([0, 1]))
    arrow = path / "train/data-00000-of-00001.arrow"
    with pa.memory_map(str(arrow)) as mapped:
        rows = pa.ipc.open_stream(mapped).read_all()
    stored = pa.array(
        [{"bytes": encoded(), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")}],
        rows.schema.field("image").type,
    )
    lying = pa.table({"image": stored, "label": rows["label"].combine_chunks()}, schema=rows.schema)
    arrow.unlink()
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(lying)
    source = opened(path)
    assert source.read("train#000000000") == encoded()
    with pytest.raises(ValueError, match="no image bytes"):
        source.read("train#000000001")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/b.arrow", None, 3])
def test_notes_that_lead_out_are_not_followed(tmp_path: Path, name: Any) -> None:
    path = saved(tmp_path / "x", train=made([0, 1]))
    (path / "train/data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = json.loads((path / "train/state.json").read_text())
    (path / "train/state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    assert refused(f"hf:{path}").code == "bad_saved_dataset"
    (path / "train/state.json").write_text(json.dumps(state))
    (path / "train/data-00000-of-00001.arrow").symlink_to(tmp_path / "secret.arrow")
    assert refused(f"hf:{path}").code == "outside_roots"
    (path / "dataset_dict.json").write_text('{"splits": ["../x", "/etc"]}')
    assert refused(f"hf:{path}").code == "dataset_no_train"


def test_a_broken_save_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", train=made([0, 1]))
    arrow = path / "train/data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    for bad in (b"", content[:100], b"x" * len(content)):
        arrow.write_bytes(bad)
        assert refused(f"hf:{path}").code == "bad_saved_dataset"
    arrow.write_bytes(content)
    for bad_state in ("", "[]", "{}", "[" * 100_000):
        (path / "train/state.json").write_text(bad_state)
        assert refused(f"hf:{path}").code == "bad_saved_dataset"


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("train/state.json", "train/data-00000-of-00001.arrow"):
        path = saved(tmp_path / name.replace("/", "-"), train=made([0, 1]))
        (path / name).unlink()
        os.mkfifo(path / name)
        assert refused(f"hf:{path}").code == "bad_saved_dataset"


def test_one_of_the_hub_is_pinned_and_asked_for_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.DatasetDict(train=made([0, 1, 0]), test=made([1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_source(parse_address(f"hf:owner/pets@{COMMIT}")).classes == ("zebra", "ant")
    assert asked == [(("owner/pets",), {"revision": COMMIT})]
    for loose in ("hf:owner/pets", "hf:owner/pets@main", "hf:owner/pets@0123abc", f"hf:../x@{COMMIT}", "hf:"):
        with pytest.raises(UserError) as caught:
            parse_address(loose)
        assert caught.value.code == "bad_dataset_uri"


def test_the_hub_out_of_reach_is_told_with_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(f"hf:owner/pets@{COMMIT}")
    assert error.code == "hub_unreachable" and "HF_HUB_OFFLINE" in error.message and "save_to_disk" in str(error.remedy)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x", train=made([0, 1]))
    monkeypatch.setattr(hf, "datasets", None)
    error = refused(f"hf:{path}")
    assert error.code == "hf_not_installed" and "d2ft[hf]" in str(error.remedy)


def test_paths_and_names_are_held_against_the_roots(tmp_path: Path) -> None:
    assert check_address(f"hf:{tmp_path}/x", [tmp_path]).path == f"{tmp_path}/x"
    assert check_address(f"hf:owner/pets@{COMMIT}", [tmp_path, "hf://owner"]).store == "hf"
    for uri in ("hf:/etc", f"hf:{tmp_path}/../x", f"hf:other/pets@{COMMIT}", f"hf:owner2/pets@{COMMIT}"):
        with pytest.raises(UserError) as caught:
            check_address(uri, [tmp_path, "hf://owner"])
        assert caught.value.code == "outside_roots"
