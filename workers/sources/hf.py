"""Datasets of the Hugging Face library: as `save_to_disk` leaves them, in the layout of another kind, or of the hub.

    hf:/path                       what `save_to_disk` wrote; or train*.parquet; or train/CLASS/
    hf:OWNER/NAME@REVISION         of the hub, pinned to a commit; what the library has in its cache serves offline, too

No code of a dataset is ever run, which the library has given up since its version 4. An image must lie in the table
itself: a path to a file elsewhere is not followed. An image's name is `SPLIT#ROW`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from scheduler.errors import UserError
from workers.sources.address import Address, check_inside
from workers.sources.folder import TRAIN_DIR, open_folder
from workers.sources.labels import by_label, from_labels
from workers.sources.parquet import open_parquet
from workers.sources.source import MAX_IMAGE_BYTES, MAX_IMAGES, Checked, Source, opened

try:
    import datasets
except ImportError:  # it is an extra
    datasets = None

TEST_SPLITS = ("test", "validation", "val")
MAX_NOTE_BYTES = 16 << 20
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_LAYOUT = (
    "Give hf:/absolute/path of what save_to_disk wrote, or hf:OWNER/NAME@COMMIT, with a split 'train' and the columns "
    "'image' and 'label'; other columns are named by ?image=NAME&label=NAME."
)


def open_hf(address: Address) -> Source:
    """Open a dataset by the library, or by the kind whose layout its directory has.

    Raises UserError (dataset): "hf_not_installed", "dataset_not_found", "dataset_no_train", "bad_saved_dataset",
    "hub_unreachable", "missing_column", "bad_column", "missing_label", those of `from_labels`, and of the other kinds.
    """
    told = Checked(address.url if address.store else address.path, _LAYOUT)
    if address.store is not None:
        return _from_tables(told, address, _of_hub(told, address))
    path = Path(address.path).resolve()
    if (path / _SPLITS).is_file() or (path / _STATE).is_file():
        return _from_tables(told, address, _saved(told, path))
    if (path / TRAIN_DIR).is_dir():
        return open_folder(Address("folder", str(path)))
    return open_parquet(Address("parquet", str(path), address.options))


def _saved(told: Checked, path: Path) -> Mapping[str, Any]:
    """The splits that `save_to_disk` wrote, after a look at the names that the library would follow."""
    if (path / _STATE).is_file():
        found = {TRAIN_DIR: path}
    else:
        splits = _note(told, path / _SPLITS).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        found = {name: path / name for name in names if name in (TRAIN_DIR, *TEST_SPLITS)}
    for folder in found.values():
        files = _note(told, check_inside(folder / _STATE, [path])).get("_data_files")
        if not isinstance(files, list):
            raise told.refusal(f"{folder}/{_STATE} names no files.", "bad_saved_dataset")
        for file in files:
            name = file.get("filename") if isinstance(file, dict) else None
            if not isinstance(name, str) or Path(name).name != name:
                raise told.refusal(f"{folder}/{_STATE} names the file '{str(name)[:200]}'.", "bad_saved_dataset")
            with _regular(told, check_inside(folder / name, [path])):
                pass
    load = _library().load_from_disk
    try:
        return {name: load(str(folder)) for name, folder in found.items()}
    except Exception as error:  # what the library raises of broken files is not said anywhere
        raise told.refusal(f"{path} cannot be read: {str(error)[:200]}.", "bad_saved_dataset") from error


def _of_hub(told: Checked, address: Address) -> Mapping[str, Any]:
    load = _library().load_dataset
    try:
        found: Mapping[str, Any] = load(address.path, revision=address.options["revision"])
        return found
    except Exception as error:  # of the network, the hub, its cache: each has exceptions of its own
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise UserError(
            f"{address.url} cannot be had: {str(error)[:300].rstrip('.')}.{offline}",
            code="hub_unreachable",
            param="dataset",
            remedy="Check name and commit; without a network, save it by save_to_disk elsewhere and give hf:/path.",
        ) from error


def _library() -> Any:
    if datasets is None:
        raise UserError(
            "Datasets of Hugging Face need the library 'datasets', which is not installed.",
            code="hf_not_installed",
            param="dataset",
            remedy="Install it on all nodes: pip install 'd2ft[hf]'.",
        )
    return datasets


def _from_tables(told: Checked, address: Address, splits: Mapping[str, Any]) -> Source:
    image, label = address.options.get("image", "image"), address.options.get("label", "label")
    if TRAIN_DIR not in splits:
        raise told.refusal(f"{told.origin} has no split '{TRAIN_DIR}'.", "dataset_no_train")
    tables = {name: splits[name] for name in (TRAIN_DIR, *TEST_SPLITS) if name in splits}
    images: dict[str, pa.ChunkedArray] = {}
    labels: dict[str, list[Any]] = {}
    for name, table in tables.items():
        images[name], labels[name] = _columns(told, name, table, image, label)
    # The hub's test splits are often without labels: the next one serves.
    tests = [name for name in TEST_SPLITS if name in tables and any(each not in (None, -1) for each in labels[name])]

    def grouped(split: str) -> Any:
        return by_label(told, labels[split], f"the split '{split}'", f"{split}#")

    def read(name: str) -> bytes:
        split, _, row = name.rpartition("#")
        value = images[split][int(row)]
        if pa.types.is_struct(value.type):
            value = value["bytes"] if value.is_valid else None
        if value is None or not value.is_valid:
            raise ValueError("the row has no image bytes")
        if value.as_buffer().size > MAX_IMAGE_BYTES:
            raise ValueError(f"more than {MAX_IMAGE_BYTES} bytes")
        return bytes(value.as_buffer())

    names = getattr(tables[TRAIN_DIR].features[label], "names", None)
    return from_labels(told, grouped(TRAIN_DIR), grouped(tests[0]) if tests else None, read, names)


def _columns(told: Checked, split: str, table: Any, image: str, label: str) -> tuple[pa.ChunkedArray, list[Any]]:
    """Images and labels of a split, checked: a file that lies about its offsets must not lead out of its memory."""
    data: pa.Table = table.data.table
    for column in (image, label):
        if data.column_names.count(column) != 1:
            message = f"The split '{split}' of {told.origin} has no column '{column}'; it has {data.column_names[:20]}."
            raise told.refusal(message, "missing_column")
    kind, labels = data.schema.field(image).type, data.column(label)
    stored = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise told.refusal(f"The column '{image}' of '{split}' is {kind}, not images.", "bad_column")
    if not (pa.types.is_integer(labels.type) or pa.types.is_string(labels.type)):
        raise told.refusal(f"The column '{label}' of '{split}' is {labels.type}, not labels.", "bad_column")
    if table._indices is not None or len(data) > MAX_IMAGES:
        message = f"The split '{split}' of {told.origin} has rows out of order, or more than {MAX_IMAGES}."
        raise told.refusal(message, "bad_saved_dataset")
    try:
        data.column(image).validate(full=True)
        labels.validate(full=True)
    except pa.ArrowException as error:
        raise told.refusal(f"The split '{split}' is damaged: {str(error)[:200]}.", "bad_saved_dataset") from error
    return data.column(image), labels.to_pylist()


def _note(told: Checked, path: Path) -> dict[str, Any]:
    with _regular(told, path.resolve()) as file:
        text = file.read(MAX_NOTE_BYTES + 1)
        if len(text) > MAX_NOTE_BYTES:
            raise ValueError(f"it has more than {MAX_NOTE_BYTES} bytes")
        noted = json.loads(text)
    return noted if isinstance(noted, dict) else {}


@contextmanager
def _regular(told: Checked, path: Path) -> Iterator[BinaryIO]:
    try:
        with opened(path) as file:
            yield file
    except (OSError, ValueError, RecursionError) as error:
        raise told.refusal(f"{path} cannot be read: {str(error)[:200]}.", "bad_saved_dataset") from error
