"""Fleets are spoken in a line; what cannot be is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.devices import check_record
from scheduler.domain import LinkProfile
from scheduler.errors import UserError
from scheduler.fleets import KINDS, DeviceSpec, parse_device, parse_link, records_of, spoken_link, with_links

kinds = st.one_of(st.sampled_from(sorted(KINDS)), st.integers(1, 900).map(lambda n: f"{n}TFLOPS"))
nodes = st.one_of(st.just(""), st.from_regex(r"\A[a-z][a-z0-9.\-]{0,8}\Z"))
specs = st.builds(DeviceSpec, kinds, st.integers(1, 64), st.none() | st.integers(1, 10**13), nodes)


@given(specs)
def test_specs_print_and_parse_back_equal(spec):
    assert parse_device(str(spec)) == spec
    assert DeviceSpec.from_dict(spec.to_dict()) == spec


@given(st.integers(1, 10**14), st.integers(0, 10**8))
def test_links_print_and_parse_back_equal(bytes_per_s, latency_us):
    link = LinkProfile(latency_us, bytes_per_s)
    assert parse_link(spoken_link(link)) == link


@pytest.mark.parametrize(
    "text, spec",
    [
        ("fast", DeviceSpec("fast")),
        ("2x fast:24GB", DeviceSpec("fast", 2, 24 * 10**9)),
        ("3×slow:8GiB@rack-1", DeviceSpec("slow", 3, 8 << 30, "rack-1")),
        ("A100@n1", DeviceSpec("a100", 1, None, "n1")),
        ("12TFLOPS:24GB", DeviceSpec("12TFLOPS", 1, 24 * 10**9)),
    ],
)
def test_a_line_names_count_kind_memory_and_node(text, spec):
    assert parse_device(text) == spec


@pytest.mark.parametrize(
    "text, link",
    [
        ("1Gbps", LinkProfile(100, 125_000_000)),
        ("10Gbps/50us", LinkProfile(50, 1_250_000_000)),
        ("800MB/s", LinkProfile(100, 800_000_000)),
        ("800MB/s/1ms", LinkProfile(1000, 800_000_000)),
    ],
)
def test_a_link_names_width_and_latency(text, link):
    assert parse_link(text) == link


@pytest.mark.parametrize(
    "text, param",
    [
        ("warp", "devices.kind"),
        ("0x fast", "devices.count"),
        ("-1x fast", "devices.count"),
        ("65x fast", "devices.count"),
        ("fast:12", "devices.memory_bytes"),
        ("fast:0GB", "devices.memory_bytes"),
        ("0TFLOPS", "devices.kind"),
        ("99999PFLOPS", "devices.kind"),
        ("nanTFLOPS", "devices.kind"),
        ("", "devices"),
        ("fast fast", "devices"),
    ],
)
def test_bad_devices_are_refused_by_name(text, param):
    with pytest.raises(UserError) as caught:
        parse_device(text)
    assert caught.value.param == param


@pytest.mark.parametrize("text, param", [("0Gbps", "bytes_per_s"), ("fast", "bytes_per_s"), ("1Gbps/9", "latency_us")])
def test_bad_links_are_refused_by_name(text, param):
    with pytest.raises(UserError) as caught:
        parse_link(text)
    assert caught.value.param == f"link.{param}"


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="warp") as caught:
        parse_device("warp")
    assert all(kind in caught.value.remedy for kind in ("fast", "slow", "cpu", "t4", "a100", "h100"))


@given(st.lists(specs, min_size=1, max_size=4).filter(lambda found: sum(s.count for s in found) <= 64))
def test_every_spec_becomes_sound_records_with_ids_of_their_own(found):
    records = records_of(found)
    assert len(records) == sum(spec.count for spec in found) == len({r.id for r in records})
    for record in records:
        check_record(record)


def test_devices_stand_alone_unless_they_name_a_node():
    alone, together = records_of([parse_device("2x fast")]), records_of([parse_device("2x fast@n1")])
    assert len({r.node for r in alone}) == 2 and len({r.node for r in together}) == 1


def test_too_many_devices_are_refused():
    with pytest.raises(UserError, match="64") as caught:
        records_of([parse_device("40x fast"), parse_device("40x slow")])
    assert caught.value.param == "devices"


def test_a_gpu_with_bfloat16_is_faster_than_itself_in_float32():
    for name in (kind for kind in KINDS if f"{kind}-fp32" in KINDS):
        assert KINDS[name].flops_per_s >= KINDS[f"{name}-fp32"].flops_per_s
    assert KINDS["fast"].flops_per_s == 4 * KINDS["slow"].flops_per_s


def test_a_link_joins_both_ends():
    link = LinkProfile(5, 10**9)
    first, second, third = with_links(records_of([parse_device("3x fast")]), [(0, 2, link)])
    assert first.links == {third.id: link} and third.links == {first.id: link} and not second.links
