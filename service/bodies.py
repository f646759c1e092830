"""Bodies of requests: read whole before any route sees them, bounded in size and time.

A body of JSON has to be UTF-8, and to name each field once: Python's reader would take UTF-16, and of two values the
last, where a proxy in front of us may have read something else.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from service.errors import ConflictError, InvalidRequestError, Issue, SlowBodyError, TooLargeError
from service.settings import Settings


async def read_whole(headers: Headers, receive: Receive, settings: Settings) -> Receive:
    """Read the body up to the limit; what is returned plays it back to the route.

    Raises TooLargeError, SlowBodyError, and InvalidRequestError where it is JSON that cannot be relied upon.
    """
    limit = settings.max_body_bytes
    if _declared(headers) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await _read(receive, limit)
    except TimeoutError:
        message = f"The body did not arrive within {settings.body_timeout_s:g} s."
        raise SlowBodyError(message, code="body_too_slow", remedy="Send it faster, or in smaller parts.") from None
    if body and "json" in headers.get("content-type", "").lower():
        _check_json(body)
    return _played_back(body, receive)


def _declared(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text[:20]) if text.isdecimal() else 0


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":  # what came so far may look like a whole body
            raise ConflictError("The client has gone away.", code="client_gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _check_json(body: bytes) -> None:
    """Whether a field has the right value is the route's to say, NaN and infinity included: it can name the field."""
    try:
        json.loads(body.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise _unreadable("it is not UTF-8") from None
    except RecursionError:
        raise _unreadable("it is nested too deeply") from None
    except ValueError as error:
        raise _unreadable(str(error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequestError([Issue(twice, f"'{twice[:80]}' is given more than once.", "invalid_request")])
    return found


def _unreadable(why: str) -> InvalidRequestError:
    return InvalidRequestError([Issue("", f"The body cannot be read as JSON: {why}.", "invalid_json")])


def _too_large(limit: int) -> TooLargeError:
    message = f"The body is larger than {limit} bytes."
    return TooLargeError(message, code="body_too_large", remedy="Send less, or raise D2FT_MAX_BODY_BYTES.")


def _played_back(body: bytes, receive: Receive) -> Receive:
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def play() -> Message:
        return rest.pop() if rest else await receive()

    return play
