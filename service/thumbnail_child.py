"""The process in which thumbnails are made: files that anyone may have written are decoded where little can break.

One request on stdin, a line of JSON {"root", "files", "side", "max_pixels", "seconds"}; on stdout one line for each
file, in their order: {"width", "height", "png"} with the PNG in base64, or {"error"}. Of a dataset whose images are no
files {"uri", "roots"} take the place of "root", and "files" are names of its images: it is opened here, too. The
process bounds its own memory and time, may write no file, and ends with the last line. No numpy for a folder: it has to
be up in a tenth of a second.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError, WebPImagePlugin

from scheduler.errors import UserError
from workers.confinement import confine, limit
from workers.sources.address import Address, check_address, check_inside
from workers.sources.opening import open_source, opener_of
from workers.sources.source import Pixels

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # those that training reads
Look = Callable[[str], AbstractContextManager[Image.Image]]  # an image by its name, open but not decoded
SPARE_BYTES = 256 << 20
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
assert WebPImagePlugin  # imported so that Pillow need not load all its formats to find this one


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    Image.preinit()
    address = None if request.get("uri") is None else check_address(request["uri"], request["roots"])
    if address is not None:
        opener_of(address.kind)  # what it loads is not counted, and may write where it likes
    confine(int(request["max_pixels"]), SPARE_BYTES)
    limit(resource.RLIMIT_CPU, int(request["seconds"]))
    look: Look = partial(_in_folder, Path(request["root"])) if address is None else _in_source(address)
    for name in request["files"]:
        answers.write(json.dumps(_answer(look, name, int(request["side"]))) + "\n")
        answers.flush()


def open_inside(root: Path, name: str) -> int:
    """A descriptor of a regular file in `root`, links resolved.

    The resolved path is walked from the top without following a link: one that was put there since is refused, too.
    Raises UserError "outside_roots", OSError, ValueError for what is no regular file.
    """
    path = check_inside(root / name, [root])
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            above, folder = folder, os.open(part, _FOLDER, dir_fd=folder)
            os.close(above)
        file = os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("it is not a regular file")  # a pipe could be waited for without end
    return file


def _answer(look: Look, name: str, side: int) -> dict[str, Any]:
    try:
        return _thumbnail(look, name, side)
    # Pillow's decoders raise whatever a broken file leads them to.
    except Exception as error:
        return {"error": _told(error)}


def _thumbnail(look: Look, name: str, side: int) -> dict[str, Any]:
    png = BytesIO()
    with look(name) as image:
        width, height = image.size
        small = _plain(image)
        small.thumbnail((side, side))  # a JPEG is decoded at an eighth of its size where that is enough
        small.info = {}  # else its colour profile, of any size, goes into the PNG
        small.save(png, "PNG")
    return {"width": width, "height": height, "png": base64.b64encode(png.getvalue()).decode()}


@contextmanager
def _in_folder(root: Path, name: str) -> Iterator[Image.Image]:
    with os.fdopen(open_inside(root, name), "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _in_source(address: Address) -> Look:
    source = open_source(address)

    @contextmanager
    def look(name: str) -> Iterator[Image.Image]:
        stored = source.read(name)
        if isinstance(stored, Pixels):
            planes = [Image.frombytes("L", (stored.width, stored.height), plane) for plane in stored.planes]
            yield planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
            return
        with Image.open(BytesIO(stored), formats=FORMATS) as image:
            yield image

    return look


def _plain(image: Image.Image) -> Image.Image:
    """Grey or RGB, by the same steps as in training."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value * (1 / 256)).convert("L")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _told(error: Exception) -> str:
    """What a user is told; Pillow's own words name our file descriptors."""
    if isinstance(error, UserError):
        return "The link leads out of the dataset's folder."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"The image has more than {Image.MAX_IMAGE_PIXELS} pixels."
    if isinstance(error, UnidentifiedImageError):
        return f"The file is no image of the formats {', '.join(FORMATS)}."
    if isinstance(error, MemoryError):
        return "Decoding the image takes more memory than it may."
    if isinstance(error, OSError) and error.strerror:
        return f"The file cannot be opened: {error.strerror}."
    return f"The image cannot be decoded: {str(error)[:200] or type(error).__name__}."


if __name__ == "__main__":
    main()
