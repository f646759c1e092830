"""What `login` keeps for this user: a service's URL and key, in a private file of theirs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from service.home import write_private

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Profile:
    """A service and the key for it, which is sent to no other."""

    url: str
    key: str = field(repr=False)


def profile_path() -> Path:
    return platformdirs.user_config_path("d2ft") / "login.json"


def read_profile() -> Profile | None:
    """What was kept; None where nothing was, or the file is torn."""
    try:
        kept = json.loads(profile_path().read_text())
        return Profile(str(kept["url"]), str(kept["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_profile(profile: Profile) -> Path:
    path = profile_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, json.dumps(asdict(profile)))
    return path


def forget_profile() -> bool:
    """False when there was none."""
    there = profile_path().exists()
    profile_path().unlink(missing_ok=True)
    return there


def same_service(one: str, other: str) -> bool:
    """Whether two URLs name the same service, however they are written."""
    return _canonical(one) == _canonical(other)


def _canonical(url: str) -> tuple[str, str | None, int | None, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")
