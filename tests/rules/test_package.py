"""What `ray job submit --working-dir .` uploads: the code, and nothing that is secret or large."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import _zip_files

ROOT = Path(__file__).parents[2]
MOST_BYTES = 20e6
LEFT = (
    ".env", ".env.production", "deep/.env", "tls/server.pem", "tls/server.key", "auth_token", "id_rsa", ".netrc",
    ".aws/credentials", "credentials.json", "secrets.yaml", ".git/config", ".venv/pyvenv.cfg", ".bench/a.json",
    "data/images/1.jpg", "checkpoints/step-1/rank000.safetensors", "runs/a/checkpoints/x", "tests/service/data/a.png",
    "node_modules/a.js", "d2ft.db", "driver.log",
)  # fmt: skip
TAKEN = ("workers/data.py", "workers/checkpoint.py", "workers/sources/folder.py", "notes.txt", "pyproject.toml")


def package(directory: Path, into: Path) -> zipfile.ZipFile:
    """As Ray's own client makes it."""
    _zip_files(str(directory), [], str(into), include_gitignore=True, logger=logging.getLogger("ray"))
    return zipfile.ZipFile(into)


def test_secrets_and_data_stay_here(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(ROOT / ".rayignore", tmp_path / "a")
    for name in (*LEFT, *TAKEN):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hush")
    with package(tmp_path / "a", tmp_path / "a.zip") as zipped:
        names = {name for name in zipped.namelist() if not name.endswith("/")}
    assert names == {*TAKEN, ".rayignore"}


@pytest.mark.filterwarnings("ignore")
def test_a_checkout_is_uploaded_with_all_that_a_job_needs(tmp_path: Path) -> None:
    with package(ROOT, tmp_path / "all.zip") as zipped:
        names = set(zipped.namelist())
    code = [path for room in ("workers", "scheduler") for path in (ROOT / room).rglob("*.py")]
    weights = list((ROOT / "workers" / "bundled").glob("*.safetensors"))
    assert weights and {str(path.relative_to(ROOT)) for path in (*code, *weights)} <= names
    assert not any(name.startswith((".git/", ".venv/", "tests/")) for name in names)
    assert (tmp_path / "all.zip").stat().st_size < MOST_BYTES
