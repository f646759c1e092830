"""What-if answers with a plan and its reasons, and refuses a bad question by the field at fault."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import gantt
from scheduler.check import check
from scheduler.cost import Costs
from scheduler.devices import profiles_of, record_of
from scheduler.domain import Plan, StepShape
from scheduler.errors import InfeasibleError, UserError
from scheduler.fleets import computes_bf16, parse_device, records_of
from scheduler.request import PlanRequest
from scheduler.whatif import what_if
from tests.scheduler.fleet import fleet, vit_shape

SHAPE = vit_shape(num_blocks=4, num_heads=4, dim=64, num_tokens=50)
RATIOS = {"ratios": {"full": 2, "forward": 2, "skip": 1}}


def asking(devices=("fast", "slow"), shape=SHAPE, **more):
    step = {"num_micro_batches": 5, "micro_batch_size": 16}
    return {"shape": asdict(shape), "step": step, "plan": RATIOS, "devices": list(devices), **more}


def answered(request):
    return json.loads(json.dumps(what_if(json.loads(json.dumps(request)))))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(["fast", "slow", "cpu", "a100@n1", "2x fast@n1"]), min_size=1, max_size=3),
    st.sampled_from(["1Gbps", "100Mbps/1ms", "100Gbps/5us"]),
    st.sampled_from([RATIOS, {}, {"budgets": {"compute": 0.6}}, {"ratios": {"full": 3, "skip": 2}}]),
)
def test_an_answer_holds_a_sound_plan_and_reasons_for_all_of_it(devices, link, asked):
    answer = answered(asking(devices, link=link, gantt=True) | {"plan": asked})
    plan = Plan.from_dict(answer["plan"])
    assert len(answer["devices"]) == plan.placement.num_workers == sum(parse_device(d).count for d in devices)
    assert [[h["owner"] for h in row] for row in answer["heads"]] == plan.placement.owner_LH.tolist()
    assert all(h["reason"] for row in answer["heads"] for h in row)
    spans = gantt.from_dict(answer["gantt"])
    assert {s.worker for s in spans if s.what == "fwd"} <= set(plan.placement.owner_LH.ravel().tolist())
    assert answer["rounding_loss"] >= -1e-9 and answer["seconds"] > 0


def test_the_plan_passes_the_judge():
    answer = answered(asking(["2x fast", "slow"]))
    step = StepShape(5, 16)
    profiles = profiles_of(records_of([parse_device("2x fast"), parse_device("slow")]), SHAPE, step)
    assert not check(Plan.from_dict(answer["plan"]), Costs(SHAPE, step, profiles), PlanRequest.from_dict(RATIOS))


def test_the_same_question_has_the_same_answer():
    first, second = (answered(asking(gantt=True)) for _ in range(2))
    for answer in (first, second):
        del answer["seconds"]
        for report in ("placement_report", "selection_report"):
            del answer["plan"][report]["seconds"]
    assert first == second


def test_recorded_devices_are_planned_as_invented_ones():
    step = StepShape(5, 16)
    measured = fleet([2.0, 1.0], shape=SHAPE)
    records = [record_of(profile, SHAPE, step, ["a", "b"]).to_dict() for profile in measured]
    request = asking(records=records)
    del request["devices"]
    answer = answered(request)
    assert [d["name"] for d in answer["devices"]] == ["a", "b"]
    assert answer["devices"][0]["memory_limit_bytes"] == measured[0].free_bytes


def test_scores_rank_the_heads():
    worth = [[4 * b + h + 1.0 for h in range(4)] for b in range(4)]
    heads = answered(asking(["fast"], scores={"backward": worth, "forward": worth}))["heads"]
    assert "rank 1 of 16" in heads[3][3]["reason"] and "rank 16 of 16" in heads[0][0]["reason"]
    assert sum(h["worth"] for row in heads for h in row) == pytest.approx(16, abs=0.01)


def test_a_link_between_two_devices_is_used():
    slow_wire = {"latency_us": 10**6, "bytes_per_s": 1000}
    apart = answered(asking(["2x fast"], links=[{"a": 0, "b": 1, **slow_wire}]))
    assert sorted(d["heads"] for d in apart["devices"]) == [0, 16]


def test_a_schedule_is_answered_for_its_first_phase():
    phases = [{"share": 0.5}, {"share": 0.5, "ratios": {"full": 1, "skip": 4}}]
    answer = answered(asking() | {"plan": {"schedule": phases}})
    assert set("".join(h["ops"] for row in answer["heads"] for h in row)) == {"F"}


def test_memory_that_cannot_hold_the_model_is_said_to_lack():
    with pytest.raises(InfeasibleError, match="GB") as caught:
        what_if(asking(["fast:1MB", "slow:1MB"]))
    assert caught.value.fault == "user"


@pytest.mark.parametrize(
    ("device", "step", "part"),
    [
        ("fast", {}, 1.0),
        ("a100-fp32", {}, 1.0),
        ("t4", {}, 1.0),
        ("a100", {}, 0.55),
        ("a100", {"compute_itemsize": 4}, 1.0),
        ("fast", {"compute_itemsize": 2}, 0.55),
    ],
)
def test_memory_is_counted_as_the_devices_compute(device, step, part):
    base = {"num_micro_batches": 5, "micro_batch_size": 16}
    wide, found = (answered(asking([kind], step=base | words)) for kind, words in (("fast", {}), (device, step)))
    peaks = [each["devices"][0]["peak_bytes"] for each in (wide, found)]
    assert peaks[1] / peaks[0] == pytest.approx(part, abs=0.06)


def test_a_measured_gpu_of_capability_8_computes_in_bfloat16():
    measured = record_of(fleet([2.0], shape=SHAPE)[0], SHAPE, StepShape(5, 16), ["a"])
    assert not computes_bf16(measured)
    for capability, able in (("9.0", True), ("8.6", True), ("7.5", False), ("odd", False), (None, False)):
        facts = {"kind": "cuda", "capability": capability}
        assert computes_bf16(replace(measured, facts=facts)) == able
    assert not computes_bf16(replace(measured, facts={"kind": "cpu", "capability": "9.0"}))


def broken(param, **changes):
    return pytest.param(param, changes, id=f"{param} {str(changes)[:60]}")


@pytest.mark.parametrize(
    "param, changes",
    [
        broken("devices.1.kind", devices=["fast", "warp"]),
        broken("devices.0.kind", devices=[{"count": 2}]),
        broken("devices.0.count", devices=[{"kind": "fast", "count": 0}]),
        broken("devices.0.count", devices=[{"kind": "fast", "count": 1.5}]),
        broken("devices.0.count", devices=[{"kind": "fast", "count": "many"}]),
        broken("devices.0.memory_bytes", devices=[{"kind": "fast", "memory_bytes": math.nan}]),
        broken("devices.0.memory_bytes", devices=[{"kind": "fast", "memory_bytes": -1}]),
        broken("devices.0.node", devices=[{"kind": "fast", "node": "a b"}]),
        broken("devices.0.wings", devices=[{"kind": "fast", "wings": 2}]),
        broken("devices.0", devices=[3]),
        broken("devices", devices=["40x fast", "40x slow"]),
        broken("devices", devices=[]),
        broken("devices", devices="fast"),
        broken("devices", records=[{"id": "a"}]),
        broken("records.0.node", devices=None, records=[{"id": "a"}]),
        broken("link.bytes_per_s", link={"latency_us": 3, "bytes_per_s": 0}),
        broken("link.latency_us", link={"latency_us": math.inf, "bytes_per_s": 10**9}),
        broken("link.bytes_per_s", link="quick"),
        broken("links.0.b", links=[{"a": 0, "b": 2, "latency_us": 1, "bytes_per_s": 1}]),
        broken("links.0.b", links=[{"a": 0, "b": 0, "latency_us": 1, "bytes_per_s": 1}]),
        broken("links.0.a", links=[{"b": 1}]),
        broken("shape", shape=None),
        broken("shape.num_heads", shape={**asdict(SHAPE), "num_heads": 0}),
        broken("shape.dim", shape={**asdict(SHAPE), "dim": 1.5}),
        broken("shape.mlp_dims", shape={**asdict(SHAPE), "mlp_dims": [64]}),
        broken("shape.wings", shape={**asdict(SHAPE), "wings": 2}),
        broken("step.num_micro_batches", step={"micro_batch_size": 16}),
        broken("step.micro_batch_size", step={"num_micro_batches": 5, "micro_batch_size": 10**9}),
        broken("step.recompute", step={"num_micro_batches": 5, "micro_batch_size": 16, "recompute": 1}),
        broken("step.wire_itemsize", step={"num_micro_batches": 5, "micro_batch_size": 16, "wire_itemsize": 16}),
        broken("method.strategy", plan={"strategy": "wish"}),
        broken("plan", plan={"wings": 2}),
        broken("plan", plan={"ratios": {"skip": 2}}),
        broken("scores.backward", scores={"backward": [[1.0]], "forward": [[1.0]]}),
        broken("scores.forward", scores={"backward": [[1.0] * 4] * 4}),
        broken("horses", horses=2),
    ],
)
def test_a_bad_question_is_refused_by_the_field_at_fault(param, changes):
    with pytest.raises(UserError) as caught:
        what_if({**asking(), **changes})
    assert caught.value.param == param
    assert caught.value.remedy
