"""Plays instruction lists against the cost model: the one clock behind ordering and forecasting.

Every worker has one or more lanes (lists). At each moment the worker whose next instruction can start earliest
runs it; among its lanes that can start at once the lowest wins. A recv can start when its message has
arrived; messages on one link follow each other. Ordering plays a lane per micro-batch, forecasting one lane per worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.cost import Costs
from scheduler.errors import DeadlockError
from scheduler.program import Instruction, MessageKey
from scheduler.transfers import message_bytes

Lanes = Sequence[Sequence[Instruction]]


@dataclass
class Playback:
    """What happened: per worker the instructions as run, µs busy, the end and peak bytes kept; bytes per link."""

    order: list[list[Instruction]]
    busy_us: list[int]
    end_us: list[int]
    link_bytes: list[list[int]]
    peak_bytes: list[int]


def play(workers: Sequence[Lanes], costs: Costs, *, max_in_flight: int | None = None) -> Playback:
    """Run all lanes to their ends; raises DeadlockError, showing where each worker stands.

    `max_in_flight` admits that many unfinished lanes at a time, counted from the lowest one unfinished on any worker.
    """
    return _Clock(workers, costs, max_in_flight).run()


def duration_us(costs: Costs, worker: int, instruction: Instruction) -> int:
    """µs that `instruction` computes on `worker`; sends, receives and frees cost nothing by themselves."""
    kind = instruction.kind
    if kind == "fwd":
        part = instruction.part
        return sum(costs.forward_us(worker, part, len(heads)) for heads in (instruction.full, instruction.only))
    if kind == "bwd":
        return costs.backward_us(worker, instruction.part, len(instruction.full))
    if kind == "sum":
        return costs.sum_us(worker)
    if kind in ("embed", "unembed"):
        return costs.embed_us(worker) // 2
    if kind == "classify":
        return costs.classify_us(worker)
    return 0


class _Clock:
    def __init__(self, workers: Sequence[Lanes], costs: Costs, max_in_flight: int | None) -> None:
        count = len(workers)
        self.workers, self.costs = workers, costs
        self.position = [[0] * len(lanes) for lanes in workers]
        self.window = max_in_flight or max(map(len, workers), default=1)
        self.lowest = 0
        self.now = [0] * count
        self.kept = [0] * count
        self.link_free = [[0] * count for _ in range(count)]
        self.arrival: dict[MessageKey, int] = {}
        self.seen = Playback(
            [[] for _ in workers], [0] * count, [0] * count, [[0] * count for _ in workers], [0] * count
        )

    def run(self) -> Playback:
        remaining = sum(len(lane) for lanes in self.workers for lane in lanes)
        self._advance_window()
        next_up = [self._next(w) for w in range(len(self.workers))]
        while remaining:
            ready = [(start, w, lane) for w, found in enumerate(next_up) if found for start, lane in [found]]
            if not ready:
                raise DeadlockError(self._standstill(), code="deadlock")
            start, worker, lane = min(ready)
            run = self._run_of(worker, lane)
            for instruction in run:
                self._execute(worker, instruction, start)
                start = self.now[worker]
            self.position[worker][lane] += len(run)
            remaining -= len(run)
            moved = self._advance_window()
            touched = range(len(self.workers)) if moved else {worker, *(i.peer for i in run if i.kind == "send")}
            for w in touched:
                next_up[w] = self._next(w)
        self.seen.end_us = self.now
        return self.seen

    def _run_of(self, worker: int, lane: int) -> Sequence[Instruction]:
        """The lane's next instruction with the sums, sends and frees behind it: what is computed is shipped at once."""
        instructions, begin = self.workers[worker][lane], self.position[worker][lane]
        end = begin + 1
        while end < len(instructions) and instructions[end].kind in ("sum", "send", "free"):
            end += 1
        return instructions[begin:end]

    def _next(self, worker: int) -> tuple[int, int] | None:
        """(earliest start, lane) of the worker's next instruction; None when all its lanes wait for unsent messages."""
        now, best = self.now[worker], None
        lanes, position = self.workers[worker], self.position[worker]
        for lane in range(self.lowest, min(self.lowest + self.window, len(lanes))):
            if position[lane] == len(lanes[lane]):
                continue
            instruction = lanes[lane][position[lane]]
            start: int | None = now
            if instruction.kind == "recv":
                arrival = self.arrival.get(instruction.key(worker))
                start = None if arrival is None else max(now, arrival)
            if start is not None and (best is None or start < best[0]):
                best = (start, lane)
            if best is not None and best[0] == now:
                return best
        return best

    def _execute(self, worker: int, instruction: Instruction, start: int) -> None:
        spent = duration_us(self.costs, worker, instruction)
        self.now[worker] = start + spent
        self.seen.busy_us[worker] += spent
        self.seen.order[worker].append(instruction)
        if instruction.kind == "send":
            self._send(worker, instruction)
        elif instruction.kind in ("fwd", "bwd") and instruction.full:
            kept = self.costs.kept_bytes(instruction.part, len(instruction.full))
            self.kept[worker] += kept if instruction.kind == "fwd" else -kept
            self.seen.peak_bytes[worker] = max(self.seen.peak_bytes[worker], self.kept[worker])

    def _send(self, worker: int, instruction: Instruction) -> None:
        peer = instruction.peer
        size = message_bytes(instruction, self.costs.shape, self.costs.step)
        begin = max(self.now[worker], self.link_free[worker][peer])
        done = begin + self.costs.transfer_us(worker, peer, size)
        self.link_free[worker][peer] = done - self.costs.transfer_us(worker, peer, 0)
        self.arrival[instruction.key(worker)] = done
        self.seen.link_bytes[worker][peer] += size

    def _advance_window(self) -> bool:
        """Move the window past lanes that every worker has finished; says whether it moved."""
        before = self.lowest
        count = max(map(len, self.workers), default=0)
        while self.lowest < count and all(
            self.lowest >= len(lanes) or self.position[w][self.lowest] == len(lanes[self.lowest])
            for w, lanes in enumerate(self.workers)
        ):
            self.lowest += 1
        return self.lowest != before

    def _standstill(self) -> str:
        lines = ["no worker can go on; each one waits for a message that nobody has sent:"]
        for worker, lanes in enumerate(self.workers):
            for lane, at in zip(lanes, self.position[worker], strict=True):
                if at < len(lane):
                    lines.append(f"  w{worker} at {at + 1}/{len(lane)}: {lane[at]}")
        return "\n".join(lines)
