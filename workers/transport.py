"""How messages of a step travel between workers: one contract, four transports.

A step's messages on a link are known before it starts and arrive in the order in which they were sent. `open` tells
the transport what will come from each peer, so that receives are posted ahead of need; `send` never waits; `recv` waits
for one message; `close` waits until everything sent has left. Bytes are counted where they are sent.

    InProcess   threads in one process, tensors handed over          (tests, one worker)
    Gloo        torch.distributed, tagged point-to-point on CPU
    Shared      Gloo, but rings of shared memory between workers on one machine
    Nccl        the same on GPU: no tags, so one two-member group per direction keeps messages in order
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scheduler.errors import SystemFault
from scheduler.program import MessageKey
from workers.neighbours import Neighbours, Outlet, connect


@dataclass(frozen=True)
class Parcel:
    """A message to expect: its key, shape and type."""

    key: MessageKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    passing: bool = False  # read once and dropped, so that it need not be copied

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Transport(Protocol):
    """The contract; `tests/workers/test_transport.py` holds every implementation to it."""

    rank: int
    size: int
    sent_bytes: list[int]  # per destination, since the last `open`

    def prepare(self, message_bytes: int) -> None:
        """Make room for messages of a usual size; collective, before the first step that sends them."""

    def open(self, incoming: Mapping[int, Sequence[Parcel]]) -> None: ...

    def send(self, dst: int, key: MessageKey, tensor: Tensor) -> None: ...

    def recv(self, src: int, key: MessageKey) -> Tensor: ...

    def close(self) -> None: ...


class Mailboxes:
    """Where in-process workers leave messages for each other."""

    def __init__(self, size: int, timeout_s: float = 60.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._messages: dict[MessageKey, deque[Tensor]] = {}
        self._arrived = threading.Condition()
        self._broken = False

    def put(self, key: MessageKey, tensor: Tensor) -> None:
        with self._arrived:
            self._messages.setdefault(key, deque()).append(tensor)
            self._arrived.notify_all()

    def take(self, key: MessageKey) -> Tensor:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._messages.get(key) or self._broken, self.timeout_s):
                raise SystemFault(f"message {key} did not arrive within {self.timeout_s} s", code="transport_timeout")
            if not self._messages.get(key):
                raise SystemFault("another worker failed", code="peer_lost")
            return self._messages[key].popleft()

    def abort(self) -> None:
        """A worker failed: wake the others."""
        with self._arrived:
            self._broken = True
            self._arrived.notify_all()


class InProcess:
    """Messages between threads of one process."""

    def __init__(self, rank: int, mailboxes: Mailboxes) -> None:
        self.rank, self.size = rank, mailboxes.size
        self.sent_bytes = [0] * self.size
        self._mailboxes = mailboxes

    def prepare(self, message_bytes: int) -> None:
        pass

    def open(self, incoming: Mapping[int, Sequence[Parcel]]) -> None:
        self.sent_bytes = [0] * self.size

    def send(self, dst: int, key: MessageKey, tensor: Tensor) -> None:
        self.sent_bytes[dst] += tensor.nbytes
        self._mailboxes.put(key, tensor)

    def recv(self, src: int, key: MessageKey) -> Tensor:
        return self._mailboxes.take(key)

    def close(self) -> None:
        pass


@dataclass
class _Lane:
    """What is to come from one peer: parcels not yet posted, those posted, those come before they were asked for."""

    ahead: deque[Parcel] = field(default_factory=deque)
    posted: deque[tuple[Parcel, Tensor, dist.Work]] = field(default_factory=deque)
    early: dict[MessageKey, Tensor] = field(default_factory=dict)


class Gloo:
    """torch.distributed point-to-point with tags; the default process group must be up.

    `ahead` receives are posted per peer before they are asked for, so that the wire works while this worker computes.
    """

    def __init__(self, device: torch.device | str = "cpu", ahead: int = 4) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)
        self.sent_bytes = [0] * self.size
        self._ahead = ahead
        self._lanes: dict[int, _Lane] = {}
        self._outbox: deque[tuple[dist.Work, Tensor]] = deque()
        self._sent_count = [0] * self.size
        self._posted_count = [0] * self.size

    def prepare(self, message_bytes: int) -> None:
        pass

    def open(self, incoming: Mapping[int, Sequence[Parcel]]) -> None:
        self.sent_bytes = [0] * self.size
        self._lanes = {src: _Lane(deque(parcels)) for src, parcels in incoming.items()}
        for src, lane in self._lanes.items():
            self._post(src, lane)

    def send(self, dst: int, key: MessageKey, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        work = self._isend(tensor, dst, self._sent_count[dst])
        self._sent_count[dst] += 1
        self.sent_bytes[dst] += tensor.nbytes
        self._outbox.append((work, tensor))
        while self._outbox and self._outbox[0][0].is_completed():
            self._outbox.popleft()

    def recv(self, src: int, key: MessageKey) -> Tensor:
        lane = self._lanes[src]
        while key not in lane.early:
            if not lane.posted:
                raise SystemFault(f"worker {src} will not send {key} in this step", code="transport_order")
            parcel, buffer, work = lane.posted.popleft()
            self._post(src, lane)
            work.wait()
            lane.early[parcel.key] = buffer
        return lane.early.pop(key)

    def close(self) -> None:
        while self._outbox:
            self._outbox.popleft()[0].wait()

    def _post(self, src: int, lane: _Lane) -> None:
        while lane.ahead and len(lane.posted) < self._ahead:
            parcel = lane.ahead.popleft()
            buffer = torch.empty(parcel.shape, dtype=parcel.dtype, device=self.device)
            lane.posted.append((parcel, buffer, self._irecv(buffer, src, self._posted_count[src])))
            self._posted_count[src] += 1

    def _isend(self, tensor: Tensor, dst: int, count: int) -> dist.Work:
        return _work(dist.isend(tensor, dst, tag=_tag(count)))

    def _irecv(self, tensor: Tensor, src: int, count: int) -> dist.Work:
        return _work(dist.irecv(tensor, src, tag=_tag(count)))


class Shared(Gloo):
    """Gloo between machines; within one, messages that fit go through `neighbours`' rings.

    A message that its reader only adds to something (`Parcel.passing`) is not copied out of the ring.
    """

    def __init__(self, ahead: int = 4, timeout_s: float = 120.0) -> None:
        super().__init__("cpu", ahead)
        self._timeout_s = timeout_s
        self._neighbours = Neighbours({}, {})
        self._queues: dict[int, deque[Parcel]] = {}
        self._early: dict[MessageKey, Tensor] = {}
        self._ringed: set[MessageKey] = set()

    def prepare(self, message_bytes: int) -> None:
        self._neighbours.close()
        self._neighbours = connect(message_bytes)

    def open(self, incoming: Mapping[int, Sequence[Parcel]]) -> None:
        inlets = self._neighbours.inlets
        self._queues = {src: deque(p for p in incoming.get(src, ()) if self._fits(src, p)) for src in inlets}
        self._ringed = {parcel.key for queue in self._queues.values() for parcel in queue}
        super().open({src: [p for p in parcels if p.key not in self._ringed] for src, parcels in incoming.items()})

    def send(self, dst: int, key: MessageKey, tensor: Tensor) -> None:
        outlet = self._neighbours.outlets.get(dst)
        if outlet is None or tensor.nbytes > outlet.ring.slot_bytes:
            super().send(dst, key, tensor)
            return
        self._await_room(outlet)
        outlet.put(tensor)
        self.sent_bytes[dst] += tensor.nbytes

    def recv(self, src: int, key: MessageKey) -> Tensor:
        if key not in self._ringed:
            return super().recv(src, key)
        while key not in self._early:
            parcel = self._queues[src].popleft()
            wanted = parcel.key == key
            # What comes before its time is copied, so that it does not hold a slot that others wait for.
            self._take(src, parcel, copied=not (wanted and parcel.passing))
        return self._early.pop(key)

    def _fits(self, src: int, parcel: Parcel) -> bool:
        return parcel.num_bytes <= self._neighbours.inlets[src].ring.slot_bytes

    def _take(self, src: int, parcel: Parcel, *, copied: bool) -> None:
        inlet = self._neighbours.inlets[src]
        self._early[parcel.key] = inlet.take(parcel.shape, parcel.dtype, self._timeout_s, copied=copied)

    def _await_room(self, outlet: Outlet) -> None:
        """Wait for a free slot; meanwhile take in what arrives, since its sender may be waiting for a slot too."""
        deadline = time.monotonic() + self._timeout_s
        while not outlet.has_room():
            waiting = [src for src, queue in self._queues.items() if queue]
            sources = [outlet.credit, *(self._neighbours.inlets[src].data for src in waiting)]
            if time.monotonic() > deadline or not select.select(sources, [], [], self._timeout_s)[0]:
                raise SystemFault(f"No room for a message within {self._timeout_s:g} s.", code="transport_timeout")
            for src in waiting:
                if self._neighbours.inlets[src].is_ready():
                    self._take(src, self._queues[src].popleft(), copied=True)


class Nccl(Gloo):
    """The same over NCCL: each direction of each pair has its own communicator, hence its own order."""

    def __init__(self, device: torch.device | str, ahead: int = 4, timeout_s: float = 120.0) -> None:
        super().__init__(device, ahead)
        pairs = [(a, b) for a in range(self.size) for b in range(self.size) if a != b]
        groups: dict[tuple[int, int], Any] = {
            pair: dist.new_group(sorted(pair), timeout=timedelta(seconds=timeout_s), backend="nccl") for pair in pairs
        }
        self._groups = {pair: group for pair, group in groups.items() if self.rank in pair}

    def _isend(self, tensor: Tensor, dst: int, count: int) -> dist.Work:
        return _work(dist.isend(tensor, dst, group=self._groups[self.rank, dst]))

    def _irecv(self, tensor: Tensor, src: int, count: int) -> dist.Work:
        return _work(dist.irecv(tensor, src, group=self._groups[src, self.rank]))


def all_gather(transport: Transport, tensor: Tensor) -> list[Tensor]:
    """Every worker's tensor, in rank order; all must have the same shape and type. Collective."""
    peers = [w for w in range(transport.size) if w != transport.rank]

    def key(src: int, dst: int) -> MessageKey:
        return ("gather", 0, "", tensor.numel(), src, dst)

    shape = tuple(tensor.shape)
    transport.open({src: [Parcel(key(src, transport.rank), shape, tensor.dtype)] for src in peers})
    for dst in peers:
        transport.send(dst, key(transport.rank, dst), tensor)
    found = {src: transport.recv(src, key(src, transport.rank)) for src in peers}
    transport.close()
    return [tensor if w == transport.rank else found[w] for w in range(transport.size)]


def all_sum(transport: Transport, tensor: Tensor) -> Tensor:
    """Sum over the workers, added in rank order, so that all get the same bits. Collective."""
    first, *others = all_gather(transport, tensor)
    total = first.clone()
    for other in others:
        total += other
    return total


def _tag(count: int) -> int:
    """Both ends count the messages of a link; the count, wrapped to what a tag can hold, names the message."""
    return count % (1 << 30)


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise SystemFault("this process is not in the process group", code="transport_group")
    return work
