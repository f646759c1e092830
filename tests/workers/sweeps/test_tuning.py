"""What Tune and Optuna are told, without a cluster."""

from __future__ import annotations

import importlib.util
import json
import pickle
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict

from scheduler.errors import UserError
from workers.sweeps import tuning
from workers.sweeps.children import Child
from workers.sweeps.contract import SweepSpec
from workers.sweeps.proposals import Proposals
from workers.sweeps.trial import result_of

SPACE: dict[str, Any] = {
    "method.ratios": {"values": [[1, 0, 4], [3, 0, 2]]},
    "optimiser.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "steps": {"low": 5, "high": 9, "whole": True},
}
SPACE_OF_SEEDS: dict[str, Any] = {"space": {"seed": {"values": [4, 5, 6]}}}
SPEC = SweepSpec.model_validate({"space": SPACE, "search": {"type": "optuna", "seed": 3}})
FIGURES = {"accuracy": 0.9, "gflop": 5.0, "mb": 1.0, "seconds": 2.0, "steps": 4.0}


def test_a_choice_is_searched_by_place_and_a_span_within_its_ends() -> None:
    space = tuning._param_space(SPEC)
    drawn = [{path: domain.sample() for path, domain in space.items()} for _ in range(200)]
    assert {each["method.ratios"] for each in drawn} == {0, 1}
    assert {each["steps"] for each in drawn} == {5, 6, 7, 8, 9}
    assert all(1e-4 <= each["optimiser.learning_rate"] <= 1e-2 for each in drawn)


def test_a_list_is_searched_by_place() -> None:
    spec = SweepSpec.model_validate(SPACE_OF_SEEDS)
    assert tuning._param_space(spec) == {"place": {"grid_search": [0, 1, 2]}}


def study_of(objectives: dict[str, str], children: list[Child]) -> list[tuple[str, Any]]:
    """How Optuna has each proposal in the end, told as Tune tells it."""
    spec = SPEC.model_copy(update={"objectives": objectives})
    search = tuning._optuna(spec)
    assert isinstance(search, Proposals)
    search.set_search_properties(None, None, tuning._param_space(spec))
    for number, child in enumerate(children):
        search.suggest(str(number))
        result = flatten_dict({**result_of(spec, child), "training_iteration": 1})
        search.on_trial_result(str(number), result)
        search.on_trial_complete(str(number), result)
    return [(trial.state.name, trial.values) for trial in search._ot_study.trials]


ENDED = [
    Child("a", status="succeeded", figures=FIGURES), Child("b", status="failed"),
    Child("c", status="running", step=3, accuracy=0.4), Child("d", status="running", step=1),
    Child("e", status="succeeded", figures={**FIGURES, "accuracy": None}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optuna_goes_by_what_has_ended_well() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert study_of({"accuracy": "max"}, ENDED) == [
        ("COMPLETE", [0.9]), ("FAIL", None), ("PRUNED", [0.4]), ("PRUNED", None), ("FAIL", None),
    ]  # fmt: skip
    two = study_of({"accuracy": "max", "bytes": "min"}, ENDED)
    assert [state for state, _ in two] == ["COMPLETE", "FAIL", "PRUNED", "PRUNED", "FAIL"] and two[0][1] == [0.9, 1.0]


ASHA = SweepSpec.model_validate({**SPACE_OF_SEEDS, "objectives": {"loss": "min"}, "asha": {"grace_steps": 2}})
REPORTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.floats(0, 1)), max_size=40)


class Rungs:
    """Six trials before the real scheduler; what it has stopped reports no more."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.stopped: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """A driver begins, of an empty scheduler; the trials that are stopped are over for Tune."""
        self.scheduler = tuning._scheduler(ASHA)
        assert self.scheduler is not None
        for number in range(6):
            self.scheduler.on_trial_add(None, self.trial(number))

    def trial(self, number: int) -> Any:
        return SimpleNamespace(trial_id=str(number))

    def report(self, number: int, further: int, loss: float) -> str | None:
        trial = self.trial(number)
        if trial.trial_id in self.stopped:
            return None
        self.steps[trial.trial_id] = self.steps.get(trial.trial_id, 0) + further
        result = {"step": self.steps[trial.trial_id], "loss": loss}
        assert self.scheduler is not None
        said = self.scheduler.on_trial_result(None, trial, result)
        if said == "STOP":
            self.stopped.add(trial.trial_id)
        return said

    def restored(self) -> None:
        """Another driver, which Tune gives what it kept of the one before."""
        kept = pickle.loads(pickle.dumps(tuning.Teller(ASHA, None, self.scheduler).get_state()))
        self.begin()
        tuning.Teller(ASHA, None, self.scheduler).set_state(kept)


@given(before=REPORTS, after=REPORTS)
def test_asha_decides_after_a_lost_driver_as_it_would_have(before: list[Any], after: list[Any]) -> None:
    calm, struck = Rungs(), Rungs()
    for report in before:
        assert calm.report(*report) == struck.report(*report)
    struck.restored()
    assert [calm.report(*report) for report in after] == [struck.report(*report) for report in after]


def test_what_asha_was_stopping_when_the_driver_died_is_stopped() -> None:
    rungs = Rungs()
    assert [rungs.report(0, 2, 0.1), rungs.report(1, 2, 0.9)] == ["CONTINUE", "STOP"]
    rungs.stopped.clear()  # Tune has not done it yet
    rungs.restored()
    assert [rungs.report(1, 1, 0.9), rungs.report(2, 2, 0.8), rungs.report(3, 2, 0.05)] == ["STOP", "STOP", "CONTINUE"]


def test_without_asha_there_is_nothing_to_remember() -> None:
    assert tuning._scheduler(SPEC) is None and tuning.Teller(SPEC).get_state() is None


def test_without_optuna_the_field_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lacks") as missing:
        tuning._need_optuna()
    assert missing.value.param == "search.type" and "d2ft[sweeps]" in (missing.value.remedy or "")


def test_what_tune_writes_down_of_the_driver_says_nothing() -> None:
    heard: list[Child] = []
    trial: Any = SimpleNamespace(status=Trial.TERMINATED, last_result={"child": {"key": "a", "status": "succeeded"}})
    teller = tuning.Teller(SPEC, heard.append)
    teller.on_trial_complete(1, [], trial)
    pickle.loads(pickle.dumps(teller)).on_trial_complete(1, [], trial)
    assert heard == [Child("a", status="succeeded")]


def test_a_trial_whose_process_is_lost_for_good_is_a_failure(tmp_path: Any) -> None:
    (tmp_path / "error.txt").write_text("Traceback\nray.exceptions.ActorDiedError: killed by the kernel\n")
    trial: Any = SimpleNamespace(
        status=Trial.ERROR, last_result={"child": {"key": "t-x", "status": "running"}}, trial_id="x",
        config={"method.ratios": 1, "optimiser.learning_rate": 0.001, "steps": 6},
        error_file=str(tmp_path / "error.txt"),
    )  # fmt: skip
    child = tuning.child_of(SPEC, trial)
    assert child.key == "t-x" and child.setting["method.ratios"] == [3, 0, 2] and child.error
    assert child.error["code"] == "trial_lost" and "killed by the kernel" in str(json.dumps(child.error))
