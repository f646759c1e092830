"""Device records carry what one job measured over to another."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.devices import NETWORK_LINK, NODE_LINK, DeviceRecord, part_flops, profiles_of, record_of
from scheduler.domain import LinkProfile, StepShape
from scheduler.errors import UserError
from tests.scheduler.fleet import fleet, vit_shape

STEP = StepShape(5, 16)
CURVES = ("attn_forward_us", "attn_backward_us", "mlp_forward_us", "mlp_backward_us")
SINGLES = ("embed_us", "classify_us", "sum_us", "update_us", "send_us", "recv_us", "trunk_us", "end_us", "free_bytes")


def shapes():
    sizes = st.tuples(st.integers(1, 24), st.sampled_from([2, 3, 6, 12, 16]), st.sampled_from([32, 64]))
    return sizes.map(lambda s: vit_shape(s[0], s[1], s[1] * s[2], 50))


rates = st.integers(10**9, 10**15)


@st.composite
def records(draw, count=1):
    forward = [draw(st.integers(10**10, 10**13)) for _ in range(count)]
    return tuple(
        DeviceRecord(
            id=f"device{i}",
            node=draw(st.sampled_from(["n1", "n2"])),
            device="some GPU",
            call_us=draw(st.integers(0, 500)),
            forward_flops_per_s=forward[i],
            backward_flops_per_s=draw(st.integers(forward[i] // 4, 4 * forward[i])),
            sum_bytes_per_s=draw(st.integers(10**8, 10**11)),
            memory_bytes=draw(st.integers(1, 10**12)),
            trunk_flops_per_s=draw(st.integers(10**9, 10**12)),
            update_params_per_s=draw(st.integers(10**6, 10**9)),
            send_bytes_per_s=draw(st.integers(0, 10**10)),
            recv_bytes_per_s=draw(st.integers(0, 10**10)),
            unit_us=draw(st.integers(0, 100)),
            end_us=draw(st.integers(0, 10**5)),
            attn_slowdown=draw(st.floats(0.5, 4)),
            links=draw(st.dictionaries(st.sampled_from(["device0", "elsewhere"]), links, max_size=2)),
            facts={"cores": 2},
            measured_at=1.5,
            samples=draw(st.integers(0, 100)),
        )
        for i in range(count)
    )


links = st.builds(LinkProfile, st.integers(0, 10**5), st.integers(10**3, 10**11))


@given(records())
def test_a_record_is_json_and_reads_back_equal(found):
    assert DeviceRecord.from_dict(json.loads(json.dumps(found[0].to_dict()))) == found[0]


@settings(max_examples=60, deadline=None)
@given(shapes(), records(2), st.booleans(), st.sampled_from([2, 4]))
def test_a_profile_that_comes_from_a_record_gives_the_record_back(shape, found, recompute, wire):
    step = replace(STEP, recompute=recompute, wire_itemsize=wire)
    profiles = profiles_of(found, shape, step)
    again = tuple(record_of(p, shape, step, [r.id for r in found]) for p in profiles)
    for profile, other in zip(profiles, profiles_of(again, shape, step), strict=True):
        assert_alike(profile, other, 0.03)
        assert other.links == profile.links


@settings(max_examples=40, deadline=None)
@given(shapes(), st.floats(0.2, 20), st.integers(0, 300), st.floats(0, 0.03), st.integers(0, 9))
def test_noisy_curves_come_back_within_a_few_percent(shape, speed, overhead_us, noise, seed):
    rng = np.random.default_rng(seed)
    (profile,) = fleet([speed], shape=shape, overhead_us=overhead_us)
    noisy = {}
    for name in CURVES:
        curve = np.array(getattr(profile, name)) * (1 + noise * rng.uniform(-1, 1, shape.num_heads + 1))
        noisy[name] = tuple(int(v) for v in np.maximum.accumulate(np.maximum(curve, 0)).round())
    (again,) = profiles_of([record_of(type(profile)(**{**vars(profile), **noisy}), shape, STEP, ["a"])], shape, STEP)
    for name in CURVES:
        assert_near(getattr(profile, name), getattr(again, name), 0.08)


def test_a_record_of_one_job_forecasts_a_wider_one():
    small, large = vit_shape(12, 6, 384, 50), vit_shape(12, 12, 768, 197)
    (measured,), (wanted,) = (fleet([3.0], shape=shape) for shape in (small, large))
    (forecast,) = profiles_of([record_of(measured, small, STEP, ["a"])], large, STEP)
    for name in CURVES:
        assert_near(getattr(wanted, name), getattr(forecast, name), 0.05)


def test_links_are_the_recorded_one_or_the_nodes_or_the_networks():
    shape = vit_shape()
    a, b, c = (
        DeviceRecord(name, node, "gpu", 1, *[10**12] * 3, 10**9, *[10**9] * 2, links=links)
        for name, node, links in [("a", "n1", {}), ("b", "n1", {"c": LinkProfile(7, 7000)}), ("c", "n2", {})]
    )
    links = [p.links for p in profiles_of([a, b, c], shape, STEP)]
    assert links[0] == (None, NODE_LINK, NETWORK_LINK)
    assert links[1][2] == links[2][1] == LinkProfile(7, 7000)
    assert profiles_of([a, b, c], shape, STEP, LinkProfile(1, 1))[0].links[2] == LinkProfile(1, 1)


def test_a_worker_without_an_id_is_known_by_its_peers_name_for_it():
    shape = vit_shape()
    record = record_of(fleet([1.0, 1.0], shape=shape)[1], shape, STEP, ["left", "right"])
    assert record.id == "right" and set(record.links) == {"left"}


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**30, "much", None, True])
@pytest.mark.parametrize("name", ["forward_flops_per_s", "memory_bytes", "sum_bytes_per_s"])
def test_absurd_numbers_are_refused_by_name(name, value):
    (good,) = profiles_of_one()
    with pytest.raises(UserError) as caught:
        DeviceRecord.from_dict({**good.to_dict(), name: value}, "records.3")
    assert caught.value.param == f"records.3.{name}"


def test_missing_and_unknown_fields_are_refused_by_name():
    (good,) = profiles_of_one()
    data = good.to_dict()
    for broken, param in (
        ({k: v for k, v in data.items() if k != "node"}, "records.node"),
        ({**data, "wings": 2}, "records.wings"),
        ({**data, "links": {"b": {"latency_us": 3}}}, "records.links.b.bytes_per_s"),
        ({**data, "id": ""}, "records.id"),
    ):
        with pytest.raises(UserError) as caught:
            DeviceRecord.from_dict(broken)
        assert caught.value.param == param


def test_flops_of_the_parts_add_up_to_a_heads():
    shape = vit_shape()
    assert sum(part_flops(shape, STEP).values()) == shape.head_forward_flops(0, 16)


def profiles_of_one():
    shape = vit_shape()
    return (record_of(fleet([1.0], shape=shape)[0], shape, STEP, ["a"]),)


def assert_alike(some, other, tolerance):
    for name in CURVES:
        assert_near(getattr(some, name), getattr(other, name), tolerance)
    for name in SINGLES:
        assert_near([getattr(some, name)], [getattr(other, name)], tolerance)


def assert_near(some, other, tolerance):
    """Equal to a fraction, or to the last few µs that rounding takes."""
    for a, b in zip(some, other, strict=True):
        assert abs(a - b) <= max(4, tolerance * max(a, b)), (some, other)
