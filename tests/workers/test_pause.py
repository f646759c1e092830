"""A run that is paused and goes on is the run that was never paused: losses, weights, order of images, ledger."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scheduler.domain import Op, uniform_ops
from scheduler.errors import SystemFault, UserError
from tests.workers.pauses import ALONE, EVEN, THREE, TURNED, Run, patch, spec_of, vault_at
from workers import control, session
from workers.checkpoint import newest_whole
from workers.transport import InProcess, Mailboxes

# Method, window, op tables. Of the hardest, step 6 is the first of an epoch and in the middle of a window: which of its
# images come first was decided before the losses of step 5 were known.
METHODS = {
    "full": ({}, 3, None),
    "hardest": ({"ratios": {"full": 2, "skip": 1}}, 4, lambda window, shape, num: (first_ones_full(shape, num),)),
    "heads": (
        {"budgets": {"compute": 0.6}, "strategy": "hull", "skip_fill": "mean"},
        3,
        lambda window, shape, num: tuple(some_skipped(shape, num, table) for table in range(4)),
    ),
}


def first_ones_full(shape, num):
    ops = uniform_ops(shape, num, Op.FULL)
    ops[..., -1] = int(Op.SKIP)
    return ops


def some_skipped(shape, num, table):
    ops = uniform_ops(shape, num, Op.FULL)
    ops[table, :2, table % num] = int(Op.SKIP)
    ops[table + 1, 2:, 0] = int(Op.FORWARD)
    return ops


@pytest.fixture(autouse=True)
def one_model_at_a_time(monkeypatch):
    patch(monkeypatch)


def job_of(which, **fields):
    method, window, cycle = METHODS[which]
    return spec_of(method=method, window=window, **fields), cycle


_PLAIN = {}


@pytest.fixture
def plain(tmp_path_factory):
    """The run without a pause, made once for each method."""

    def of(name):
        if name not in _PLAIN:
            spec, cycle = job_of(name)
            _PLAIN[name] = Run(tmp_path_factory.mktemp("plain"), spec, None, cycle=cycle)
        return _PLAIN[name]

    return of


MORE_PAUSES = (("full", 1), ("full", 5), ("hardest", 6), ("heads", 5))


@pytest.mark.parametrize(
    ("name", "pause_at"),
    [("hardest", 4), *(pytest.param(*of, marks=pytest.mark.slow) for of in MORE_PAUSES)],
)
def test_on_the_same_placement_every_loss_and_weight_is_equal_to_the_bit(tmp_path, plain, name, pause_at):
    spec, cycle = job_of(name)
    first = Run(tmp_path / "a1", spec, vault_at(tmp_path), cycle=cycle, pause_at=pause_at)
    assert list(first.losses) == list(range(1, pause_at + 1)) and first.state is None
    assert first.saved.name == f"step-{pause_at:08d}"
    second = Run(tmp_path / "a2", spec, vault_at(tmp_path, 2, resumes=True), cycle=cycle)
    assert {**first.losses, **second.losses} == plain(name).losses
    assert list(second.losses) == list(range(pause_at + 1, 9))
    for tensor, expected in zip(second.state.values(), plain(name).state.values(), strict=True):
        assert torch.equal(tensor, expected)
    (created,) = second.told("plan.created")
    assert created["data"]["heads"] == f"of window {(pause_at - 1) // spec.window + 1}"
    rates = [event["data"]["learning_rate"] for event in plain(name).told("metrics")]
    assert [e["data"]["learning_rate"] for e in (*first.told("metrics"), *second.told("metrics"))] == rates


@pytest.mark.parametrize(
    "owners",
    [
        pytest.param(TURNED, id="turned", marks=pytest.mark.slow),
        pytest.param(THREE, id="three workers"),
        pytest.param(ALONE, id="alone", marks=pytest.mark.slow),
    ],
)
def test_on_another_placement_it_goes_on_as_if_nothing_had_been(tmp_path, plain, owners):
    spec, cycle = job_of("hardest")
    first = Run(tmp_path / "a1", spec, vault_at(tmp_path), cycle=cycle, pause_at=4)
    spec, _ = job_of("hardest", name="another", priority=3, workers=5)
    vault = vault_at(tmp_path, 2, resumes=True)
    second = Run(tmp_path / "a2", spec, vault, owners=owners, cycle=cycle, evaluates=True)
    assert second.losses == pytest.approx({step: plain("hardest").losses[step] for step in range(5, 9)}, abs=1e-5)
    for tensor, expected in zip(second.state.values(), plain("hardest").state.values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-4)
    third = Run(tmp_path / "a3", spec, vault, cycle=cycle, evaluates=True)
    assert second.told("evaluation")[-1]["data"]["accuracy"] == third.told("evaluation")[-1]["data"]["accuracy"]
    assert [e["data"]["when"] for e in second.told("evaluation")] == ["after"] and first.saved is not None


@pytest.mark.slow
def test_paused_twice_across_placements_the_windows_keep_their_borders_and_the_ledger_its_sums(tmp_path, plain):
    (spec, cycle), parts = job_of("full"), []
    for attempt, (owners, pause_at) in enumerate([(EVEN, 2), (THREE, 4), (EVEN, None)], 1):
        vault = vault_at(tmp_path, attempt, resumes=attempt > 1)
        parts.append(Run(tmp_path / f"a{attempt}", spec, vault, owners=owners, cycle=cycle, pause_at=pause_at))
    whole = {step: loss for part in parts for step, loss in part.losses.items()}
    assert whole == pytest.approx(plain("full").losses, abs=1e-5) and len(whole) == 8
    windows = [(e["data"]["window"], e["data"]["steps"]) for part in parts for e in part.told("window")]
    assert windows == [(0, 2), (1, 2), (0, 2), (1, 1), (2, 1), (0, 2), (2, 2), (3, 2)]
    progress = [[report["progress"] * 8 for report in part.planners[0].reports if report] for part in parts]
    assert progress == [[0], [2, 2, 3], [4, 4, 6]]
    ledger = parts[-1].ledger
    assert ledger["steps"] == 8 and ledger["accuracy"]["before"] == 0.25
    rows = {row["name"]: row for row in ledger["rows"]}
    assert rows["compute fraction"]["measured"] == rows["compute fraction"]["predicted"] == 1.0
    assert ledger["phases"]["train"] > parts[0].ledger["phases"]["train"]


def test_the_pause_is_told_and_the_files_are_listed(tmp_path):
    run = Run(tmp_path / "a1", spec_of(), vault_at(tmp_path), pause_at=3)
    (event,) = run.told("checkpoint.saved")
    folder = tmp_path / "checkpoints" / "job" / "step-00000003"
    assert event["data"]["path"] == str(folder) and event["data"]["step"] == 3 and event["data"]["files"] == 4
    assert event["data"]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert {event["type"] for event in run.events}.isdisjoint({"artifact.ready", "ledger"})
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert run.events[-1]["type"] == "checkpoint.saved"


@pytest.mark.slow
def test_worths_of_heads_and_of_single_images_go_on(tmp_path):
    method = {"ratios": {"full": 2, "skip": 1}, "hold": "none"}
    _, cycle = job_of("hardest")
    spec = spec_of(method=method, micro_batch_size=2)
    first = Run(tmp_path / "a1", spec, vault_at(tmp_path), cycle=cycle, pause_at=4)
    second = Run(tmp_path / "a2", spec, vault_at(tmp_path, 2, resumes=True), owners=THREE, cycle=cycle)
    found = newest_whole(vault_at(tmp_path).directory, InProcess(0, Mailboxes(1)), print)
    kept = found.group("worth")
    assert kept["images.rows"].shape == (40, 6, 6) and kept["images.known"].all()
    for planner in second.planners.values():
        scores = planner.announced["scores"]
        assert np.array_equal(scores["backward"], kept["backward"]) and np.array_equal(
            scores["forward"], kept["forward"]
        )
    worth = np.asarray(second.planners[0].reports[1]["worth_TLHM"])
    assert worth.shape == (3, 6, 6, 3)  # of the whole window, so that a cycle of tables keeps its place
    assert first.planners[0].reports[-1]["worth_TLHM"] is not None


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_without_a_whole_one_training_begins_again(tmp_path, plain):
    (spec, cycle), vault = job_of("full"), vault_at(tmp_path, resumes=True)
    for pause_at in (2, 5):
        run = Run(tmp_path / f"to{pause_at}", spec, vault, cycle=cycle, pause_at=pause_at)
    assert run.told("checkpoint.resumed")[0]["data"] == {"name": "step-00000002", "step": 2}
    (vault.directory / "step-00000005" / "rank001.safetensors").write_bytes(b"no tensors")
    older = Run(tmp_path / "older", spec, vault, cycle=cycle)
    assert list(older.losses) == [3, 4, 5, 6, 7, 8] and older.losses[8] == plain("full").losses[8]
    (damaged,) = older.told("checkpoint.damaged")
    assert damaged["level"] == "warning" and damaged["data"]["name"] == "step-00000005"
    (vault.directory / "step-00000002" / "manifest.json").unlink()
    anew = Run(tmp_path / "anew", spec, vault, cycle=cycle)
    assert anew.losses == plain("full").losses and len(anew.told("checkpoint.damaged")) == 2
    (told,) = anew.told("checkpoint.resumed")
    assert told["level"] == "warning" and told["data"] == {"name": None, "step": 0}


def test_a_checkpoint_of_another_spec_is_the_users_error(tmp_path):
    vault = vault_at(tmp_path, resumes=True)
    Run(tmp_path / "a1", spec_of(), vault, pause_at=1)
    with pytest.raises(UserError) as raised:
        Run(tmp_path / "a2", spec_of(seed=1), vault)
    assert raised.value.code == "checkpoint_mismatch"


def test_a_pause_that_cannot_be_written_fails_the_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SystemFault) as raised:
        Run(tmp_path / "a1", spec_of(), vault_at(tmp_path), pause_at=2)
    assert raised.value.code == "checkpoint_failed" and "No space left" in str(raised.value)
    assert not list(vault_at(tmp_path).directory.iterdir())


def test_a_wish_at_the_last_step_comes_too_late(tmp_path):
    run = Run(tmp_path / "a1", spec_of(), vault_at(tmp_path), pause_at=8)
    assert run.saved is None and run.state is not None and not run.told("checkpoint.saved")


def test_without_a_vault_nobody_looks_for_wishes(tmp_path):
    control.ask(tmp_path, "pause")
    assert Run(tmp_path, spec_of(steps=2), None).saved is None


@pytest.mark.slow
def test_held_heads_are_told_to_the_next_planner(tmp_path, monkeypatch):
    rows = ["110000"] * 6
    vault = vault_at(tmp_path, resumes=True)
    Run(tmp_path / "a1", spec_of(), vault, pause_at=2)
    real = session.newest_whole

    def with_held(*args):
        found = real(*args)
        object.__setattr__(found.manifest, "held", rows)
        return found

    monkeypatch.setattr(session, "newest_whole", with_held)
    second = Run(tmp_path / "a2", spec_of(), vault)
    policies = [report["policy"] for report in second.planners[1].reports[1:]]
    assert policies[0] == {"window": 0, "held": rows} and "held" not in policies[1]
