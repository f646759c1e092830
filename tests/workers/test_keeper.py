"""Checkpoints while training goes on: those of a calm run change nothing, those of a killed one lose nothing."""

from __future__ import annotations

import errno
import functools
import tempfile
from pathlib import Path

import pytest
import torch

from scheduler import failpoints
from tests.workers.pauses import THREE, Run, patch, spec_of, vault_at
from tests.workers.test_checkpoint import manifest_of
from workers import checkpoint, control, keeper
from workers.checkpoint import Vault
from workers.contract import Checkpoints
from workers.keeper import Keeper, surplus
from workers.manifest import names, read_manifest, verify


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    patch(monkeypatch)
    failpoints._seen.clear()
    begin = Keeper.begin

    def begin_and_wait(self, *args):  # steps of these runs take less time than a checkpoint
        begin(self, *args)
        self.finish()

    monkeypatch.setattr(Keeper, "begin", begin_and_wait)


def kept(**fields):
    return spec_of(checkpoint={"every_s": None, "keep": 20, **fields})


def verified(directory):
    """Names of the checkpoints, all of which are as they were written."""
    for name in names(directory):
        verify(directory / name)
    return names(directory)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_change_nothing_and_each_goes_on_bit_for_bit(tmp_path):
    calm = Run(tmp_path / "calm", spec_of(), None)
    run = Run(tmp_path / "a1", kept(every_steps=1), vault_at(tmp_path))
    assert run.losses == calm.losses and equal(run.state, calm.state)
    vault = vault_at(tmp_path).directory
    assert verified(vault) == [f"step-{step:08d}" for step in range(7, 0, -1)]
    assert [event["data"]["step"] for event in run.told("checkpoint.saved")] == list(range(1, 8))
    for step in (1, 4):
        for later in [name for name in names(vault) if int(name[5:]) > step]:
            (vault / later).rename(tmp_path / f"{later}-{step}")
        anew = Run(tmp_path / f"b{step}", kept(), vault_at(tmp_path, 2, resumes=True))
        assert anew.losses == {i: loss for i, loss in calm.losses.items() if i > step}
        assert equal(anew.state, calm.state)
        for away in tmp_path.glob(f"step-*-{step}"):
            away.rename(vault / away.name.rpartition("-")[0])


@pytest.mark.slow
def test_a_checkpoint_of_four_is_gone_on_from_by_one_two_and_three(tmp_path):
    four = [[0, 1, 2, 3, 0, 1]] * 6
    first = Run(tmp_path / "a1", kept(every_steps=4), vault_at(tmp_path), owners=four, evaluates=True)
    accuracies = []
    for name, owners in (("one", [[0] * 6] * 6), ("two", [[0, 1] * 3] * 6), ("three", THREE)):
        run = Run(tmp_path / name, kept(), vault_at(tmp_path, 2, resumes=True), owners=owners, evaluates=True)
        assert min(run.losses) == 5
        assert run.losses == pytest.approx({i: x for i, x in first.losses.items() if i > 4}, rel=1e-4)
        accuracies.append(run.told("evaluation")[-1]["data"]["accuracy"])
    assert accuracies == [first.told("evaluation")[-1]["data"]["accuracy"]] * 3


def test_the_newest_and_the_best_stay(tmp_path, monkeypatch):
    accuracies = {"at step 2": 0.9, "at step 7": 0.6}
    monkeypatch.setattr("workers.session.Session._evaluate", lambda self, when: accuracies.get(when, 0.5))
    run = Run(
        tmp_path / "a1",
        kept(every_steps=1, keep=2, evaluate=True),
        vault_at(tmp_path),
        evaluates=True,
        owners=[[0] * 6] * 6,
    )
    assert verified(vault_at(tmp_path).directory) == ["step-00000007", "step-00000006", "step-00000002"]
    assert len(run.told("checkpoint.dropped")) == 4
    assert run.told("checkpoint.saved")[1]["data"]["accuracy"] == 0.9


def test_a_pause_comes_after_what_is_being_written(tmp_path):
    run = Run(tmp_path / "a1", kept(every_steps=2), vault_at(tmp_path), pause_at=4)
    assert run.saved.step == 4 and verified(vault_at(tmp_path).directory) == ["step-00000004", "step-00000002"]


def test_a_regrouping_waits_for_the_end_of_the_window(tmp_path, monkeypatch):
    (tmp_path / "a1").mkdir()
    control.ask(tmp_path / "a1", control.REGROUP)
    run = Run(tmp_path / "a1", spec_of(), vault_at(tmp_path))
    assert run.saved.step == 3, "a window has three steps"


SLOW = pytest.mark.slow
PLACES = [
    ("checkpoint.begin", "error"),
    ("checkpoint.written", "enospc"),
    ("checkpoint.manifest", "error_after_ok"),
    ("checkpoint.rename", "enospc"),
    *(
        pytest.param(place, action, marks=SLOW)
        for place in ("checkpoint.begin", "checkpoint.written", "checkpoint.manifest", "checkpoint.rename")
        for action in ("error", "enospc", "error_after_ok")
    ),
]


@functools.cache
def calm_losses():
    with tempfile.TemporaryDirectory() as folder:
        return Run(Path(folder) / "calm", spec_of(), None).losses


@pytest.mark.parametrize(("name", "action"), PLACES)
def test_one_that_cannot_be_written_is_a_warning_and_leaves_nothing(tmp_path, monkeypatch, name, action):
    calm = calm_losses()
    monkeypatch.setenv(failpoints.VARIABLE, f"{name}:{action}")
    run = Run(tmp_path / "a1", kept(every_steps=3), vault_at(tmp_path))
    assert run.losses == calm
    (failed,) = run.told("checkpoint.failed")
    assert failed["data"]["step"] == 3 and failed["level"] == "warning" and failed["data"]["why"]
    directory = vault_at(tmp_path).directory
    told = {event["data"]["name"] for event in run.told("checkpoint.saved")}
    assert told == {"step-00000006"} <= set(verified(directory))
    Keeper(Vault(directory, group=1), Checkpoints(), 0, 1, print)
    assert not list(directory.glob("*.tmp-*")), "what is left of drafts goes with the next group"


def test_a_worker_that_cannot_write_fails_the_checkpoint_alone(tmp_path, monkeypatch):
    write, calls = checkpoint._write, []

    def failing(path, tensors):
        calls.append(path.name)
        if path.name == "rank001.safetensors" and calls.count(path.name) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write", failing)
    run = Run(tmp_path / "a1", kept(every_steps=3), vault_at(tmp_path))
    (failed,) = run.told("checkpoint.failed")
    assert "worker 1" in failed["data"]["why"] and "No space left" in failed["data"]["why"]
    assert verified(vault_at(tmp_path).directory) == ["step-00000006"]


def test_a_worker_that_never_writes_is_waited_for_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "WRITE_TIMEOUT_S", 0.3)
    told = []
    lonely = Keeper(Vault(tmp_path), Checkpoints(), 0, 2, lambda type, *_, **data: told.append((type, data)))
    lonely.begin(manifest_of(7), {"a": torch.ones(3)}, {"means": {}}, {})
    lonely.finish()
    assert [type for type, _ in told] == ["checkpoint.failed"] and "worker 1 has not written" in told[0][1]["why"]
    assert list(tmp_path.iterdir()) == []


def test_when_one_is_due(tmp_path):
    now = [0.0]
    by_time = Keeper(Vault(tmp_path), Checkpoints(every_s=10), 0, 1, print, clock=lambda: now[0])
    assert not by_time.is_due(1)
    now[0] = 10.0
    assert by_time.is_due(2)
    by_steps = Keeper(Vault(tmp_path), Checkpoints(every_s=None, every_steps=5), 0, 1, print)
    assert [step for step in range(1, 12) if by_steps.is_due(step)] == [5, 10]
    never = Keeper(Vault(tmp_path), Checkpoints(every_s=None), 0, 1, print)
    assert not any(never.is_due(step) for step in range(100))


def test_what_is_written_is_the_moment_of_the_copy(tmp_path):
    tensor = torch.zeros(1000)
    one = Keeper(Vault(tmp_path), Checkpoints(), 0, 1, lambda *_, **__: None)
    one.begin(manifest_of(7), {"a": tensor}, {"means": {"m": tensor}}, {})
    tensor += 1
    one.finish()
    found = checkpoint.Checkpoint(tmp_path / "step-00000007", read_manifest(tmp_path / "step-00000007")[0])
    assert not dict(found._tensors(lambda name: True))["a"].any() and not found.group("means")["m"].any()
    assert surplus(tmp_path, 1) == []
