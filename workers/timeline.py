"""One step as all workers lived it: traced once in a window, gathered and told by rank 0, at most once a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from scheduler.gantt import MOST_SPANS, chart, row_of
from workers.gather import gather_json
from workers.spans import Span
from workers.steps import SHOW, StepReport
from workers.trace import Trace
from workers.transport import Transport

WARM = 2  # steps of a window before the one that is traced
PERIOD_S = 60.0


class Timeline:
    """Tells of traced steps. Rank 0 looks at its clock and wishes; what it wishes, all do behind the step."""

    def __init__(self, transport: Transport, device: torch.device, emit: Callable[..., None]) -> None:
        self._transport, self._device, self._emit = transport, device, emit
        self._told_at = -PERIOD_S

    def trace(self, step: int, window: Span, cycle: int) -> Trace | None:
        """What the step is to be traced by, under a plan of so many tables, if it is."""
        return Trace() if is_traced(step, window, cycle) else None

    def wishes(self, trace: Trace | None) -> int:
        """SHOW where rank 0 would tell of the step."""
        due = self._transport.rank == 0 and time.monotonic() - self._told_at >= PERIOD_S
        return SHOW if due and trace is not None else 0

    def tell(self, step: int, window: Span, trace: Trace | None, report: StepReport) -> None:
        """Where rank 0 has wished for it, gather what every worker did; collective then.

        A chart of more than `MOST_SPANS` is left out.
        """
        if trace is None or not report.wishes & SHOW:
            return
        self._told_at = time.monotonic()
        spans = trace.spans(self._transport.rank)
        rows = [row_of(span) for span in spans] if len(spans) <= MOST_SPANS else None
        mine = {"step_us": round(1e6 * report.wall_s), "rows": rows}
        everyone = gather_json(self._transport, mine, self._device)
        workers = [of["rows"] for of in everyone]
        if any(each is None for each in workers) or sum(map(len, workers)) > MOST_SPANS:
            return
        told: dict[str, Any] = chart(workers, max(of["step_us"] for of in everyone))
        self._emit("timeline", f"step {step + 1}, as measured", **told, step=step + 1, window=window.number)


def is_traced(step: int, window: Span, cycle: int) -> bool:
    """Whether this is the one step of a window that is traced, under a plan of so many tables.

    It is the third, when all is warm, or the next under the cycle's first table, which the forecast shows; of a window
    that has none the last that is no later than the third.
    """
    third = min(window.first + WARM, window.end - 1)
    alike = third + (window.begin - third) % cycle
    return step == (alike if alike < window.end else third)
