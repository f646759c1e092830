"""Which steps the windows of a job cover."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """The steps of a window, from `begin` up to `end`; those before `first` were done in an earlier attempt."""

    number: int
    begin: int
    end: int
    first: int


def window_spans(total_steps: int, window: int, shares: list[float]) -> list[Span]:
    """All windows, numbered from 1: `window` steps long, or shorter before a phase of the schedule ends."""
    # The first step at or behind a phase's end belongs to the next phase, as `PlanRequest.at` has it.
    ends = [math.ceil((sum(shares[: i + 1]) - 1e-9) * total_steps) for i in range(len(shares) - 1)]
    spans, begin = list[Span](), 0
    for border in (*ends, total_steps):
        while begin < border:
            spans.append(Span(len(spans) + 1, begin, min(begin + window, border), begin))
            begin = spans[-1].end
    return spans


def spans_from(spans: list[Span], step: int) -> list[Span]:
    """What is left when so many steps are done: borders and numbers stay, the first is the rest of its window."""
    return [replace(span, first=max(span.first, step)) for span in spans if span.end > step]
