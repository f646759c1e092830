"""What one worker did when in one step: the spans of `scheduler.gantt`, measured.

    wait, recv      until the message was there; what was left to do with it
    step, update    the sum of the tallies; the optimiser
    other           one span per instruction; a free counts with the instruction before it

Times are from this worker's own begin of the step: clocks of two machines are not compared, so spans of two workers may
be apart by as much as the workers began apart.
"""

from __future__ import annotations

import time
from itertools import pairwise

from scheduler.gantt import Span
from scheduler.program import Instruction


class Untraced:
    """Hears of a step and keeps nothing."""

    def begins(self, step_s: float, first_s: float) -> None: ...

    def turns(self) -> None: ...

    def did(self, instruction: Instruction, end_s: float) -> None: ...


UNTRACED = Untraced()


class Trace(Untraced):
    """Keeps when every instruction of a step ended, and when it turned from waiting, or summing, to its second part."""

    def __init__(self) -> None:
        self._step_s = self._first_s = 0.0
        self._turn_s: float | None = None
        self._done: list[tuple[Instruction, float | None, float]] = []

    def begins(self, step_s: float, first_s: float) -> None:
        """When the step began, and its first instruction, once the transport was open."""
        self._step_s, self._first_s = step_s, first_s

    def turns(self) -> None:
        """A message is there, or the update begins."""
        self._turn_s = time.perf_counter()

    def did(self, instruction: Instruction, end_s: float) -> None:
        self._done.append((instruction, self._turn_s, end_s))
        self._turn_s = None

    def spans(self, worker: int) -> list[Span]:
        """Every span of the step that took a microsecond, in order."""
        found: list[tuple[str, Instruction, float]] = []  # what, of which instruction, its end
        for instruction, turn_s, end_s in self._done:
            if instruction.kind == "free" and found:
                what, of, _ = found.pop()
                found.append((what, of, end_s))
                continue
            first, second = {"recv": ("wait", "recv"), "step": ("step", "update")}.get(instruction.kind, ("", ""))
            if turn_s is not None:
                found.append((first, instruction, turn_s))
            found.append((second if turn_s is not None else instruction.kind, instruction, end_s))
        ends_us = [round(1e6 * (at_s - self._step_s)) for at_s in (self._first_s, *(end_s for *_, end_s in found))]
        rows = zip(pairwise(ends_us), found, strict=True)
        return [_span(worker, *times, what, of) for times, (what, of, _) in rows if times[1] > times[0]]


def _span(worker: int, begin_us: int, end_us: int, what: str, of: Instruction) -> Span:
    return Span(worker, begin_us, end_us, what, *(() if what == "update" else (of.block, of.part, of.mb)))
