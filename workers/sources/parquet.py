"""Tables in Parquet files: an image and a label in every row, in the layout of the Hugging Face hub too.

    image     a struct with the field `bytes`, or binary: an encoded image
    label     an integer, with the class names in the schema's metadata where there are any, or a string

Labels are read when a source is opened, images row group by row group when they are asked for. An image's name is
`FILE#ROW`.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.sources.address import Address
from workers.sources.labels import Label, Labelled, by_label, from_labels
from workers.sources.shards import find_shards
from workers.sources.source import MAX_IMAGE_BYTES, MAX_IMAGES, Checked, Source, opened, quoted

MAX_LABEL_BYTES = 2 << 30  # of one file's label column
MAX_GROUP_BYTES = 2 << 30  # of one row group's images
CACHE_BYTES = 256 << 20  # row groups that are kept: reading one image decodes its whole group
_THRIFT = {"thrift_string_size_limit": 100 << 20, "thrift_container_size_limit": 10_000_000}
_LAYOUT = (
    "Give a file, or a directory with train*.parquet and optionally test* or val*, with the columns 'image' (encoded "
    "bytes) and 'label' (integer or string); other columns are named by ?image=NAME&label=NAME."
)


def open_parquet(address: Address) -> Source:
    """Read the labels of all rows.

    Raises UserError (dataset): those of `find_shards` and `from_labels`, "bad_parquet" for a file that cannot be read,
    "missing_column", "bad_column" for one of another type, "missing_label", "empty_split", "too_many_images" and
    "dataset_too_large".
    """
    told = Checked(address.path, _LAYOUT)
    image, label = address.options.get("image", "image"), address.options.get("label", "label")
    shards = find_shards(told, Path(address.path), ".parquet")
    files = [_Table(told, path, image, label) for path in (*shards.train, *(shards.test or ()))]
    train = _labelled(told, files[: len(shards.train)], "training")
    test = _labelled(told, files[len(shards.train) :], "testing") if shards.test is not None else None
    names = next((file.class_names for file in files if file.class_names), None)
    return from_labels(told, train, test, RowGroups(files).read, names)


class _Table:
    """One file, as its footer says: where its row groups begin, and what its columns are."""

    def __init__(self, told: Checked, path: Path, image: str, label: str) -> None:
        self.path, self.label, self._told = path, label, told
        with self._readable(), self.opened() as file:
            self.metadata, schema = file.metadata, file.schema_arrow
        for column in (image, label):
            if schema.names.count(column) != 1:
                known = quoted(schema.names) if schema.names else "none"
                raise told.refusal(f"{path} has no column '{column}'; it has {known}.", "missing_column")
        self.image_column = _image_column(told, path, schema.field(image))
        if not _is_label(schema.field(label).type):
            message = f"The column '{label}' of {path} is {schema.field(label).type}, not an integer or a string."
            raise told.refusal(message, "bad_column")
        groups = [self.metadata.row_group(index) for index in range(self.metadata.num_row_groups)]
        self.ends = list(accumulate(group.num_rows for group in groups))
        if self.metadata.num_rows > MAX_IMAGES:
            message = f"{path} has {self.metadata.num_rows} rows, more than {MAX_IMAGES}."
            raise told.refusal(message, "too_many_images")
        self._check_bytes(self.image_column, MAX_GROUP_BYTES, each=True)
        self._check_bytes(label, MAX_LABEL_BYTES, each=False)
        self.class_names = _class_names(schema, label)

    @contextmanager
    def opened(self) -> Iterator[pq.ParquetFile]:
        with opened(self.path) as file:
            yield pq.ParquetFile(file, metadata=getattr(self, "metadata", None), **_THRIFT)

    def labels(self) -> list[Any]:
        """One for each row, None where it is missing."""
        with self._readable(), self.opened() as file:
            return file.read(columns=[self.label]).column(0).to_pylist()

    def _check_bytes(self, column: str, limit: int, *, each: bool) -> None:
        """By what the footer says of the decoded size; of every row group, or of all together."""
        sizes = [0]
        for index in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(index)
            chunks = (group.column(number) for number in range(group.num_columns))
            sizes += [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column]
        size = max(sizes) if each else sum(sizes)
        if size > limit:
            what = f"A row group of {self.path}" if each else str(self.path)
            message = f"{what} holds {size} bytes in the column '{column}', more than {limit}."
            raise self._told.refusal(message, "dataset_too_large")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            message = f"{self.path} cannot be read as Parquet: {str(error)[:200].rstrip('.')}."
            raise self._told.refusal(message, "bad_parquet") from error


class RowGroups:
    """Images of tables by name; the row groups used last are kept. For several threads."""

    def __init__(self, files: Sequence[_Table]) -> None:
        self._files = {file.path.name: file for file in files}
        self._kept: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """The encoded image of a row. Raises ValueError where there is none, or it is too large."""
        file_name, _, row = name.rpartition("#")
        file, place = self._files[file_name], int(row)
        group = bisect_right(file.ends, place)
        first = file.ends[group - 1] if group else 0
        with self._lock:
            image = self._group(file, group)[place - first]
        if not image.is_valid:
            raise ValueError("the row has no image bytes")
        data = image.as_buffer()
        if data.size > MAX_IMAGE_BYTES:
            raise ValueError(f"{data.size} bytes, more than {MAX_IMAGE_BYTES}")
        return bytes(data)

    def _group(self, file: _Table, group: int) -> pa.Array:
        key = file.path.name, group
        if key not in self._kept:
            with file.opened() as table:
                read = table.read_row_group(group, columns=[file.image_column], use_threads=False)
            column = read.column(0).combine_chunks()
            self._kept[key] = column.field(0) if pa.types.is_struct(column.type) else column
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _labelled(told: Checked, files: Sequence[_Table], use: str) -> Labelled:
    """Label to the names of its rows."""
    found: dict[Label, list[str]] = defaultdict(list)
    for file in files:
        for label, rows in by_label(told, file.labels(), str(file.path), f"{file.path.name}#").items():
            found[label].extend(rows)
    if not found:
        raise told.refusal(f"{told.origin} has no rows for {use}.", "empty_split")
    return found


def _image_column(told: Checked, path: Path, field: pa.Field) -> str:
    """The column with the bytes, as Parquet names it."""
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
        return f"{field.name}.bytes"
    if _is_binary(kind):
        return str(field.name)
    message = f"The column '{field.name}' of {path} is {kind}, not bytes or a struct with the field 'bytes'."
    raise told.refusal(message, "bad_column")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The names that the hub's `ClassLabel` notes in the schema's metadata, if it does."""
    noted = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(noted)["info"]["features"][label]["names"] if noted else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None
