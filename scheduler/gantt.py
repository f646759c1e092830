"""A step as a Gantt chart, in numbers: what every worker does when, for whoever draws it.

    span       one instruction, or the time that a worker waits for the message it reads next
    busy       Σ spans that are no waits
    wait       Σ waits; what is left of the step after a worker's last span is idle

Spans of one worker never overlap. Instructions that take no time leave no span. A chart goes into events and pages, so
it is given only where it has at most `MOST_SPANS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler import timing
from scheduler.compiler import rehearse
from scheduler.cost import Costs
from scheduler.domain import Plan
from scheduler.program import Program

FIELDS = ("begin_us", "end_us", "what", "block", "part", "mb")
MOST_SPANS = 8500  # of one chart, 310 kB: ViT-L on 16 devices, five micro-batches, has up to 8,200


@dataclass(frozen=True)
class Span:
    """`what` is the instruction's kind, "wait" or "update"; block, mb -1 and part "" where there is none."""

    worker: int
    begin_us: int
    end_us: int
    what: str
    block: int = -1
    part: str = ""
    mb: int = -1

    @property
    def duration_us(self) -> int:
        return self.end_us - self.begin_us


def of_plan(plan: Plan, costs: Costs, *, embed_grad: bool) -> list[Span]:
    """The spans of the first step of the plan's cycle."""
    seen = rehearse(plan.placement, plan.cycle[0], costs, embed_grad=embed_grad, skip_fill=plan.skip_fill)
    return spans_of(seen, costs)


def spans(programs: Sequence[Program], costs: Costs) -> list[Span]:
    """The spans of one step by worker and time; raises DeadlockError."""
    return spans_of(timing.play([[program.instructions] for program in programs], costs), costs)


def spans_of(seen: timing.Playback, costs: Costs) -> list[Span]:
    """The spans of a step that was played to its end."""
    return [span for worker in range(len(seen.order)) for span in _of_worker(worker, seen, costs)]


def _of_worker(worker: int, seen: timing.Playback, costs: Costs) -> Iterator[Span]:
    now = 0
    for instruction, begin in zip(seen.order[worker], seen.begin_us[worker], strict=True):
        place = (instruction.block, instruction.part, instruction.mb)
        if begin > now:
            yield Span(worker, now, begin, "wait", *place)
        now = begin + timing.duration_us(costs, worker, instruction)
        if now > begin:
            yield Span(worker, begin, now, instruction.kind, *place)
    if update_us := timing.update_us(costs, worker, seen.order[worker]):
        yield Span(worker, now, now + update_us, "update")


def busy_us(found: Iterable[Span]) -> dict[int, int]:
    """µs of work by worker."""
    return _sums(span for span in found if span.what != "wait")


def wait_us(found: Iterable[Span]) -> dict[int, int]:
    """µs of waiting by worker."""
    return _sums(span for span in found if span.what == "wait")


def to_dict(found: Sequence[Span]) -> dict[str, Any]:
    """Compact JSON: the step's end, and per worker a list of rows in the order of `fields`."""
    workers: list[list[list[Any]]] = [[] for _ in range(1 + max((s.worker for s in found), default=-1))]
    for s in found:
        workers[s.worker].append(row_of(s))
    return chart(workers, max((s.end_us for s in found), default=0))


def row_of(span: Span) -> list[Any]:
    return [getattr(span, name) for name in FIELDS]


def chart(workers: Sequence[Sequence[list[Any]]], step_us: int) -> dict[str, Any]:
    """Compact JSON of every worker's rows."""
    return {"fields": list(FIELDS), "step_us": step_us, "workers": list(workers)}


def from_dict(data: dict[str, Any]) -> list[Span]:
    """Inverse of `to_dict`."""
    return [Span(worker, *row) for worker, rows in enumerate(data["workers"]) for row in rows]


def _sums(found: Iterable[Span]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for span in found:
        sums[span.worker] = sums.get(span.worker, 0) + span.duration_us
    return sums
