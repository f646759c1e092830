"""Who leads: of several processes on one store, the one that does what only one may do."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from contextlib import suppress

from service.errors import UnavailableError
from service.store import Store


class Lead:
    """One process's claim on a lease. It is extended after a third of its time, so that an idle loop seldom writes."""

    def __init__(self, store: Store, name: str, seconds: float) -> None:
        self._store = store
        self._name = name
        self._seconds = seconds
        self._me = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._extend_at = 0.0

    async def held(self) -> bool:
        """Whether this process leads; takes the lead where nobody does. Raises UnavailableError."""
        asked = time.monotonic()
        if asked < self._extend_at:
            return True
        leads = await asyncio.to_thread(self._store.leases.hold, self._name, self._me, self._seconds)
        self._extend_at = asked + self._seconds / 3 if leads else 0.0
        return leads

    def give_back(self) -> None:
        """Let another lead at once, where the store can be told."""
        with suppress(UnavailableError):
            self._store.leases.release(self._name, self._me)
