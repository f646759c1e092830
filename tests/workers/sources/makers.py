"""Datasets for tests: images, tables and archives as others would write them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(colour: tuple[int, ...] = RED, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def table(
    path: Path,
    labels: list[int | str | None],
    *,
    images: list[bytes | None] | None = None,
    names: list[str] | None = None,
    plain: bool = False,
    group: int = 3,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """A Parquet file; with `names` in the hub's layout, `plain` images are binary and not a struct."""
    data = images or [encoded(RED if index % 2 else BLUE) for index in range(len(labels))]
    stored = pa.array(data, pa.binary()) if plain else pa.array([{"bytes": each, "path": None} for each in data])
    if not data:
        stored = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    made = pa.table({columns[0]: stored, columns[1]: pa.array(labels, None if labels else pa.int64())})
    if names:
        features = {columns[1]: {"names": names, "_type": "ClassLabel"}, columns[0]: {"_type": "Image"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=group)
    return path


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(
    key: str, label: int, colour: tuple[int, ...] = RED, suffix: str = "png"
) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.{suffix}", encoded(colour)), member(f"{key}.cls", str(label).encode())]
