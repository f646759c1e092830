"""Images: files that anyone may have written, decoded with care into squares of pixels. No torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from scheduler.errors import UserError
from workers.folder import check_inside

MAX_PIXELS = 25_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def find_unreadable(root: Path, names: Sequence[str]) -> list[str]:
    """Decode every image once, in threads, and return the names of those that fail.

    Raises UserError "unreadable_images" when they are more than ten and more than one in a hundred.
    """

    def is_bad(name: str) -> bool:
        try:
            decode(root, name, "RGB")
        # Pillow's decoders raise whatever a broken file leads them to.
        except Exception:
            return True
        return False

    # Filters belong to the process, not the thread: they are set once around all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        bad = [name for name, is_dropped in zip(names, threads.map(is_bad, names), strict=True) if is_dropped]
    if len(bad) > max(10, len(names) // 100):
        raise _unreadable(bad, len(names))
    return bad


def read_square(root: Path, name: str, size: int, channels: int, interpolation: str) -> npt.NDArray[np.uint8]:
    """One image as pixels [size, size, channels]: its centre square, resized; `channels` 1 is grey, 3 is RGB.

    Cutting before resizing keeps a long strip of an image from growing without bound. Raises UserError
    "unreadable_images".
    """
    try:
        image = decode(root, name, "L" if channels == 1 else "RGB")
    except Exception as error:  # it was readable when the dataset was opened
        raise _unreadable([f"{name} ({error})"], 1) from error
    return to_square(image, size, channels, interpolation)


def to_square(image: Image.Image, size: int, channels: int, interpolation: str) -> npt.NDArray[np.uint8]:
    """The centre square of a decoded image, resized: pixels [size, size, channels]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    resampling = _RESAMPLING.get(interpolation, Image.Resampling.BICUBIC)
    square = image.resize((size, size), resampling, box=(left, top, left + side, top + side))
    return np.asarray(square, dtype=np.uint8).reshape(size, size, channels)


def decode(root: Path, name: str, mode: str) -> Image.Image:
    """Open and fully decode one image of a folder, in Pillow's `mode`.

    Raises whatever Pillow does, UserError for a link that leads out of `root`, ValueError for a file that is none
    or has more than `MAX_PIXELS` by its header.
    """
    path = check_inside(root / name, [root])
    if not path.is_file():
        raise ValueError("not a regular file")  # opening a pipe would wait for ever
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} × {height} pixels, more than {MAX_PIXELS}")
        return _in_mode(image, mode)


def decode_bytes(content: bytes, mode: str) -> Image.Image:
    """Fully decode an image file of these bytes, in Pillow's `mode`. Raises whatever Pillow does."""
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        return _in_mode(image, mode)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    # Pillow warns when a palette with transparency is turned into RGB directly.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert(mode)


def _unreadable(bad: list[str], num_images: int) -> UserError:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return UserError(
        f"{len(bad)} of {num_images} images cannot be decoded: {', '.join(bad[:5])}{more}.",
        code="unreadable_images",
        param="dataset",
        remedy=f"Replace or remove them; images are {', '.join(FORMATS)} of at most {MAX_PIXELS // 10**6} megapixels.",
    )
