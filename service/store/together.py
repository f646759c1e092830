"""Pieces of writing that come at the same time, written in one transaction: they wait for the disk once.

One thread writes. What is asked for while it is busy waits and is written next, all of it together; an answer comes
once its transaction is committed. With one caller at a time this is one transaction for each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from service.store.database import Database

MOST = 64  # pieces in one transaction: it holds up other writers
Piece = TypeVar("Piece")
Answer = TypeVar("Answer")


class Together(Generic[Piece, Answer]):
    """Writes pieces by `write`, which gives for each its answer, or what to raise for that one alone.

    What `write` itself raises, or the commit, undoes all pieces of the transaction and is raised for each of them.
    """

    def __init__(
        self, database: Database, write: Callable[[Session, Sequence[Piece]], Sequence[Answer | Exception]]
    ) -> None:
        self._database = database
        self._write = write
        self._waiting: deque[tuple[Piece, Future[Answer]]] = deque()
        self._thread = ThreadPoolExecutor(1, "store-writer")

    async def __call__(self, piece: Piece) -> Answer:
        answer: Future[Answer] = Future()
        self._waiting.append((piece, answer))
        self._thread.submit(self._write_waiting)
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._thread.shutdown()

    def _write_waiting(self) -> None:
        """One transaction for all that waits; on the writer's thread alone."""
        waiting = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))]
        batch = [(piece, answer) for piece, answer in waiting if answer.set_running_or_notify_cancel()]
        if not batch:
            return
        outcomes: Sequence[Answer | Exception]
        try:
            pieces = [piece for piece, _ in batch]
            outcomes = self._database.write_again(lambda session: self._write(session, pieces))
        except Exception as error:
            outcomes = [error] * len(batch)
        for (_, answer), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
