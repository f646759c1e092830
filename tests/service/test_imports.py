"""The API process and the command line never load torch, timm or Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["service.app", "service.cli", "service.client"])
def test_importing_the_service_loads_neither_torch_nor_ray(module: str) -> None:
    heavy = ("torch", "timm", "ray", "torchvision", "safetensors", "sklearn", "PIL")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_the_client_loads_no_server() -> None:
    code = "import sys, service.client; print([n for n in ('fastapi', 'sqlalchemy', 'uvicorn') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
