"""Images: files that anyone may have written, decoded with care and cut to squares. No torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

from PIL import Image

from scheduler.errors import UserError
from workers.sources.source import Pixels, Stored

MAX_PIXELS = 25_000_000
Box = tuple[float, float, float, float]  # left, top, right, bottom
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def find_unreadable(
    read: Callable[[str], Stored], names: Sequence[str], progress: Callable[[], None] = lambda: None
) -> list[str]:
    """Decode every image once, in threads and in the order in which they are stored; the names of those that fail.

    `progress` is called after each. Raises UserError "unreadable_images" when they are more than ten and more than one
    in a hundred.
    """

    def is_bad(name: str) -> bool:
        try:
            decode(read(name), "RGB")
        # Pillow's decoders raise whatever a broken file leads them to.
        except Exception:
            return True
        return False

    # Filters belong to the process, not the thread: they are set once around all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        bad, in_order = [], sorted(names)
        for name, is_dropped in zip(in_order, threads.map(is_bad, in_order), strict=True):
            progress()
            if is_dropped:
                bad.append(name)
    if len(bad) > max(10, len(names) // 100):
        raise _unreadable(bad, len(names))
    return bad


def read_image(read: Callable[[str], Stored], name: str, channels: int) -> Image.Image:
    """One image of a dataset; `channels` 1 is grey, 3 is RGB. Raises UserError "unreadable_images"."""
    try:
        return decode(read(name), "L" if channels == 1 else "RGB")
    except Exception as error:  # it was readable when the dataset was opened
        raise _unreadable([f"{name} ({error})"], 1) from error


def centre(size: tuple[int, int], crop_pct: float) -> Box:
    """The square in the middle of an image of `size` (width, height), `crop_pct` of its shorter side wide.

    It is what timm shows a model, which resizes first and cuts then; cutting first keeps a long strip of an image from
    growing without bound.
    """
    side = crop_pct * min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def fill_square(image: Image.Image, box: Box, size: int, interpolation: str) -> Image.Image:
    """The part of an image in `box`, resized to `size` × `size` pixels."""
    return image.resize((size, size), _RESAMPLING.get(interpolation, Image.Resampling.BICUBIC), box=box)


def decode(stored: Stored, mode: str) -> Image.Image:
    """Fully decode one image, in Pillow's `mode`: of an animation the first frame, of 16 bits the upper eight.

    Raises whatever Pillow does, and ValueError for one with more than `MAX_PIXELS` by its header.
    """
    if isinstance(stored, Pixels):
        planes = [Image.frombytes("L", (stored.width, stored.height), plane) for plane in stored.planes]
        return (planes[0] if len(planes) == 1 else Image.merge("RGB", planes)).convert(mode)
    with Image.open(BytesIO(stored), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} × {height} pixels, more than {MAX_PIXELS}")
        image.load()
        if image.mode.startswith("I;16"):  # Pillow would make all from 256 on white
            return image.point(lambda value: value * (1 / 256)).convert("L").convert(mode)
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
