"""A TCP proxy that breaks connections: what lies between a client and a service on a bad day."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class Cut(NamedTuple):
    """When a connection is broken: once so many bytes of answers went through, or so many seconds have passed."""

    after_bytes: int | None = None
    after_s: float | None = None


class Proxy:
    """Forwards to a port of this machine; `cut` says for the n-th connection how it ends."""

    def __init__(self, port: int, cut: Callable[[int], Cut]) -> None:
        self._port = port
        self._cut = cut
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.num_connections = 0
        self.num_cuts = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=(client, self._cut(self.num_connections)))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, cut: Cut) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            try:
                self._forward(client, server, cut)
            except OSError:
                return

    def _forward(self, client: socket.socket, server: socket.socket, cut: Cut) -> None:
        left = cut.after_bytes
        ends_at = None if cut.after_s is None else time.monotonic() + cut.after_s
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self._closing:
                if ends_at is not None and time.monotonic() >= ends_at:
                    self.num_cuts += 1
                    return
                for key, _ in ready.select(0.05):
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    piece = source.recv(65536)
                    if not piece:
                        return
                    if source is server and left is not None:
                        piece = piece[:left]
                        left -= len(piece)
                    target.sendall(piece)
                    if left == 0:
                        self.num_cuts += 1
                        return
