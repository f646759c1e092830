"""A server of http.server that answers in a thread for as long as a block lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseServer

POLL_S = 0.01
JOIN_S = 10.0


@contextmanager
def listening(server: BaseServer) -> Iterator[None]:
    """The server answers during the block, and its port is free behind it."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_S}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(JOIN_S)
