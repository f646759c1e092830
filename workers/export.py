"""Other forms of a result's model, made by a process of its own: what breaks there costs that form and not the run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from workers.disk import sync

ONNX_FILE = "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript")  # of the extra "onnx"
ONNX_MODULE = "workers.onnx_export"
TIMEOUT_S = 240.0  # the watchdog allows more silence


def export_onnx(directory: Path, warn: Callable[[str], None], *, timeout_s: float = TIMEOUT_S) -> bool:
    """Write `model.onnx` into a result folder that has weights and config; False, after a warning, where it fails."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        warn(
            f"There is no {ONNX_FILE}: {' and '.join(missing)} is not installed. Install 'd2ft[onnx]' for the workers."
        )
        return False
    command = [sys.executable, "-m", ONNX_MODULE, "--directory", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        warn(f"There is no {ONNX_FILE}: {error}.")
        return _drop(directory)
    if done.returncode or not (directory / ONNX_FILE).is_file():
        said = done.stderr.strip().splitlines()
        warn(f"There is no {ONNX_FILE}: the export ended with {done.returncode}: {said[-1][:500] if said else ''}")
        return _drop(directory)
    sync(directory / ONNX_FILE)
    return True


def _drop(directory: Path) -> bool:
    (directory / ONNX_FILE).unlink(missing_ok=True)
    return False
