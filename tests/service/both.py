"""The async client as if it were the sync one, so that one test is run by both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

from service.client import AsyncClient, AsyncJobHandle


class Blocking:
    """An object with async methods, whose methods block; iterators of it are plain iterators."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._blocking(found) if inspect.ismethod(found) else found

    def __repr__(self) -> str:
        return repr(self._inner)

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._inner.close())
        self._runner.close()

    def _blocking(self, method: Any) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            found = method(*words, **named)
            if inspect.isasyncgen(found):
                return self._iterate(found)
            if inspect.isawaitable(found):
                found = self._runner.run(_awaited(found))
            return Blocking(found, self._runner) if isinstance(found, AsyncJobHandle) else found

        return call

    def _iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()
        while (item := self._runner.run(_next(items, end))) is not end:
            yield item


def blocking_client(url: str, key: str | None, **options: Any) -> Blocking:
    """Made like a `Client`."""
    return Blocking(AsyncClient(url, key, **options), asyncio.Runner())


async def _awaited(found: Any) -> Any:
    return await found


async def _next(items: AsyncIterator[Any], end: object) -> Any:
    return await anext(items, end)
