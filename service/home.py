"""The files of `D2FT_HOME` that hold secrets or say what runs: made private, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

KEY_FILE = "key"
SECRET_FILE = "secret"
SERVER_FILE = "server.json"
_PRIVATE = 0o600


def make_home(home: Path) -> None:
    """Make the directories, readable by their owner alone."""
    for directory in (home, home / "jobs", home / "logs", home / "storage"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def ensure_key(home: Path) -> str:
    """The API key, made at the first call."""
    return _ensure_secret(home / KEY_FILE, "d2ft_" + secrets.token_urlsafe(32))


def ensure_master_secret(home: Path) -> str:
    """From which secrets of webhooks and cookies follow; made at the first call. Another makes all of these invalid."""
    return _ensure_secret(home / SECRET_FILE, secrets.token_hex(32))


def ensure_ray_token(path: Path) -> str:
    """Ray's cluster token, made at the first call. Who has it can run code on the cluster."""
    return _ensure_secret(path, secrets.token_hex(32))


def read_secret(path: Path) -> str | None:
    """The secret in a file, or None where there is none."""
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def read_server(home: Path) -> dict[str, Any]:
    """What `up` noted of the processes it started; empty when nothing did, or the note is torn."""
    try:
        noted = json.loads((home / SERVER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def write_server(home: Path, noted: dict[str, Any]) -> None:
    write_private(home / SERVER_FILE, json.dumps(noted, indent=2))


def forget_server(home: Path) -> None:
    (home / SERVER_FILE).unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Replace a file at once, mode 0600: a reader sees the old text or the new, never half."""
    _draft(path, text).replace(path)


def _draft(path: Path, text: str) -> Path:
    """A whole private file beside `path`."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return draft


def _ensure_secret(path: Path, fresh: str) -> str:
    """The secret in the file; of several processes that find none, one makes it and all have that."""
    found = read_secret(path)
    if found:
        path.chmod(_PRIVATE)
        return found
    path.unlink(missing_ok=True)  # it was empty
    draft = _draft(path, fresh + "\n")
    with suppress(FileExistsError):
        path.hardlink_to(draft)  # fails where another was faster
    draft.unlink()
    return read_secret(path) or fresh
