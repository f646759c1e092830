"""What both clients tell their HTTP library: where to, as whom, how patiently."""

from __future__ import annotations

import importlib.metadata
from typing import Any
from urllib.parse import urlsplit

import httpx2

from scheduler.errors import UserError
from service.client.calls import Call

CONNECT_S = 10.0
_LOCAL = ("127.0.0.1", "localhost", "::1")


def connection(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of `httpx2.Client` and `httpx2.AsyncClient`. Raises UserError where the URL is none."""
    headers = {"User-Agent": f"d2ft-client/{version()}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # A proxy from the environment has no business between us and this machine.
    trust_env = _host(url) not in _LOCAL
    return {"base_url": url, "headers": headers, "timeout": _timeout(timeout_s), "trust_env": trust_env}


def request_of(call: Call[Any]) -> dict[str, Any]:
    """Arguments of `build_request`."""
    given = {"method": call.method, "url": call.path, "headers": dict(call.headers)}
    return {
        **given,
        **({"params": list(call.params)} if call.params else {}),
        **({"json": call.body} if call.body is not None else {}),
        **({"files": [("images", file) for file in call.files]} if call.files else {}),
        **({"timeout": _timeout(call.timeout_s)} if call.timeout_s is not None else {}),
    }


def version() -> str:
    try:
        return importlib.metadata.version("d2ft")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=min(seconds, CONNECT_S))


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        remedy = "Give it like http://host:7421."
        raise UserError(f"'{url}' is not the address of a service.", code="invalid_url", param="url", remedy=remedy)
    return host
