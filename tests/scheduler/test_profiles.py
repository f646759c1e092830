"""A profile follows what steps take: quickly where a device has changed, hardly at all under noise."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, LinkProfile, Op, Placement, StepShape, uniform_ops
from scheduler.errors import SystemFault
from scheduler.profiles import (
    CURVES,
    FIGURES,
    STALE_S,
    Key,
    Observations,
    check_fleet,
    check_profile,
    fold,
    read_profile,
    timing_keys,
)
from scheduler.program import Program
from scheduler.simulate import simulate
from scheduler.timing import duration_us
from tests.scheduler.fleet import fleet, vit_shape

SHAPE, STEP = vit_shape(4, 4, 64), StepShape(5, 8)
SPLIT = Placement.make([[0, 0, 1, 1]] * 4, 2)


def device(**more: Any) -> DeviceProfile:
    figures = {"send_us": 40, "recv_us": 10, "trunk_us": 30, "end_us": 900}
    return replace(fleet((1.0, 1.0), shape=SHAPE, batch=8)[0], **{**figures, **more})


def observe(program: Program, truth: Costs, steps: int, noise: float = 0.0, seed: int = 0) -> Observations:
    """What a worker with these true costs would time, each instruction with noise of its own."""
    rng, observed = np.random.default_rng(seed), Observations()
    for _ in range(steps):
        times: dict[Key, list[float]] = {}
        for i, key in zip(program.instructions, timing_keys(program), strict=True):
            if key[0] in ("tally", "step"):
                us = (truth.end_us(program.worker) + truth.update_us(program.worker, key[2])) / 2
            else:
                us = duration_us(truth, program.worker, i)
            times.setdefault(key, []).append(us * (1 + noise * rng.uniform(-1, 1)))
        observed.add(times)
    return observed


def programs_of(profiles: tuple[DeviceProfile, ...], op: Op = Op.FULL) -> tuple[Costs, tuple[Program, ...]]:
    costs = Costs(SHAPE, STEP, profiles)
    ops = uniform_ops(SHAPE, 5, op)
    ops[:, :, 0] = Op.FULL
    return costs, compile_step(SPLIT, ops, costs)


def slower(profile: DeviceProfile, factor: float) -> DeviceProfile:
    """The same device at 1 / factor of its speed."""
    curves = {name: tuple(round(us * factor) for us in getattr(profile, name)) for name in CURVES}
    return replace(profile, **curves, **{name: round(getattr(profile, name) * factor) for name in FIGURES})


def pair(profile: DeviceProfile) -> tuple[DeviceProfile, DeviceProfile]:
    other = replace(profile, rank=1, links=(profile.links[1], None))
    return profile, other


def test_a_device_that_slowed_to_half_shows_within_one_window() -> None:
    believed = device(samples=10_000)
    truth, programs = programs_of(pair(slower(believed, 2.0)))
    folded = fold(believed, observe(programs[0], truth, 20, noise=0.1), now=7.0)
    for name in CURVES:
        assert np.allclose(getattr(folded, name)[1:], getattr(slower(believed, 2.0), name)[1:], rtol=0.06)
    for name in ("embed_us", "sum_us", "send_us", "trunk_us", "end_us", "update_us"):
        assert getattr(folded, name) == pytest.approx(2 * getattr(believed, name), rel=0.12), name
    assert folded.measured_at == 7.0 and folded.samples > believed.samples
    assert folded.links == believed.links and folded.free_bytes == believed.free_bytes


def test_noise_of_ten_percent_hardly_moves_a_settled_profile() -> None:
    believed = device(samples=10_000)
    for seed in range(10):
        busy = slower(believed, 1 + 0.1 * (-1) ** seed)
        truth, programs = programs_of(pair(busy))
        folded = fold(believed, observe(programs[0], truth, 20, noise=0.1, seed=seed), now=1.0)
        moves = [getattr(folded, name)[2] / getattr(believed, name)[2] for name in CURVES]
        assert all(abs(move - 1) < 0.045 for move in moves)


def test_a_first_guess_is_given_up_for_what_the_first_steps_show() -> None:
    believed = device(samples=40)
    truth, programs = programs_of(pair(slower(believed, 1.15)))
    folded = fold(believed, observe(programs[0], truth, 3), now=1.0)
    assert folded.attn_forward_us[2] == pytest.approx(1.15 * believed.attn_forward_us[2], rel=0.02)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.2, 5.0), st.integers(0, 5))
def test_folding_converges_to_any_new_speed(factor: float, seed: int) -> None:
    profile = device(samples=1000)
    changed = slower(profile, factor)
    truth, programs = programs_of(pair(changed))
    for window in range(8):
        profile = fold(profile, observe(programs[0], truth, 20, noise=0.1, seed=seed + window), now=1.0)
    for name in CURVES:
        assert np.allclose(getattr(profile, name)[1:], getattr(changed, name)[1:], rtol=0.06, atol=2)


@settings(deadline=None, max_examples=25)
@given(times=st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3), seed=st.integers(0, 5))
def test_what_does_not_run_stays_when_what_runs_goes_on_in_the_same_way(times: list[float], seed: int) -> None:
    """Calls of few heads may take longer than those of many, which no curve can say: that must not add up."""
    profile = device(samples=1000)
    rng, folded = np.random.default_rng(seed), []
    for _ in range(40):
        observed = Observations()
        for _ in range(10):
            observed.add(
                {
                    ("fwd", part, 0, n): [profile_us * factor * rng.uniform(0.95, 1.05)] * 5
                    for part, profile_us in (("attn", 200.0), ("mlp", 300.0))
                    for n, factor in zip((1, 2, 3), times, strict=True)
                }
            )
        profile = fold(profile, observed, now=1.0)
        folded.append(profile)
    for name in CURVES:
        early, late = (np.array(getattr(folded[at], name)[1:]) for at in (14, 39))
        assert np.allclose(late, early, rtol=0.15, atol=2), name


def test_steps_in_which_something_else_ran_are_outliers() -> None:
    believed = device(samples=1000)
    truth, programs = programs_of(pair(believed))
    observed = observe(programs[0], truth, 20, noise=0.02)
    for times in observed.times_us.values():
        times[3], times[11] = 80 * times[3], 0.001 * times[11]
    folded = fold(believed, observed, now=1.0)
    for name in CURVES:
        assert np.allclose(getattr(folded, name)[1:], getattr(believed, name)[1:], rtol=0.03)


_CURVE_KEYS = st.tuples(
    st.sampled_from(("fwd", "bwd")), st.sampled_from(("attn", "mlp")), st.integers(0, 4), st.integers(0, 4)
)
_OTHER_KEYS = st.tuples(
    st.sampled_from(("send", "recv", "sum", "step", "tally", "embed", "unembed", "classify", "free")),
    st.sampled_from(("", "x", "part", "gradpart", "grads")),
    st.integers(0, 9),
    st.just(0),
)  # fmt: skip
_TIMES = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(1e-9, 1e9), max_size=6)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.dictionaries(_CURVE_KEYS | _OTHER_KEYS, _TIMES, max_size=6), max_size=4), st.integers(0, 500))
def test_whatever_is_observed_curves_rise_and_nothing_is_nan_zero_or_negative(
    steps: list[dict[Key, list[float]]], samples: int
) -> None:
    observed = Observations()
    for step in steps:
        observed.add(step)
    folded = fold(device(samples=samples), observed, now=1.0)
    for name in CURVES:
        curve = getattr(folded, name)
        assert curve[0] == 0 and len(curve) == 5 and list(curve) == sorted(curve) and curve[1] >= 1
    for name in FIGURES:
        assert isinstance(getattr(folded, name), int) and getattr(folded, name) >= 1
    assert math.isfinite(folded.measured_at)


def test_what_was_not_observed_moves_with_what_was() -> None:
    believed = device(samples=0)
    observed = Observations()
    for _ in range(50):
        observed.add({("fwd", "attn", 2, 0): [3.0 * believed.attn_forward_us[2]]})
    folded = fold(believed, observed, now=1.0)
    assert folded.attn_forward_us[4] == pytest.approx(3 * believed.attn_forward_us[4], rel=0.1)
    assert folded.mlp_backward_us[1] == pytest.approx(3 * believed.mlp_backward_us[1], rel=0.1)
    assert folded.sum_us == pytest.approx(3 * believed.sum_us, rel=0.15)
    assert fold(believed, Observations(), now=1.0) is believed


def test_a_call_with_full_and_forward_heads_is_split_as_the_curve_has_it() -> None:
    believed = device()
    both = believed.mlp_forward_us[1] + believed.mlp_forward_us[3]
    observed = Observations()
    for _ in range(50):
        observed.add({("fwd", "mlp", 1, 3): [2.0 * both]})
    folded = fold(believed, observed, now=1.0)
    assert folded.mlp_forward_us[1] == pytest.approx(2 * believed.mlp_forward_us[1], rel=0.06)
    assert folded.mlp_forward_us[3] == pytest.approx(2 * believed.mlp_forward_us[3], rel=0.06)


def test_waiting_in_receives_is_not_taken_for_reading() -> None:
    believed = device(recv_us=10, send_us=40)
    observed = Observations()
    for _ in range(50):
        observed.add({("send", "part", 0, 0): [40.0] * 9, ("recv", "part", 0, 0): [9000.0] * 10})
    assert fold(believed, observed, now=1.0).recv_us <= 40


def test_a_forecast_with_folded_profiles_is_the_step_that_was_observed() -> None:
    believed = pair(device(samples=0, send_us=0, recv_us=0, trunk_us=0, end_us=0))
    true = tuple(replace(slower(device(), 1.7), rank=p.rank, links=p.links) for p in believed)
    truth, programs = programs_of(true)
    folded = [fold(p, observe(program, truth, 100), 1.0) for p, program in zip(believed, programs, strict=True)]
    seen, told = simulate(programs, truth).step_us, simulate(programs, Costs(SHAPE, STEP, folded)).step_us
    assert told == pytest.approx(seen, rel=0.05)
    assert simulate(programs, Costs(SHAPE, STEP, believed)).step_us < 0.8 * seen


def test_every_instruction_has_a_key_and_the_tally_is_timed_once() -> None:
    _, programs = programs_of(pair(device()))
    keys = timing_keys(programs[0])
    assert len(keys) == len(programs[0].instructions)
    assert keys[-1] == ("step", "", 8, 0)
    assert [key for key in keys if key[0] == "tally"] == [("tally", "", 8, 0)]
    assert ("sum", "x", 2, 0) in keys and ("fwd", "attn", 2, 0) in keys
    assert any(key[:2] == ("send", "gradpart") and key[2] == 5 for key in keys)


def test_observations_survive_json() -> None:
    observed = Observations()
    observed.add({("fwd", "attn", 2, 1): [3.0, 4.0], ("step", "", 8, 0): [9.5]})
    again = Observations.from_dict(json.loads(json.dumps(observed.to_dict())))
    assert again == observed


@pytest.mark.parametrize(
    ("spoilt", "field"),
    [
        ({"attn_forward_us": (0, 5, 9, 9)}, "attn_forward_us"),
        ({"mlp_backward_us": (0, 5, math.nan, 9, 9)}, "mlp_backward_us[2]"),
        ({"mlp_backward_us": (0, 0, 5, 9, 9)}, "mlp_backward_us[1]"),
        ({"mlp_backward_us": (0, 5, 9, 8, 10)}, "mlp_backward_us"),
        ({"attn_backward_us": (0, 1, 2, 3, 10**10)}, "attn_backward_us[4]"),
        ({"sum_us": -1}, "sum_us"),
        ({"send_us": math.inf}, "send_us"),
        ({"free_bytes": -5}, "free_bytes"),
        ({"links": (None, LinkProfile(5, 0))}, "links[1].bytes_per_s"),
        ({"links": (None, LinkProfile(-5, 10))}, "links[1].latency_us"),
        ({"links": (None, None)}, "links[1]"),
        ({"links": (None,)}, "links"),
        ({"measured_at": 1e9 - STALE_S - 60}, "measured_at"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_by_rank_device_and_field(spoilt: dict[str, Any], field: str) -> None:
    check_profile(device(measured_at=1e9), SHAPE, STEP, num_workers=2, now=1e9)
    with pytest.raises(SystemFault) as caught:
        check_profile(device(**spoilt), SHAPE, STEP, num_workers=2, now=1e9)
    error = caught.value
    assert error.code == "bad_profile" and error.param == f"profile.{field}" and error.remedy
    assert "Worker 0" in error.message and "cpu" in error.message


def test_a_head_faster_than_physics_is_refused() -> None:
    huge = vit_shape(2, 1, 8192, 1000)
    quick = replace(fleet((1.0,), shape=huge)[0], **dict.fromkeys(CURVES, (0, 1)))
    with pytest.raises(SystemFault, match="no device can do that"):
        check_profile(quick, huge, StepShape(1, 64), num_workers=1)


def test_a_missing_field_and_ranks_out_of_order_are_named() -> None:
    data = asdict(device())
    del data["sum_us"]
    with pytest.raises(SystemFault, match=r"Worker 3 \(cpu\) sent a profile without sum_us"):
        read_profile(data, 3)
    check_fleet(pair(device()), SHAPE, STEP)
    with pytest.raises(SystemFault, match="rank is 1 where 0 is due"):
        check_fleet(pair(device())[::-1], SHAPE, STEP)
