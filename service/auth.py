"""The door of the API: what every request must pass before any route sees it.

It stands in front of the whole application, routes that do not exist included, and lets nothing in but what `PUBLIC`
names: a route added tomorrow is closed until somebody opens it. In order: a request id, the host's name, the origin of
a change, the key, the size of the body.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from scheduler.errors import D2ftError
from service.errors import ForbiddenError, TooLargeError, UnauthorisedError
from service.problems import problem_response
from service.settings import Settings
from service.store import Store

PUBLIC = frozenset({("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("HEAD", "/readyz")})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Door:
    """ASGI middleware that admits requests with a valid key, one by one."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        self._app = app
        self._settings = settings
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._admit(scope, receive, send)
        # Anything else (a websocket) is not spoken here: no answer closes it.

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(headers.get("x-request-id"))
        send = _tagged(send, state["request_id"])
        try:
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            if (scope["method"], scope["path"]) not in PUBLIC:
                state["owner"] = await self._owner(headers)
            receive = await self._bounded(scope["method"], headers, receive)
        except D2ftError as error:
            await problem_response(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A name that is not ours means a page that had its own name resolve to us."""
        names = self._settings.host_names
        if names and _host_name(headers.get("host", "")) not in names:
            message = "This service does not answer to that host name."
            raise ForbiddenError(message, code="unknown_host", remedy="Add it to D2FT_ALLOWED_HOSTS.")

    def _check_origin(self, method: str, headers: Headers) -> None:
        """A browser says where a change comes from; programs do not, and the key is their proof."""
        if method in _SAFE:
            return
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ForbiddenError("Changes are not taken from other sites.", code="foreign_origin")

    async def _owner(self, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        owner = None
        if scheme.lower() == "bearer" and key.strip():
            owner = await asyncio.to_thread(self._store.keys.owner_of, key.strip())
        if owner is None:
            raise UnauthorisedError(
                "A valid API key is needed.",
                code="unauthorised",
                remedy="Send 'Authorization: Bearer KEY'; on the server's machine the key is in D2FT_HOME/key.",
            )
        return owner

    async def _bounded(self, method: str, headers: Headers, receive: Receive) -> Receive:
        """Read the body up to the limit, then play it back to the route."""
        if method in _SAFE:
            return receive
        limit, body, more = self._settings.max_body_bytes, b"", True
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise _too_large(limit)
        return _played_back(body, receive)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"The body is larger than {limit} bytes.", code="body_too_large")


def _played_back(body: bytes, receive: Receive) -> Receive:
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def play() -> Message:
        return rest.pop() if rest else await receive()

    return play


def _tagged(send: Send, request_id: str) -> Send:
    async def tag(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = request_id
            headers["X-Content-Type-Options"] = "nosniff"
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return tag


def _request_id(given: str | None) -> str:
    return given if given and re.fullmatch(r"[\w-]{1,64}", given) else f"req_{ULID()}"


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
