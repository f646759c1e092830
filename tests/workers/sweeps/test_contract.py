"""What a sweep may ask for, and the settings that follow from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from workers.sweeps.contract import SweepContext, SweepSpec

RATIOS = {"method.ratios": {"values": [[3, 0, 2], {"full": 5}]}}
RATE = {"optimiser.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}


@pytest.mark.parametrize(
    ("body", "where", "said"),
    [
        ({"space": {}}, "space", "at least 1"),
        ({"space": {"seed": {"one": 1}}}, "space.seed", 'give {"values"'),
        ({"space": {"seed": 3}}, "space.seed", 'give {"values"'),
        ({"space": {"seed": {"values": []}}}, "space.seed.values.values", "at least 1"),
        ({"space": {"seed": {"values": [1, 2, 1]}}}, "space.seed.values.values", "1 is given twice"),
        ({"space": {"seed": {"low": 3, "high": 1}}}, "space.seed.span", "low comes first"),
        ({"space": {"seed": {"low": 3}}}, "space.seed.span.high", "required"),
        ({"space": {"steps": {"low": 0, "high": 9, "log": True}}}, "space.steps.span", "more than 0"),
        ({"space": {"dataset": {"values": ["digits"]}}}, "space", "'dataset' cannot be searched"),
        ({"space": {"method.ratios": {"values": [[9, 0, 0]]}}}, "", "method.ratios sum to 9 but a step has 5"),
        ({"space": {"method.ratios": {"values": [[5, 0]]}}}, "", "space: with method.ratios = [5, 0]: method.ratios"),
        ({"space": {"method.budgets.compute": {"values": [1.2]}}}, "", "less than or equal to 1"),
        ({"space": RATE}, "", "a grid needs values, and optimiser.learning_rate is a span"),
        ({"space": {"seed": {"values": list(range(30))}, "steps": {"values": list(range(1, 31))}}}, "", "900 settings"),
        ({"space": RATIOS, "objectives": {"speed": "max"}}, "objectives.speed.[key]", "accuracy"),
        ({"space": RATIOS, "asha": {"grace_steps": 5}}, "", "set job.checkpoint to evaluate"),
        ({"space": RATIOS, "asha": {"grace_steps": 5}, "objectives": {"compute": "min"}}, "", "accuracy or loss"),
        ({"space": {**RATIOS, "method.ratios.full": {"values": [1]}}}, "space", "cannot be searched"),
        ({"space": {"method.lora": {"values": [{}]}, "method.lora.rank": {"values": [2]}}}, "space", "the same field"),
        ({"space": RATIOS, "trials": 3}, "trials", "not permitted"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_field(body: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SweepSpec.model_validate_json(json.dumps(body))
    first = refused.value.errors()[0]
    assert ".".join(map(str, first["loc"])) == where and said in first["msg"]


def test_three_counts_stand_for_ratios() -> None:
    spec = SweepSpec.model_validate({"space": RATIOS})
    one, other = (spec.trial(setting) for setting in spec.settings())
    assert one.method.ratios is not None and (one.method.ratios.full, one.method.ratios.skip) == (3, 2)
    assert other.method.ratios is not None and other.method.ratios.full == 5


def test_a_value_of_null_leaves_the_field_as_it_is_by_default() -> None:
    spec = SweepSpec.model_validate(
        {"job": {"method": {"strategy": "hull"}}, "space": {"method.lora.rank": {"values": [None, 4]}}}
    )
    assert spec.trial({"method.lora.rank": 4}).method.lora is not None
    spec = SweepSpec.model_validate({"space": {"optimiser.learning_rate": {"values": [None, 0.01]}}})
    assert spec.trial({"optimiser.learning_rate": None}).optimiser.learning_rate is None


def test_the_baseline_is_full_fine_tuning_of_the_same_job_and_the_other_its_share() -> None:
    spec = SweepSpec.model_validate({"job": {"seed": 3, "steps": 50, "method": {"skip_fill": "mean"}}, "space": RATIOS})
    assert spec.full().seed == 3 and spec.full().method.skip_fill is None and spec.full().steps == 50
    assert spec.full(0.61).steps == 30 and spec.full(1e-9).steps == 1
    assert SweepSpec.model_validate({"space": RATIOS}).full(0.5).epochs == pytest.approx(1.5)
    assert SweepSpec.model_validate({"space": RATIOS}).full(0.467, 54).steps == 25


@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_random_settings_follow_from_the_seed_are_within_the_space_and_never_the_same(seed: int, samples: int) -> None:
    body = {"space": {**RATIOS, "seed": {"low": 0, "high": 9, "whole": True}, **RATE}}
    spec = SweepSpec.model_validate({**body, "search": {"type": "random", "samples": samples, "seed": seed}})
    found = spec.settings()
    assert found == spec.settings() and len(found) == samples == spec.num_trials
    assert len({json.dumps(setting) for setting in found}) == samples
    for setting in found:
        assert 0 <= setting["seed"] <= 9 and 1e-5 <= setting["optimiser.learning_rate"] <= 1e-2
        spec.trial(setting)


def test_a_small_space_is_exhausted_by_a_random_search() -> None:
    spec = SweepSpec.model_validate({"space": RATIOS, "search": {"type": "random", "samples": 9}})
    assert sorted(map(str, spec.settings())) == sorted(map(str, spec.grid()))


def test_a_grid_takes_every_combination() -> None:
    spec = SweepSpec.model_validate({"space": {**RATIOS, "seed": {"values": [1, 2, 3]}}})
    assert len(spec.settings()) == spec.num_trials == 6
    assert spec.settings()[1] == {"method.ratios": [3, 0, 2], "seed": 2}


def test_a_context_does_not_show_its_token() -> None:
    spec = SweepSpec.model_validate({"space": RATIOS})
    context = SweepContext(sweep_id="s", spec=spec, run_dir="/r", storage_path="/s", post_token="hush")
    assert "hush" not in repr(context) and SweepContext.model_validate_json(context.model_dump_json()) == context
