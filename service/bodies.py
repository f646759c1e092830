"""Bodies of requests: read whole before any route sees them, bounded in size and time.

A body of JSON has to be UTF-8, and to name each field once: Python's reader would take UTF-16, and of two values the
last, where a proxy in front of us may have read something else. Nor has it a NUL, which not every database can keep,
or more than `MAX_DEPTH` levels: what walks through it later would run out of stack.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any, Literal

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from service.errors import ConflictError, InvalidRequestError, Issue, SlowBodyError, TooLargeError
from service.settings import Settings

Limit = Literal["max_body_bytes", "max_predict_bytes"]
NUL = "\0"
MAX_DEPTH = 64
MAX_BRACKETS = 50_000  # small as they are in a body, they take long to make, and nothing else runs meanwhile
LARGE = 1 << 14  # a body that takes long to look at is not looked at on the event loop
TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"

_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_whole(
    headers: Headers,
    receive: Receive,
    settings: Settings,
    *,
    limit: Limit = "max_body_bytes",
    may_hold_nul: bool = False,
) -> Receive:
    """Read the body up to the limit of that setting; what is returned plays it back to the route.

    Raises TooLargeError, SlowBodyError, and InvalidRequestError where it is JSON that cannot be relied upon.
    """
    max_bytes: int = getattr(settings, limit)
    if _declared(headers) > max_bytes:
        raise _too_large(max_bytes, limit)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await _read(receive, max_bytes, limit)
    except TimeoutError:
        message = f"The body did not arrive within {settings.body_timeout_s:g} s."
        raise SlowBodyError(message, code="body_too_slow", remedy="Send it faster, or in smaller parts.") from None
    if body and "json" in headers.get("content-type", "").lower():
        if len(body) > LARGE:
            await asyncio.to_thread(_check_json, body, may_hold_nul=may_hold_nul)
        else:
            _check_json(body, may_hold_nul=may_hold_nul)
    return _played_back(body, receive)


def _declared(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text[:20]) if text.isdecimal() else 0


async def _read(receive: Receive, max_bytes: int, limit: Limit) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":  # what came so far may look like a whole body
            raise ConflictError("The client has gone away.", code="client_gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > max_bytes:
            raise _too_large(max_bytes, limit)
    return b"".join(parts)


def _check_json(body: bytes, *, may_hold_nul: bool) -> None:
    """Whether a field has the right value is the route's to say, NaN and infinity included: it can name the field."""
    num_brackets = body.count(b"[") + body.count(b"{")
    if num_brackets > MAX_BRACKETS:
        raise _unreadable(f"it has more than {MAX_BRACKETS} lists and objects")
    try:
        found = json.loads(body.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise _unreadable("it is not UTF-8") from None
    except RecursionError:
        raise _unreadable(TOO_DEEP) from None
    except ValueError as error:
        raise _unreadable(str(error)) from None
    if num_brackets > MAX_DEPTH and _is_deep(body):
        raise _unreadable(TOO_DEEP)
    if b"\\u0000" in body and not may_hold_nul and (path := _place_of_nul(found)) is not None:
        field = ".".join(map(str, path))
        raise InvalidRequestError([Issue(field, f"{field or 'The body'} holds a NUL character.", "invalid_request")])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequestError([Issue(twice, f"'{twice[:80]}' is given more than once.", "invalid_request")])
    return found


def _is_deep(body: bytes) -> bool:
    """Whether what is known to be JSON has too many levels: take away the innermost brackets as often as may be."""
    brackets = _TEXT.sub(b"", body).translate(_SQUARE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _place_of_nul(value: Any) -> list[str | int] | None:
    """The way to the first text or name that holds one."""
    if isinstance(value, str):
        return [] if NUL in value else None
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for name, item in items:
        if isinstance(name, str) and NUL in name:
            return []
        if (place := _place_of_nul(item)) is not None:
            return [name, *place]
    return None


def _unreadable(why: str) -> InvalidRequestError:
    return InvalidRequestError([Issue("", f"The body cannot be read as JSON: {why}.", "invalid_json")])


def _too_large(max_bytes: int, limit: Limit) -> TooLargeError:
    message = f"The body is larger than {max_bytes} bytes."
    return TooLargeError(message, code="body_too_large", remedy=f"Send less, or raise D2FT_{limit.upper()}.")


def _played_back(body: bytes, receive: Receive) -> Receive:
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def play() -> Message:
        return rest.pop() if rest else await receive()

    return play
