"""Waiting for what others do, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.02


def until(done: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until `done` is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds:g} s")
        time.sleep(POLL_S)
