"""Every route of the application with its methods, those included that its description leaves out."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from service.routes import world
from service.store import Store

UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
NOTHING = ("/", "/nothing", "/v1", "/v1/nothing", "/docs", "/redoc", "/static/x", "/v2/jobs", "/admin")


@dataclass(frozen=True)
class Found:
    """One route: its path as it was declared, one method, and whether only administrators may ask it."""

    method: str
    path: str
    by_admin: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the ids in the path."""
        return tuple(re.findall(r"{(\w+)", self.path))

    @property
    def case(self) -> tuple[str, str]:
        """The method and the path as it stands under /v1: what the routes without /v1 do, too."""
        return self.method, self.path if self.path.startswith("/v1/") else f"/v1{self.path}"

    def fill(self, **ids: str) -> str:
        """The path with ids in it; "x" where none is given."""
        return re.sub(r"{(\w+)(:path)?}", lambda name: ids.get(name[1], "x"), self.path)


def walk(app: Any) -> list[Found]:
    assert isinstance(app, FastAPI)
    return list(_walk(app))


def _walk(app: FastAPI) -> Iterator[Found]:
    for route in iter_route_contexts(app.routes):
        assert route.path is not None and route.methods, f"{route} is no plain route: say here what it answers"
        by_admin = world._admin in _calls(getattr(route, "dependant", None))
        for method in sorted(route.methods):
            yield Found(method, route.path, by_admin)


def _calls(dependant: Any) -> set[Callable[..., Any]]:
    return set() if dependant is None else {each.call for each in dependant.dependencies}


async def statuses(
    app: Any, asked: Iterable[tuple[str, str]], headers: Mapping[str, str]
) -> dict[tuple[str, str], int]:
    """What the application answers, asked without a client, which would put the path in order first."""
    return {(method, path): await _status(app, method, path, headers) for method, path in asked}


async def _status(app: Any, method: str, path: str, headers: Mapping[str, str]) -> int:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 7421),
    }
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    await app(scope, receive, send)
    return found[0]


def store_of(api: TestClient) -> Store:
    found: Store = api.app.state.world.store  # type: ignore[attr-defined]
    return found


def key_for(api: TestClient, user: str, *scopes: str, role: str = "member", **limits: Any) -> dict[str, str]:
    """The headers of a new key of a user, who is made unless they are there."""
    made = api.post("/v1/users", json={"name": user, "role": role, **limits})
    assert made.status_code in (201, 409), made.text
    body = {"user": user, "scopes": list(scopes or ("read", "write"))}
    answer = api.post("/v1/keys", json=body)
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['key']}"}


def raw(url: str, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """What comes back for these very bytes, until the other side closes or says nothing more."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout_s) as connection:
        connection.sendall(request)
        return received(connection)


def received(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
    except (TimeoutError, ConnectionError):
        pass
    return answer


def head(method: str, target: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A request without a body, which has the connection closed behind its answer."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
