"""What the service logs, caught as it would be written; and patience for what happens in its own time."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

from service import logs


class Log:
    """Everything that is logged while it is entered, at DEBUG, by loggers that are silent otherwise, too."""

    def __init__(self, known: list[str | None]) -> None:
        self._stream = io.StringIO()
        self._levels: dict[logging.Logger, int] = {}
        self.handler = logs.handler(known, self._stream)

    def __enter__(self) -> Log:
        root = logging.getLogger()
        root.addHandler(self.handler)
        for logger in (root, *map(logging.getLogger, ("httpx2", "httpcore2"))):
            self._levels[logger] = logger.level
            logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self.handler)
        for logger, level in self._levels.items():
            logger.setLevel(level)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def of(self, **facts: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if facts.items() <= line.items()]
