"""The door of the API: what every request must pass before any route sees it.

It stands in front of the whole application, routes that do not exist included, and lets nothing in but what `PUBLIC`
names: a route added tomorrow is closed until somebody opens it. In order: a request id, the host's name, the origin,
the key and its scope, and of a change the body (`bodies`).

A run posts its events with the token of its attempt, which opens what begins with `RUN_PREFIX` and nothing else. A
browser that is signed in sends a cookie (`sessions`) in place of a key, for pages and for what they ask of the API; who
asks for a page and is nobody is shown where to sign in.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from scheduler.errors import D2ftError
from service.bodies import NUL, Limit, read_whole
from service.errors import ForbiddenError, InvalidRequestError, Issue, UnauthorisedError
from service.problems import problem_response
from service.sessions import Sessions
from service.settings import Settings
from service.store import Attempt, Caller, Store

SIGN_IN = "/ui/sign-in"
PUBLIC = frozenset({("GET", "/healthz"), ("GET", "/readyz"), ("GET", SIGN_IN), ("POST", SIGN_IN)})
PUBLIC_PREFIX = "/ui/static/"
RUN_PREFIX = "/v1/runs/"
RUN_PATH = f"{RUN_PREFIX}events"
ADMIN_PATHS = ("/v1/users", "/users")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PREDICT = re.compile(r"(?:/v1)?/jobs/[^/]+/predict")  # its bodies are images
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/?#\[\]]+))(?::\d*)?")


class Door:
    """ASGI middleware that admits requests with a valid key, one by one."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store, sessions: Sessions) -> None:
        self._app = app
        self._settings = settings
        self._store = store
        self._sessions = sessions
        self._names = frozenset(name.lower() for name in settings.host_names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._admit(scope, receive, send)
        else:  # nothing here speaks websocket: closed before it is open
            await send({"type": "websocket.close", "code": 1008})

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(headers.get("x-request-id"))
        send = _tagged(send, state["request_id"])
        try:
            self._check_host(headers)
            _check_origin(scope, headers)
            if not is_public(scope["method"], scope["path"]):
                await self._identify(scope, headers)
            _check_url(scope)
            if scope["method"] not in _SAFE:
                is_run = scope["path"] == RUN_PATH  # it tells what it met: what cannot be kept is replaced there
                limit: Limit = "max_predict_bytes" if _PREDICT.fullmatch(scope["path"]) else "max_body_bytes"
                receive = await read_whole(headers, receive, self._settings, limit=limit, may_hold_nul=is_run)
        except D2ftError as error:
            state["refused"] = error.code
            shown = isinstance(error, UnauthorisedError) and _is_visit(scope, headers)
            answer = _come_in(scope, headers) if shown else problem_response(scope, error)
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """A name that is not ours means a page that had its own name resolve to us."""
        if self._names and _host_name(headers.get("host", "")) not in self._names:
            message = "This service does not answer to that host name."
            raise ForbiddenError(message, code="unknown_host", remedy="Add it to D2FT_ALLOWED_HOSTS.")

    async def _identify(self, scope: Scope, headers: Headers) -> None:
        """Note on the request who sends it. Raises UnauthorisedError, and ForbiddenError where the key is too weak."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if scope["path"].startswith(RUN_PREFIX):
            scope["state"]["attempt"] = await self._attempt(given)
            return
        access = self._store.access
        caller = (access.known(given) or await asyncio.to_thread(access.caller, given)) if given else None
        if not given and (key_id := self._signed_in(scope, headers)):
            caller = await asyncio.to_thread(access.holder, key_id)
        if caller is None:
            raise UnauthorisedError(
                "A valid API key is needed.",
                code="unauthorised",
                remedy="Send 'Authorization: Bearer KEY'; on the server's machine the key is in D2FT_HOME/key.",
            )
        _check_scope(scope["method"], scope["path"], caller)
        scope["state"]["caller"] = caller

    def _signed_in(self, scope: Scope, headers: Headers) -> str | None:
        """The key behind the cookie; a change is taken only where the browser says that a page of ours asks for it."""
        key_id = self._sessions.key_id(headers.get("cookie", ""))
        said = headers.get("origin") or headers.get("sec-fetch-site") == "same-origin"
        if key_id is not None and scope["method"] not in _SAFE and not said:
            raise ForbiddenError("A change by cookie has to say from which page it comes.", code="foreign_origin")
        return key_id

    async def _attempt(self, token: str) -> Attempt:
        attempt = await asyncio.to_thread(self._store.attempts.by_token, token) if token else None
        if attempt is None:
            message = "No run that goes on has this token."
            raise UnauthorisedError(message, code="run_unknown", remedy="The attempt has ended: stop posting.")
        return attempt


def is_public(method: str, path: str) -> bool:
    """Whether anybody may ask for this."""
    return (method, path) in PUBLIC or (method in _SAFE and path.startswith(PUBLIC_PREFIX))


def is_page(path: str) -> bool:
    """Whether a path is one of the pages' own; programs have no business there."""
    return path == "/" or path.startswith("/ui/")


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Whether somebody goes to a page: a link or an address, in a browser."""
    return scope["method"] == "GET" and is_page(scope["path"]) and "text/html" in headers.get("accept", "")


def _come_in(scope: Scope, headers: Headers) -> Response:
    """Where to sign in. A link on another site comes without the cookie, so the visit is first made one of our own."""
    query = scope["query_string"].decode("ascii", "ignore")
    here = quote(scope["path"] + (f"?{query}" if query else ""), safe="/")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        again = quote(scope["path"], safe="/") + (f"?{quote(query, safe='=&%+')}" if query else "")
        return HTMLResponse(f'<!doctype html><title>d2ft</title><meta http-equiv="refresh" content="0; url={again}">')
    return RedirectResponse(f"{SIGN_IN}?next={here}", 303)


def _check_origin(scope: Scope, headers: Headers) -> None:
    """A browser says from which site a request comes; programs do not, and the key is their proof.

    A link to a page may stand anywhere: to follow it changes nothing.
    """
    origin, fetch_site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    foreign = origin is not None and _netloc(origin) != headers.get("host", "").lower()
    linked = _is_visit(scope, headers) and headers.get("sec-fetch-mode") == "navigate" and not foreign
    if foreign or (fetch_site not in ("none", "same-origin") and not linked):
        raise ForbiddenError("Requests are not taken from other sites.", code="foreign_origin")


def _check_url(scope: Scope) -> None:
    if NUL in scope["path"] or b"%00" in scope["query_string"]:
        raise InvalidRequestError([Issue("", "The address holds a NUL character.", "invalid_request")])


def _check_scope(method: str, path: str, caller: Caller) -> None:
    needed = "read" if method in _SAFE else "write"
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in ADMIN_PATHS):
        if not caller.is_admin:
            message = "Only an administrator's key with the scope 'admin' may do this."
            raise ForbiddenError(message, code="admin_only")
    elif needed not in caller.scopes and not caller.is_admin:
        message = f"This key may not do this: it lacks the scope '{needed}'."
        raise ForbiddenError(message, code="scope_missing", remedy="Make one that has it: POST /v1/keys.")


def _tagged(send: Send, request_id: str) -> Send:
    async def tag(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = request_id
            headers["X-Content-Type-Options"] = "nosniff"
            headers.setdefault("Cache-Control", "no-store")
            headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        await send(message)

    return tag


def _request_id(given: str | None) -> str:
    return given if given and re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else f"req_{ULID()}"


def _host_name(host: str) -> str:
    """The name in a Host header; "" where it has anything else than a name and a port."""
    found = _HOST.fullmatch(host.lower())
    return found.group(1) or found.group(2) if found else ""


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None where it has none, as "null", or cannot be read."""
    try:
        return urlsplit(origin.lower()).netloc or None
    except ValueError:
        return None
