"""A worker's process loads its modules when it starts, not when its work begins: meanwhile Ray sets the group up.

A hook of the job runs in every process of it; only those that are told a module by `MODULE` load anything.
"""

from __future__ import annotations

import importlib
import os

HOOK = "workers.early.load"
MODULE = "D2FT_LOAD_EARLY"
LEAN = "workers.lean"


def load() -> None:
    """Load the module that this process is told, and timm before it."""
    if name := os.environ.get(MODULE):
        importlib.import_module(LEAN).load()  # by name: it loads torch
        importlib.import_module(name)
