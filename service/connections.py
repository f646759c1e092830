"""Connections on which no request comes: closed after a while.

The server's own clock runs between two requests only: one who opens a connection and never ends the head of a request
would keep it, and one of the process's file descriptors, for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Impatient(H11Protocol):
    """HTTP/1.1 that waits `head_timeout_s` for the head of a request. How long a body takes is the door's to say."""

    head_timeout_s: float
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wind()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wind(self) -> None:
        self._stop()
        self._clock = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def impatient(head_timeout_s: float) -> type[Impatient]:
    """The protocol with this patience; the server makes one of it for every connection."""
    return type("Impatient", (Impatient,), {"head_timeout_s": head_timeout_s})
