"""Bounds of a process that opens what anyone may have written: memory, time, files and pixels. No numpy, no torch."""

from __future__ import annotations

import resource
import warnings

import psutil
from PIL import Image

BYTES_PER_PIXEL = 16  # what a WebP needs while it is decoded, its file apart; any other format needs less


def confine(max_pixels: int, spare_bytes: int) -> None:
    """Bound what this process may use from here on: an image of `max_pixels`, `spare_bytes` more, and no file."""
    limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + spare_bytes + BYTES_PER_PIXEL * max_pixels)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    Image.MAX_IMAGE_PIXELS = max_pixels
    # Pillow looks at the header before it decodes, and only warns of what is not twice too large.
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def limit(kind: int, value: int) -> None:
    """Lower a limit of this process for good; one that is lower already stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def allow_cpu(seconds: int) -> None:
    """Let this process compute so much longer; what it did before does not count."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))
