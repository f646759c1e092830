"""Plays instruction lists against the cost model: the one clock behind ordering and forecasting.

Every worker has one or more lanes (lists). At each moment the worker whose next instruction can start earliest
runs it; among its lanes that can start at once the lowest wins. A recv can start when its message has
arrived; messages on one link follow each other. Ordering plays a lane per micro-batch, forecasting one lane per worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.cost import Costs
from scheduler.errors import DeadlockError
from scheduler.program import Instruction
from scheduler.transfers import message_bytes

Lanes = Sequence[Sequence[Instruction]]
Message = int  # names a message: a number is cheaper than `Instruction.key`, and a step has thousands
NEVER = 1 << 62  # when a message arrives that nobody has sent yet
PLACES = 1 << 16  # more than there are blocks or micro-batches
SHIPPED = frozenset({"sum", "send", "free"})  # follow what was computed at once


@dataclass
class Playback:
    """What happened: per worker the instructions as run and when each began, µs busy, the end and peak bytes kept;

    bytes per link.
    """

    order: list[list[Instruction]]
    begin_us: list[list[int]]
    busy_us: list[int]
    end_us: list[int]
    link_bytes: list[list[int]]
    peak_bytes: list[int]


def play(
    workers: Sequence[Lanes],
    costs: Costs,
    *,
    max_in_flight: int | None = None,
    tails: Sequence[Sequence[Instruction]] | None = None,
) -> Playback:
    """Run all lanes to their ends; raises DeadlockError, showing where each worker stands.

    `max_in_flight` admits that many unfinished lanes at a time, counted from the lowest one unfinished on any worker.
    `tails` has one list per worker, that it runs when all its lanes are done.
    """
    clock = _Clock(workers, costs)
    seen = clock.run(workers, max_in_flight)
    return seen if tails is None else clock.run([[tail] for tail in tails])


def duration_us(costs: Costs, worker: int, instruction: Instruction) -> int:
    """µs that `instruction` keeps `worker` busy; waiting for a message is not among them."""
    kind = instruction.kind
    if instruction.units and (kind, instruction.cargo) != ("recv", "gradpart"):
        return costs.trunk_us(worker, len(instruction.units))
    if kind == "fwd":
        part = instruction.part
        return sum(costs.forward_us(worker, part, len(heads)) for heads in (instruction.full, instruction.only))
    if kind == "bwd":
        return costs.backward_us(worker, instruction.part, len(instruction.full))
    if kind == "sum":
        return costs.sum_us(worker, len(instruction.of))
    if kind in ("embed", "unembed"):
        return costs.embed_us(worker) // 2
    if kind == "classify":
        return costs.classify_us(worker)
    if kind == "send":
        return costs.send_us(worker, message_bytes(instruction, costs.shape, costs.step))
    if kind == "recv":
        return costs.recv_us(worker, message_bytes(instruction, costs.shape, costs.step))
    return costs.end_us(worker) if kind == "step" else 0


def update_us(costs: Costs, worker: int, instructions: Iterable[Instruction]) -> int:
    """Time of the optimiser, at the step's end, over the heads that were FULL at least once."""
    trained = {(i.block, head) for i in instructions if i.kind == "bwd" for head in i.full}
    return costs.update_us(worker, len(trained))


class _Tariff:
    """Durations and sizes on one worker, looked up once for every sort of instruction: a step has few sorts."""

    def __init__(self, costs: Costs, worker: int) -> None:
        self.costs, self.worker = costs, worker
        self.known: dict[tuple[object, ...], tuple[int, int]] = {}
        self.link_us: dict[tuple[int, int], tuple[int, int]] = {}

    def of(self, instruction: Instruction) -> tuple[int, int]:
        """(µs busy, size): bytes of a message, or bytes kept from now on, which a bwd gives back."""
        kind, part, units = instruction.kind, instruction.part, instruction.units
        if kind in ("send", "recv"):  # of all cargo only the tally has neither part nor units
            sort: tuple[object, ...] = (kind, part, units)
        else:
            sort = (kind, part, units, len(instruction.full), len(instruction.only), len(instruction.of))
        found = self.known.get(sort)
        if found is None:
            found = self.known[sort] = (duration_us(self.costs, self.worker, instruction), self._size(instruction))
        return found

    def wire(self, peer: int, size: int) -> tuple[int, int]:
        """µs that a message to `peer` travels, and takes the link from the next one: its latency overlaps."""
        found = self.link_us.get((peer, size))
        if found is None:
            travels = self.costs.transfer_us(self.worker, peer, size)
            found = (travels, travels - self.costs.transfer_us(self.worker, peer, 0))
            self.link_us[peer, size] = found
        return found

    def _size(self, instruction: Instruction) -> int:
        if instruction.kind in ("send", "recv"):
            return message_bytes(instruction, self.costs.shape, self.costs.step)
        if instruction.kind in ("fwd", "bwd") and instruction.full:
            kept = self.costs.kept_bytes(instruction.part, len(instruction.full))
            return kept if instruction.kind == "fwd" else -kept
        return 0


class _Clock:
    """`ready[w][lane]` is when the lane's next instruction could start at the earliest, were w free."""

    def __init__(self, workers: Sequence[Lanes], costs: Costs) -> None:
        count = len(workers)
        self.costs, self.tariffs = costs, [_Tariff(costs, w) for w in range(count)]
        self.now = [0] * count
        self.kept = [0] * count
        self.link_free = [[0] * count for _ in range(count)]
        self.sorts: dict[tuple[object, ...], int] = {}
        self.arrival: dict[Message, int] = {}
        self.waiting: dict[Message, int] = {}  # message → the lane that stands before it
        self.seen = Playback(
            [[] for _ in workers],
            [[] for _ in workers],
            [0] * count,
            self.now,
            [[0] * count for _ in workers],
            [0] * count,
        )

    def run(self, workers: Sequence[Lanes], max_in_flight: int | None = None) -> Playback:
        """Go on with these lanes from where every worker is now."""
        self._open(workers, max_in_flight)
        remaining = sum(len(lane) for lanes in self.workers for lane in lanes)
        self._advance_window()
        next_up = [self._next(w) for w in range(len(self.workers))]
        queue = sorted((start, w, lane) for w, (start, lane) in enumerate(next_up) if start < NEVER)
        while remaining:
            if not queue:
                raise DeadlockError(self._standstill(), code="deadlock")
            start, worker, lane = heapq.heappop(queue)
            if next_up[worker] != (start, lane):
                continue  # overtaken by a later look at this worker
            done, touched = self._execute(worker, lane, start)
            remaining -= done
            moved = not self.unfinished[self.lowest] and self._advance_window()
            for w in range(len(self.workers)) if moved else touched:
                found = self._next(w)
                if w == worker or found != next_up[w]:
                    next_up[w] = found
                    if found[0] < NEVER:
                        heapq.heappush(queue, (found[0], w, found[1]))
        return self.seen

    def _open(self, workers: Sequence[Lanes], max_in_flight: int | None) -> None:
        self.workers = workers
        self.position = [[0] * len(lanes) for lanes in workers]
        self.ready = [[NEVER] * len(lanes) for lanes in workers]
        self.most_lanes = max(map(len, workers), default=0)
        self.unfinished = [
            sum(len(lanes) > n and len(lanes[n]) > 0 for lanes in workers) for n in range(self.most_lanes)
        ]
        self.window = max_in_flight or self.most_lanes
        self.lowest = 0
        for worker, lanes in enumerate(workers):
            for lane in range(len(lanes)):
                self._stand(worker, lane)

    def _next(self, worker: int) -> tuple[int, int]:
        """(earliest start, lane) of what the worker does next; NEVER when all its lanes wait for unsent messages."""
        now, best, best_lane = self.now[worker], NEVER, -1
        ready = self.ready[worker]
        for lane in range(self.lowest, min(self.lowest + self.window, len(ready))):
            start = ready[lane]
            if start <= now:
                return now, lane
            if start < best:
                best, best_lane = start, lane
        return best, best_lane

    def _execute(self, worker: int, lane: int, start: int) -> tuple[int, list[int]]:
        """Run the lane's next instruction and the sums, sends and frees behind it: what is computed is shipped at once.

        Returns how many instructions ran and whose next instruction may have changed.
        """
        instructions, begin = self.workers[worker][lane], self.position[worker][lane]
        end = begin + 1
        while end < len(instructions) and instructions[end].kind in SHIPPED:
            end += 1
        run = instructions[begin:end]
        begins, tariff = self.seen.begin_us[worker], self.tariffs[worker].of
        touched, now = [worker], start
        for instruction in run:
            begins.append(now)
            kind = instruction.kind
            if kind == "free":
                continue
            spent, size = tariff(instruction)
            now += spent
            if kind == "send":
                if self._send(worker, instruction, now, size):
                    touched.append(instruction.peer)
            elif size and kind != "recv":
                beside = self.costs.rerun_bytes(instruction.part, len(instruction.full))
                held = self.kept[worker] + max(size, 0) + beside
                self.seen.peak_bytes[worker] = max(self.seen.peak_bytes[worker], held)
                self.kept[worker] += size
        self.seen.order[worker] += run
        self.seen.busy_us[worker] += now - start
        self.now[worker] = now
        self.position[worker][lane] = end
        self._stand(worker, lane)
        if end == len(instructions):
            self.unfinished[lane] -= 1
        return end - begin, touched

    def _stand(self, worker: int, lane: int) -> None:
        """Note when the lane's next instruction can start: a recv when its message is there."""
        instructions, at = self.workers[worker][lane], self.position[worker][lane]
        if at == len(instructions):
            self.ready[worker][lane] = NEVER
        elif instructions[at].kind == "recv":
            message = self._message(instructions[at], instructions[at].peer, worker)
            self.ready[worker][lane] = self.arrival.get(message, NEVER)
            self.waiting[message] = lane
        else:
            self.ready[worker][lane] = 0

    def _send(self, worker: int, instruction: Instruction, now: int, size: int) -> bool:
        """Put a message on the wire; says whether somebody stands before it."""
        peer = instruction.peer
        travels, takes = self.tariffs[worker].wire(peer, size)
        begin = max(now, self.link_free[worker][peer])
        self.link_free[worker][peer] = begin + takes
        message = self._message(instruction, worker, peer)
        self.arrival[message] = begin + travels
        self.seen.link_bytes[worker][peer] += size
        lane = self.waiting.get(message)
        if lane is None:
            return False
        self.ready[peer][lane] = begin + travels
        return True

    def _message(self, instruction: Instruction, src: int, dst: int) -> Message:
        """The same number for its send and its recv."""
        sort = (instruction.cargo, instruction.part, instruction.units)
        code = self.sorts.setdefault(sort, len(self.sorts))
        place = (code * PLACES + instruction.block + 1) * PLACES + instruction.mb + 1
        return (place * len(self.now) + src) * len(self.now) + dst

    def _advance_window(self) -> bool:
        """Move the window past lanes that every worker has finished; says whether it moved."""
        before = self.lowest
        while self.lowest < self.most_lanes and not self.unfinished[self.lowest]:
            self.lowest += 1
        return self.lowest != before

    def _standstill(self) -> str:
        lines = ["no worker can go on; each one waits for a message that nobody has sent:"]
        for worker, lanes in enumerate(self.workers):
            for lane, at in zip(lanes, self.position[worker], strict=True):
                if at < len(lane):
                    lines.append(f"  w{worker} at {at + 1}/{len(lane)}: {lane[at]}")
        return "\n".join(lines)
