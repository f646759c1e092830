"""The process in which a result is tried: images that anyone may have written are decoded where little can break.

    python -m workers.predictor --directory RESULT --max-pixels N

It is one result's, and stays: a request is a line of JSON {"sizes": bytes of each image, "top", "seconds"} on stdin
and the images behind it, one after another; the answer is a line of JSON on stdout, {"images": [{"top"} or {"error":
{"code", "message"}}, …]} or, where the result is no good, {"error"}. It bounds its own memory and time, may write no
file, and ends with its stdin.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from PIL import Image, UnidentifiedImageError

from scheduler.errors import D2ftError
from workers import lean
from workers.confinement import allow_cpu, confine

if TYPE_CHECKING:
    from workers.prediction import Predictor

PREDICTION = "workers.prediction"
SPARE_BYTES = 512 << 20
WEIGHTS_COPIES = 4  # of the file while it is loaded: mapped, as floats, resampled, and the model's own
UNREADABLE, TOO_LARGE = "image_unreadable", "image_too_large"


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="the result folder")
    parser.add_argument("--max-pixels", type=int, required=True, help="of an image")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    predictor: Predictor | None = None
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        allow_cpu(int(request["seconds"]))
        images = _read(sys.stdin.buffer, request["sizes"])
        try:
            predictor = predictor or _load(args.directory, args.max_pixels)
            answer: dict[str, Any] = {"images": [_answer(predictor, image, int(request["top"])) for image in images]}
        except D2ftError as error:
            answer = {"error": error.to_dict()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(directory: Path, max_pixels: int) -> Predictor:
    lean.load()
    prediction = importlib.import_module(PREDICTION)  # by name: what it loads has to come after timm
    torch.set_num_threads(1)
    Image.init()
    confine(max_pixels, SPARE_BYTES + WEIGHTS_COPIES * prediction.weights_bytes(directory))
    made: Predictor = prediction.Predictor(directory)
    return made


def _read(stream: BinaryIO, sizes: list[int]) -> list[bytes]:
    images = [stream.read(size) for size in sizes]
    if [len(image) for image in images] != sizes:
        raise EOFError("stdin ended within an image")
    return images


def _answer(predictor: Predictor, image: bytes, top: int) -> dict[str, Any]:
    try:
        return {"top": predictor.top(image, top)}
    # Pillow's decoders raise whatever a broken file leads them to.
    except Exception as error:
        return {"error": _told(error)}


def _told(error: Exception) -> dict[str, str]:
    """What a user is told."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return {"code": TOO_LARGE, "message": f"The image has more than {Image.MAX_IMAGE_PIXELS} pixels."}
    if isinstance(error, UnidentifiedImageError):
        return {"code": UNREADABLE, "message": "It is no image of the formats JPEG, PNG, WEBP, BMP."}
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"code": TOO_LARGE, "message": "The image takes more memory than it may."}
    return {"code": UNREADABLE, "message": f"The image cannot be decoded: {str(error)[:200] or type(error).__name__}."}


if __name__ == "__main__":
    main()
