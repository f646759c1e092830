"""The door of the API: what every request must pass before any route sees it.

It stands in front of the whole application, routes that do not exist included, and lets nothing in but what `PUBLIC`
names: a route added tomorrow is closed until somebody opens it. In order: a request id, the host's name, the origin of
a change, the key and its scope, the size and speed of the body.

A run posts its events with the token of its attempt, which opens `RUN_PATH` and nothing else.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from scheduler.errors import D2ftError
from service.errors import ForbiddenError, SlowBodyError, TooLargeError, UnauthorisedError
from service.problems import problem_response
from service.settings import Settings
from service.store import Attempt, Caller, Store

PUBLIC = frozenset({("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("HEAD", "/readyz")})
RUN_PATH = "/v1/runs/events"
ADMIN_PATHS = ("/v1/users", "/users")
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
                await self._identify(scope, headers)
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

    async def _identify(self, scope: Scope, headers: Headers) -> None:
        """Note on the request who sends it. Raises UnauthorisedError, and ForbiddenError where the key is too weak."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if scope["path"] == RUN_PATH:
            scope["state"]["attempt"] = await self._attempt(given)
            return
        caller = await asyncio.to_thread(self._store.access.caller, given) if given else None
        if caller is None:
            raise UnauthorisedError(
                "A valid API key is needed.",
                code="unauthorised",
                remedy="Send 'Authorization: Bearer KEY'; on the server's machine the key is in D2FT_HOME/key.",
            )
        _check_scope(scope["method"], scope["path"], caller)
        scope["state"]["caller"] = caller

    async def _attempt(self, token: str) -> Attempt:
        attempt = await asyncio.to_thread(self._store.attempts.by_token, token) if token else None
        if attempt is None:
            message = "No run that goes on has this token."
            raise UnauthorisedError(message, code="run_unknown", remedy="The attempt has ended: stop posting.")
        return attempt

    async def _bounded(self, method: str, headers: Headers, receive: Receive) -> Receive:
        """Read the body up to the limit, then play it back to the route."""
        if method in _SAFE:
            return receive
        limit, declared = self._settings.max_body_bytes, headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await _read_body(receive, limit)
        except TimeoutError:
            message = f"The body did not arrive within {self._settings.body_timeout_s:g} s."
            raise SlowBodyError(message, code="body_too_slow", remedy="Send it faster, or in smaller parts.") from None
        return _played_back(body, receive)


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _check_scope(method: str, path: str, caller: Caller) -> None:
    needed = "read" if method in _SAFE else "write"
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in ADMIN_PATHS):
        if not caller.is_admin:
            message = "Only an administrator's key with the scope 'admin' may do this."
            raise ForbiddenError(message, code="admin_only")
    elif needed not in caller.scopes and not caller.is_admin:
        message = f"This key may not do this: it lacks the scope '{needed}'."
        raise ForbiddenError(message, code="scope_missing", remedy="Make one that has it: POST /v1/keys.")


def _too_large(limit: int) -> TooLargeError:
    message = f"The body is larger than {limit} bytes."
    return TooLargeError(message, code="body_too_large", remedy="Send less, or raise D2FT_MAX_BODY_BYTES.")


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
    return given if given and re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else f"req_{ULID()}"


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
