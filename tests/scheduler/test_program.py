"""Programs are text first; orders never deadlock; forecasts add up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_evaluation, compile_step
from scheduler.cost import Costs
from scheduler.domain import Op, Placement, StepShape, step_flops, uniform_ops
from scheduler.errors import DeadlockError
from scheduler.program import KINDS, Instruction, Program, parse_instruction
from scheduler.simulate import simulate
from scheduler.transfers import step_bytes
from tests.scheduler.fleet import fleet, vit_shape

SHAPE = vit_shape(num_blocks=4, num_heads=4, dim=32, num_tokens=10)


def costs_of(num_workers, num_micro_batches=3, speeds=None, **links):
    profiles = fleet(speeds or [1.0] * num_workers, shape=SHAPE, batch=4, **links)
    return Costs(SHAPE, StepShape(num_micro_batches, 4), profiles)


@st.composite
def plans(draw):
    num_workers, num_micro_batches = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    owners = rng.integers(0, num_workers, (SHAPE.num_blocks, SHAPE.num_heads))
    ops = rng.choice(3, (*owners.shape, num_micro_batches), p=rng.dirichlet([0.6] * 3)).astype(np.int8)
    return Placement.make(owners, num_workers), ops


@settings(max_examples=80, deadline=None)
@given(plans(), st.booleans(), st.sampled_from(["zero", "mean", "rescale"]), st.integers(1, 5))
def test_programs_print_and_parse_back_and_run_to_their_end(plan, embed_grad, skip_fill, max_in_flight):
    placement, ops = plan
    costs = costs_of(placement.num_workers, ops.shape[2])
    programs = compile_step(
        placement, ops, costs, embed_grad=embed_grad, skip_fill=skip_fill, max_in_flight=max_in_flight
    )
    for program in programs:
        assert Program.parse(str(program)) == program
        keys = [i.key(program.worker) for i in program.instructions if i.kind in ("send", "recv")]
        assert len(keys) == len(set(keys))
    forecast = simulate(programs, costs)
    sent = step_bytes(placement, ops, costs.shape, costs.step, embed_grad)
    assert forecast.link_bytes == tuple(map(tuple, sent.tolist()))
    assert forecast.flops == step_flops(costs.shape, costs.step, ops)
    assert max(forecast.busy_us) <= forecast.step_us and 0 <= forecast.idle_share <= 1


@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_send_has_one_receive(plan):
    placement, ops = plan
    programs = compile_step(placement, ops, costs_of(placement.num_workers, ops.shape[2]))
    sent = sorted(i.key(p.worker) for p in programs for i in p.sends())
    received = sorted(i.key(p.worker) for p in programs for i in p.receives())
    assert sent == received


@settings(max_examples=40, deadline=None)
@given(plans())
def test_what_is_read_is_held_and_what_is_held_is_freed(plan):
    placement, ops = plan
    for program in compile_step(placement, ops, costs_of(placement.num_workers, ops.shape[2])):
        held = set()
        for i in program.instructions:
            if i.kind in ("fwd", "classify") or (i.kind in ("send", "sum") and i.cargo == "x"):
                assert ("x", i.mb) in held, str(i)
            if i.kind in ("bwd", "unembed") or (i.kind in ("send", "sum") and i.cargo == "g"):
                assert ("g", i.mb) in held, str(i)
            if i.kind == "embed" or (i.kind == "recv" and i.cargo == "x"):
                held.add(("x", i.mb))
            if (i.kind == "recv" and i.cargo == "g") or (i.kind == "classify" and i.grad and not i.floor):
                held.add(("g", i.mb))
            if i.kind == "free":
                held.remove((i.cargo, i.mb))
        assert not held


def test_the_documented_lines_parse():
    import scheduler.program as program

    lines = [line.strip() for line in program.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) > 10
    for line in lines:
        text = line.split("   ")[0].strip()
        assert str(parse_instruction(text)) == text
    assert {line.split()[0] for line in lines} == set(KINDS)


@pytest.mark.parametrize("text", ["fly b00.attn m0", "fwd b00.attn m0 wings=2", "send x sideways"])
def test_unknown_words_are_refused(text):
    with pytest.raises(ValueError, match="unknown"):
        parse_instruction(text)


def test_a_program_that_waits_for_nothing_is_found_before_a_worker_does():
    costs = costs_of(2)
    placement = Placement.make(np.tile([0, 0, 1, 1], (4, 1)), 2)
    first, second = compile_step(placement, uniform_ops(SHAPE, 3, Op.FULL), costs)
    lost = next(i for i in second.instructions if i.kind == "send" and i.cargo == "part")
    broken = dataclasses.replace(second, instructions=tuple(i for i in second.instructions if i is not lost))
    with pytest.raises(DeadlockError, match=r"recv part b00\.attn m0 <w1"):
        simulate([first, broken], costs)


def test_a_worker_alone_in_a_block_exchanges_nothing():
    whole = Placement.make(np.repeat([[0], [0], [1], [1]], 4, axis=1), 2)
    costs = costs_of(2)
    programs = compile_step(whole, uniform_ops(SHAPE, 3, Op.FULL), costs)
    kinds = {i.cargo for p in programs for i in p.sends()}
    assert kinds == {"x", "g", "tally"}
    assert sum(i.cargo == "x" for p in programs for i in p.sends()) == 3


def test_a_coherent_skip_saves_all_of_a_workers_messages_in_the_block():
    split = Placement.make(np.tile([0, 0, 1, 1], (4, 1)), 2)
    ops = uniform_ops(SHAPE, 1, Op.FULL)
    everything = step_bytes(split, ops, SHAPE, StepShape(1, 4)).sum()
    ops[1:3, 2:, 0] = Op.SKIP
    one_message = 4 * 10 * 32 * 4
    # Two blocks × (2 sub-layers forward + 2 backward) × 2 messages fall away. x must come back to worker 1 for block 3,
    # but then block 0's last sum is needed at worker 0 alone; the same with g.
    assert everything - step_bytes(split, ops, SHAPE, StepShape(1, 4)).sum() == 2 * 4 * 2 * one_message


def test_a_pipeline_of_whole_blocks_overlaps_micro_batches():
    whole = Placement.make(np.repeat([[0], [0], [1], [1]], 4, axis=1), 2)
    costs = costs_of(2, num_micro_batches=8, latency_us=1)
    alone, overlapped = (
        simulate(compile_step(whole, uniform_ops(SHAPE, 8, Op.FULL), costs, max_in_flight=cap), costs) for cap in (1, 2)
    )
    assert alone.idle_share == pytest.approx(0.5, abs=0.02)
    assert overlapped.step_us < 0.62 * alone.step_us
    assert overlapped.peak_bytes[0] == 2 * alone.peak_bytes[0]


def test_interleaving_hides_a_slow_wire_in_split_blocks():
    split = Placement.make(np.tile([0, 0, 1, 1], (4, 1)), 2)
    costs = costs_of(2, num_micro_batches=4, latency_us=300)
    one, two = (
        simulate(compile_step(split, uniform_ops(SHAPE, 4, Op.FULL), costs, max_in_flight=cap), costs) for cap in (1, 4)
    )
    assert two.step_us < 0.7 * one.step_us


def test_an_evaluation_keeps_nothing_and_sends_no_gradient():
    split = Placement.make(np.tile([0, 0, 1, 1], (4, 1)), 2)
    costs = costs_of(2)
    programs = compile_evaluation(split, uniform_ops(SHAPE, 3, Op.FORWARD), costs)
    instructions = [i for p in programs for i in p.instructions]
    assert not [i for i in instructions if i.full or i.kind in ("bwd", "unembed", "step") or i.cargo in ("g", "tally")]
    assert simulate(programs, costs).peak_bytes == (0, 0)


def test_instructions_of_a_pair_are_worth_their_line():
    line = Instruction("fwd", block=3, part="attn", mb=2, full=(1, 4), only=(5,))
    assert str(line) == "fwd b03.attn m2 full=1,4 only=5"
