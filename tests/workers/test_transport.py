"""One contract for all transports: order, bytes, early and late receives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scheduler.errors import SystemFault
from tests.workers.engine import on_threads
from tests.workers.processes import on_processes
from workers.neighbours import NUM_SLOTS
from workers.transport import Gloo, InProcess, Mailboxes, Nccl, Parcel, Shared, all_gather, all_sum


def key(name, src, dst):
    return ("x", 0, name, 0, src, dst)


def exchange(rank, transport):
    """Every worker sends ten messages to every other one and reads them backwards, twice."""
    peers = [w for w in range(transport.size) if w != rank]
    seen = []
    for turn in range(2):
        names = [f"{i:02d}" for i in range(10)]
        incoming = {
            src: [Parcel(key(n, src, rank), (1000 + int(n),), dtype_of(int(n))) for n in names] for src in peers
        }
        transport.open(incoming)
        for dst in peers:
            for name in names:
                transport.send(dst, key(name, rank, dst), _message(rank, int(name), turn, transport))
        for src in peers:
            for name in reversed(names):
                tensor = transport.recv(src, key(name, src, rank))
                seen.append(torch.equal(tensor, _message(src, int(name), turn, transport)))
        transport.close()
    return all(seen), list(transport.sent_bytes)


def _message(src, number, turn, transport):
    device = getattr(transport, "device", "cpu")
    return torch.full((1000 + number,), src * 100.0 + number + turn, device=device, dtype=dtype_of(number))


def dtype_of(number):
    """Every other message is of half the width."""
    return torch.bfloat16 if number % 2 else torch.float32


def sums(rank, transport):
    mine = torch.tensor([rank + 0.5, 1.0], dtype=torch.float64, device=getattr(transport, "device", "cpu"))
    return all_sum(transport, mine).tolist(), [t.tolist() for t in all_gather(transport, mine)]


def contract(rank, transport):
    return exchange(rank, transport), sums(rank, transport)


def shared_contract(rank, message_bytes):
    transport = Shared(timeout_s=20)
    before = set(Path("/dev/shm").iterdir())
    transport.prepare(message_bytes)
    result = contract(rank, transport)
    dist.barrier()
    assert not {p for p in set(Path("/dev/shm").iterdir()) - before if p.name.startswith("d2ft-")}
    return result


def gloo_contract(rank):
    return contract(rank, Gloo())


def nccl_contract(rank):
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    return contract(rank, Nccl(device))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_threads_keep_the_contract(size):
    assert_contract(on_threads(size, contract), size)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gloo_processes_keep_the_contract(size):
    assert_contract(on_processes(size, gloo_contract), size)


@pytest.mark.parametrize("message_bytes", [4096, 1 << 16], ids=["some messages too large", "all fit"])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shared_memory_keeps_the_contract_and_leaves_nothing_behind(size, message_bytes):
    assert_contract(on_processes(size, shared_contract, message_bytes), size)


def sends_more_than_the_ring_holds(rank):
    """Both ends fill their rings before either reads: each must take in while it waits for room."""
    transport, peer, many = Shared(timeout_s=20), 1 - rank, 5 * NUM_SLOTS
    transport.prepare(4096)
    transport.open(
        {peer: [Parcel(key(f"{i:02d}", peer, rank), (1024,), torch.float32, passing=True) for i in range(many)]}
    )
    for i in range(many):
        transport.send(peer, key(f"{i:02d}", rank, peer), torch.full((1024,), float(i)))
    # A slice would outlive the message it is of, whose slot is free again when the message is dropped.
    return [transport.recv(peer, key(f"{i:02d}", peer, rank)).max().item() for i in range(many)]


def test_full_rings_in_both_directions_do_not_block():
    expected = [float(i) for i in range(5 * NUM_SLOTS)]
    assert on_processes(2, sends_more_than_the_ring_holds) == [expected, expected]


def loses_its_peer(rank):
    transport = Shared(timeout_s=20)
    transport.prepare(4096)
    if rank == 1:
        transport._neighbours.close()
        return "gone"
    transport.open({1: [Parcel(key("00", 1, 0), (8,), torch.float32)]})
    try:
        transport.recv(1, key("00", 1, 0))
    except SystemFault as error:
        return error.code
    return None


def test_a_lost_neighbour_is_an_error_at_once():
    assert on_processes(2, loses_its_peer) == ["peer_lost", "gone"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
def test_nccl_processes_keep_the_contract():
    assert_contract(on_processes(2, nccl_contract, backend="nccl"), 2)


def assert_contract(results, size):
    per_peer = sum(dtype_of(i).itemsize * (1000 + i) for i in range(10))
    for rank, ((right, sent_bytes), (total, gathered)) in enumerate(results):
        assert right
        assert sent_bytes == [0 if peer == rank else per_peer for peer in range(size)]
        assert total == [sum(r + 0.5 for r in range(size)), size]
        assert gathered == [[r + 0.5, 1.0] for r in range(size)]


def test_a_message_that_never_comes_is_an_error():
    transport = InProcess(0, Mailboxes(2, timeout_s=0.05))
    with pytest.raises(SystemFault, match="did not arrive"):
        transport.recv(1, key("00", 1, 0))


def asks_for_what_is_not_sent(rank):
    transport = Gloo()
    transport.open({1 - rank: []})
    try:
        transport.recv(1 - rank, key("00", 1 - rank, rank))
    except SystemFault as error:
        return error.code
    return None


def test_gloo_refuses_a_message_that_no_program_sends():
    assert on_processes(2, asks_for_what_is_not_sent) == ["transport_order"] * 2
