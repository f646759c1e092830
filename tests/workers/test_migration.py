"""Heads that move between two steps leave the training as it was: weights, optimiser state, losses."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_step
from scheduler.domain import Op, Placement
from tests.workers.engine import costs_for, images_and_labels, on_threads, tiny_vit
from tests.workers.processes import on_processes
from workers.contract import Optimiser
from workers.executor import Executor
from workers.forward import ForwardPasses
from workers.gather import gather_state
from workers.migration import migrate, moves
from workers.optimiser import Adam
from workers.shard import Shard
from workers.steps import Batch, StepPrograms
from workers.transport import Gloo, Shared

SPEC = Optimiser(learning_rate=3e-3, weight_decay=0.1, warmup_fraction=0.4, clip_norm=0.05)
STEPS, MICRO_BATCHES, BATCH = 2, 2, 3  # steps before and after the move
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # an example takes half a second


class Worker:
    """One worker's engine, trained step by step on whatever placement it has."""

    def __init__(self, rank, transport, model, owners):
        self.rank, self.transport, self.model = rank, transport, model
        self.costs = costs_for(model, transport.size, MICRO_BATCHES, BATCH)
        self.shard = Shard(model, Placement.make(owners, transport.size), rank)
        self.adam = Adam(self.shard, SPEC, 2 * STEPS)
        self.executor = Executor(self.shard, transport, update=self.adam)
        self.losses = []

    def train(self, tables):
        for ops_LHM in tables:
            programs = compile_step(self.shard.placement, ops_LHM, self.costs)
            steps = StepPrograms(programs, self.rank, self.costs, self.shard.dtype)
            batches = images_and_labels(self.model, MICRO_BATCHES, BATCH, seed=len(self.losses))
            images, labels = ({m: pair[i] for m, pair in enumerate(batches)} for i in (0, 1))
            self.losses.append(self.executor.run(steps, Batch(images, labels)).loss)

    def migrate(self, owners):
        return migrate(self.shard, self.adam, self.transport, Placement.make(owners, self.transport.size))

    def state(self):
        """Every parameter that this worker holds with its optimiser state, as flat names."""
        out = {}
        for name, param in self.shard.named_parameters():
            out[name] = param.detach().clone()
            out |= {f"{name}|{entry}": value.clone() for entry, value in self.adam.state_of(name).items()}
        return out


def run(rank, transport, model, placements, tables):
    """Train half of the tables under the first placement, the rest under the second, if there is one."""
    worker = Worker(rank, transport, model, placements[0])
    worker.train(tables[:STEPS])
    moved = [worker.migrate(owners) for owners in placements[1:]]
    worker.train(tables[STEPS:])
    gathered = gather_state(worker.shard, transport, {n: t.to("meta") for n, t in model.state_dict().items()})
    return worker.losses, worker.state(), gathered and safetensors.torch.save(gathered), moved


def tables_of(seed):
    """Op tables in which some heads are never FULL, so have no optimiser state."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 3, (2 * STEPS, 3, 4, MICRO_BATCHES)).astype(np.int8)
    never = rng.random((3, 4)) < 0.2
    tables[:, never] = np.minimum(tables[:, never], int(Op.FORWARD))
    tables[:, 0, 0] = int(Op.FULL)
    return list(tables)


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def union(states):
    """All workers' states in one; replicas of the trunk must be equal bit for bit."""
    out = {}
    for state in states:
        for name, value in state.items():
            assert name not in out or torch.equal(out[name], value), name
            out[name] = value
    return out


grids = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=3, max_size=3).map(np.array)


@settings(max_examples=30, deadline=None, phases=NO_SHRINKING)
@given(num_workers=st.integers(1, 4), old=grids, new=grids, init=st.sampled_from([None, 0.3]), seed=st.integers(0, 99))
@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_moved(num_workers, old, new, init, seed):
    old, new = old % num_workers, new % num_workers
    model, tables = tiny_vit(init_values=init), tables_of(seed)
    moved = on_threads(num_workers, lambda rank, t: run(rank, t, model, [old, new], tables))
    stayed = on_threads(num_workers, lambda rank, t: run(rank, t, model, [old], tables))
    assert moved[0][0] == pytest.approx(stayed[0][0], abs=1e-9)
    assert_same_state(safetensors.torch.load(moved[0][2]), safetensors.torch.load(stayed[0][2]))
    assert_same_state(*(union(state for _, state, _, _ in results) for results in (moved, stayed)))


@settings(max_examples=100, deadline=None)
@given(num_workers=st.integers(1, 4), old=grids, new=grids)
def test_only_what_a_worker_lacks_is_sent_and_by_one_that_has_it(num_workers, old, new):
    before, after = (Placement.make(grid % num_workers, num_workers) for grid in (old, new))
    planned = moves(before, after)
    assert len(planned) == len(set(planned))
    for worker in range(num_workers):
        got = {(m.kind, m.block, m.head) for m in planned if m.dst == worker}
        had, wanted = holdings(before, worker), holdings(after, worker)
        assert got == wanted - had
    assert all((m.kind, m.block, m.head) in holdings(before, m.src) for m in planned)


def holdings(placement, worker):
    heads = {("head", b, h) for b in range(3) for h in placement.heads_of(worker, b)}
    units = {("unit", b, 0) for b in range(3) if worker in placement.holders(b)}
    ends = {("unit", -1, 0)} if worker in placement.embedders else set()
    return heads | units | ends | ({("classifier", 0, 0)} if placement.classifier == worker else set())


def test_there_and_back_is_bit_for_bit_the_same_and_costs_the_bytes_of_what_moved():
    model, tables = tiny_vit(init_values=0.3), tables_of(3)
    old, new = [[0, 0, 1, 1]] * 3, [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]

    def work(rank, transport):
        worker = Worker(rank, transport, model, old)
        worker.train(tables)
        before = worker.state()
        there, nothing, back = worker.migrate(new), worker.migrate(new), worker.migrate(old)
        after = worker.state()
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        return there, nothing, back, sum(t.nbytes for n, t in before.items() if n.startswith("b00.h3"))

    (there, nothing, back, _), (sent, _, _, head_bytes) = on_threads(2, work)
    assert there.moved_heads == back.moved_heads == 1 and nothing.moved_heads == 0
    assert there.sent_bytes == (0, 0) and sent.sent_bytes[0] == pytest.approx(head_bytes, abs=2500)  # names and offsets
    assert sum(nothing.sent_bytes) == 0 and back.sent_bytes[1] == sent.sent_bytes[0]


def test_what_left_a_worker_is_freed():
    model, tables = tiny_vit(), tables_of(4)

    def work(rank, transport):
        worker = Worker(rank, transport, model, [[0] * 4, [0, 0, 1, 1], [1] * 4])
        worker.train(tables)
        gone = [weakref.ref(block.bank["qkv_w"]) for block in worker.shard.blocks.values()]
        if rank == 0:
            gone.append(weakref.ref(worker.adam.state_of("b00.h0.qkv_w")["exp_avg"]))
        worker.migrate([[1] * 4, [1] * 4, [1] * 4])
        gc.collect()
        on_meta = all(p.is_meta for _, p in worker.shard._ends.named_parameters())
        return [ref() is None for ref in gone], on_meta

    (freed, on_meta), (kept, at_home) = on_threads(2, work)
    assert all(freed) and on_meta
    assert kept == [True, False] and not at_home  # block 1 was laid out anew, block 2 stayed as it was


def test_evaluation_after_a_move_equals_the_plain_model():
    model = tiny_vit(init_values=0.3)
    images, labels = images_and_labels(model, 1, 7)[0]

    class Images:
        num_test = 7

        def test_batch(self, indices):
            from workers.data import Batch as Labelled

            return Labelled(images[indices], labels[indices])

    def work(rank, transport):
        worker = Worker(rank, transport, model, [[0, 1, 2, 0]] * 3)
        worker.migrate([[2, 2, 1, 1], [0] * 4, [1, 0, 1, 2]])
        return ForwardPasses(worker.executor, worker.shard.placement, worker.costs).evaluate(Images())

    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    for found, _ in on_threads(3, work):
        assert found == pytest.approx(accuracy)


def run_on_gloo(rank, wire, placements, tables, folder):
    """Leaves its state in a file: the queue of results holds no more than a pipe does."""
    transport = {"gloo": Gloo, "shared": Shared}[wire]()
    transport.prepare(1 << 12)
    losses, state, _, (moved,) = run(rank, transport, tiny_vit(init_values=0.3), placements, tables)
    safetensors.torch.save_file(state, folder / f"{rank}.safetensors")
    return losses, moved.sent_bytes


@pytest.mark.parametrize("wire", [pytest.param("gloo", marks=pytest.mark.slow), "shared"])
def test_the_same_on_three_real_processes(tmp_path, wire):
    model, tables = tiny_vit(init_values=0.3), tables_of(5)
    old, new = [[0, 1, 1, 2], [1, 1, 1, 1], [0, 0, 2, 0]], [[1, 1, 2, 2], [0] * 4, [0, 2, 1, 2]]
    moved = on_processes(3, run_on_gloo, wire, [np.array(old), np.array(new)], tables, tmp_path)
    stayed = on_threads(3, lambda rank, t: run(rank, t, model, [np.array(old)], tables))
    states = [safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    assert moved[0][0] == pytest.approx(stayed[0][0], abs=1e-9)
    assert_same_state(union(states), union(state for _, state, _, _ in stayed))
    assert sum(sum(sent) for _, sent in moved) > 0
