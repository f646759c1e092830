"""Sends a run's events to the service, for clusters whose disks the service does not see.

    events.jsonl ── read from the server's offset ──► POST {"attempt", "events": [{..., "seq": offset behind the line}]}
                                        ▲                          │
                                        └── {"offset", "want"} ◄───┘

The file is written first and is the truth; a thread reads it, so that training never waits for a network. The first
post brings no events and asks how far the server is: whoever died before, nothing is lost and nothing comes twice. What
fails is tried again for as long as the run lives, unless the server says that this attempt no longer owns its job.

Of wishes only "pause" is acted on here: to cancel a run, the service stops its Ray job. One that it has not ordered it
cannot stop: the driver of such a run, which posts by itself, is told to `end` by a SIGTERM to its own process.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from workers.control import CANCEL, PAUSE, ask, asked
from workers.events import EVENTS_FILE, read_events

MAX_EVENTS, MAX_BYTES = 500, 480_000  # of one post, with room for what it adds to the lines; a larger event goes alone
PERIOD_S = 0.25  # between two posts while lines keep coming
SILENCE_S = 5.0  # after so long without a line, ask for wishes all the same
BACKOFF_S = 5.0  # the longest wait after a failure
REQUEST_S = 10.0
CLOSE_S = 5.0
OWNED_NO_MORE = frozenset({401, 403, 404, 409, 410})

_LOG = logging.getLogger(__name__)


class Source(Protocol):
    """Whose events are sent: the context of a run, or of a sweep."""

    @property
    def run_dir(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def post_url(self) -> str | None: ...
    @property
    def post_token(self) -> str | None: ...


@contextmanager
def posting(
    context: Source, close_s: float = CLOSE_S, end: Callable[[], None] | None = None
) -> Iterator[Poster | None]:
    """Send the run's events during the block, and what is left in the `close_s` behind it; nothing without a URL.

    `end` is called once, on another thread, where the run is to be cancelled and nobody else would do it.
    """
    if context.post_url is None:
        yield None
        return
    poster = Poster(context, context.post_url, end)
    try:
        yield poster
    finally:
        poster.close(close_s)


class Poster:
    """A thread that follows the event file; `close` waits for the tail."""

    def __init__(self, context: Source, url: str, end: Callable[[], None] | None = None) -> None:
        self._run_dir, self._attempt, self._url = Path(context.run_dir), context.attempt, url
        self._headers = {"Authorization": f"Bearer {context.post_token}", "Content-Type": "application/json"}
        self._http = opener()
        self._offset: int | None = None  # what the server has; None before it has said
        self._failures = 0
        self._end = end
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._follow, name="poster", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Try to send what is left for so long; never raises."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)

    def _follow(self) -> None:
        posted_at = -SILENCE_S
        while True:
            closing = self._closing.is_set()  # looked at before the file: what was written before `close` is seen
            events = [] if self._offset is None else next_batch(self._run_dir / EVENTS_FILE, self._offset)
            if events or self._offset is None or time.monotonic() - posted_at > SILENCE_S:
                if not self._post(events):
                    return
                posted_at = time.monotonic()
            elif closing:
                return
            if closing and time.monotonic() > self._deadline:
                _LOG.warning("the service has not got the last events of this run")
                return
            self._wait()

    def _wait(self) -> None:
        """Until the next post: longer after failures; hardly at all for the tail."""
        backoff_s = min(BACKOFF_S, PERIOD_S * 2 ** min(self._failures, 10))
        if not self._closing.wait(backoff_s if self._failures else PERIOD_S) or not self._failures:
            return
        time.sleep(max(0.0, min(backoff_s, PERIOD_S, self._deadline - time.monotonic())))

    def _post(self, events: list[dict[str, Any]]) -> bool:
        """Send a batch; False when this attempt does not own its job any more."""
        body = json.dumps({"attempt": self._attempt, "events": events}, separators=(",", ":")).encode()
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with self._http.open(request, timeout=REQUEST_S) as response:
                answer = json.loads(response.read())
            self._offset = int(answer["offset"])
            self._heed(answer.get("want"))
        except urllib.error.HTTPError as error:
            with error:
                if error.code in OWNED_NO_MORE:
                    _LOG.warning("the service takes no more events of this attempt: status %d", error.code)
                    return False
            self._failed(f"status {error.code}")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            self._failed(f"{type(error).__name__}: {error}")
        else:
            if events and self._offset < events[0]["seq"]:
                self._failed("the server did not take the events")
            else:
                self._failures = 0
        return True

    def _heed(self, want: str | None) -> None:
        if want == PAUSE and asked(self._run_dir) != PAUSE:
            ask(self._run_dir, PAUSE)
        if want == CANCEL and self._end is not None:
            ask(self._run_dir, CANCEL)
            end, self._end = self._end, None
            end()

    def _failed(self, why: str) -> None:
        self._failures += 1
        if self._failures == 1:
            _LOG.warning("events cannot be sent to the service, trying again: %s", why)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: a token is for the one address that it was sent to."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: urllib then raises the status."""


def opener() -> urllib.request.OpenerDirector:
    """What speaks to the service. No proxy: it is on the cluster's own network, or said by its address."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirects)


def next_batch(path: Path, offset: int) -> list[dict[str, Any]]:
    """The events behind `offset` that fit into one post; `seq` becomes the offset behind the line."""
    events: list[dict[str, Any]] = []
    begin = offset
    for behind, event in read_events(path, offset):
        if events and (len(events) == MAX_EVENTS or behind - begin > MAX_BYTES):
            break
        events.append({**event, "seq": behind})
    return events
