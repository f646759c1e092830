"""Checkpoints: written whole or not at all, read by any placement, and never silently when a byte is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from scheduler.domain import Placement
from scheduler.errors import SystemFault, UserError
from tests.workers.engine import on_threads, tiny_vit
from workers import checkpoint, manifest
from workers.checkpoint import Vault, check_same_job, drop_drafts, newest_whole, save
from workers.contract import JobSpec, Optimiser
from workers.manifest import Manifest, fingerprint
from workers.optimiser import Adam
from workers.partition import cut_of
from workers.shard import Shard

SPEC = Optimiser(learning_rate=1e-2)
OWNERS = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
OTHER = [[2, 2, 1, 0], [0, 0, 0, 0], [1, 2, 0, 1]]
NEVER_FULL = ("b01.h2.", "b02.h0.")  # heads without a gradient, so without a state


def manifest_of(step=42, **fields):
    told = {
        "job_id": "job", "fingerprint": "f", "step": step, "total_steps": 100, "adam_step": step, "workers": 2,
        "seed": 0, "num_train": 30, "window": {"number": 1, "begin": 0, "end": 50}, "owners": OWNERS,
        "held": None, "ledger": {},
    }  # fmt: skip
    return Manifest(**{**told, **fields})


def grad_of(name, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(model, rank, size, owners):
    """A shard after two updates whose gradients depend on names alone, so that trunk replicas stay equal."""
    shard = Shard(model, Placement.make(owners, size), rank)
    adam = Adam(shard, SPEC, 100)
    for _ in range(2):
        for name, param in shard.named_parameters():
            param.grad = None if name.startswith(NEVER_FULL) else grad_of(name, param.shape)
        adam(1.0)
    shard.clear()
    return shard, adam


PLAN = {"plan": {"version": 1}, "profiles": []}
GROUP = {"hardest": {"loss_N": torch.tensor([1.0, float("inf")], dtype=torch.float64)}, "means": {}}


def saved_at(directory, step=42, attempt=1, owners=OWNERS):
    model = tiny_vit()

    def work(rank, transport):
        shard, adam = trained(model, rank, 2, owners)
        return save(Vault(directory, "job", attempt), manifest_of(step), shard, adam, transport, GROUP, PLAN)

    one, two = on_threads(2, work)
    assert one == two
    return one


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A directory with checkpoints after steps 7 and 42."""
    directory = tmp_path_factory.mktemp("vault")
    for step in (7, 42):
        saved_at(directory, step)
    return directory


@pytest.fixture
def vault(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "vault")
    return tmp_path / "vault"


def found_in(directory, size=1):
    """What a group of this size goes on from, and what rank 0 told."""
    told = []

    def work(rank, transport):
        emit = (lambda type, message, **data: told.append((type, data))) if rank == 0 else (lambda *_, **__: None)
        return newest_whole(directory, transport, emit)

    found = on_threads(size, work)
    assert len({one and one.folder for one in found}) == 1
    return found[0], told


def test_any_placement_finds_its_heads_and_their_state_by_name(vault):
    found, told = found_in(vault, size=3)
    assert found.manifest.step == 42 and not told and found.manifest.owners == OWNERS
    blank = tiny_vit(init_values=None)
    with torch.no_grad():
        for param in blank.parameters():
            param.zero_()
    found.load_weights(blank.state_dict(), cut_of(blank))
    for rank in range(3):
        shard = Shard(blank, Placement.make(OTHER, 3), rank)
        adam = Adam(shard, SPEC, 100)
        adam.rebuild(shard, found.optimiser_state([name for name, _ in shard.named_parameters()], "cpu"))
        expected, expected_adam = trained(tiny_vit(), rank, 3, OTHER)
        for (name, param), (_, wanted) in zip(shard.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(param, wanted), name
            state, wanted_state = adam.state_of(name), expected_adam.state_of(name)
            assert state.keys() == wanted_state.keys() == (set() if name.startswith(NEVER_FULL) else state.keys())
            assert all(torch.equal(state[key], wanted_state[key]) for key in state), name
    assert torch.equal(found.group("hardest")["loss_N"], GROUP["hardest"]["loss_N"]) and not found.group("means")


def test_what_is_on_the_disk_is_tensors_and_json_and_can_be_checked_by_hand(vault):
    folder = vault / "step-00000042"
    names = {
        "rank000.safetensors",
        "rank001.safetensors",
        "group.safetensors",
        "manifest.json",
        "manifest.sha256",
        "plan.json",
    }
    assert {path.name for path in folder.iterdir()} == names
    told = json.loads((folder / "manifest.json").read_text())
    assert (
        told["format"] == 1
        and told["step"] == 42
        and {f["name"] for f in told["files"]}
        == names
        - {
            "manifest.json",
            "manifest.sha256",
        }
    )
    parts = [safetensors.torch.load_file(folder / f"rank00{rank}.safetensors") for rank in (0, 1)]
    assert not parts[0].keys() & parts[1].keys() and "b01.h3.qkv_w|exp_avg" in parts[1]
    assert os.system(f"cd {folder} && sha256sum --status -c manifest.sha256") == 0


FILES = (
    "rank000.safetensors",
    "rank001.safetensors",
    "group.safetensors",
    "plan.json",
    "manifest.json",
    "manifest.sha256",
)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_older_one_is_taken(vault, name):
    path = vault / "step-00000042" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(len(whole))
    for position in {0, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found, told = found_in(vault)
        assert found.manifest.step == 7, position
        ((type, data),) = told
        assert type == "checkpoint.damaged" and data["name"] == "step-00000042" and data["why"]
        assert data["level"] == "warning"
    path.write_bytes(whole)
    assert found_in(vault)[0].manifest.step == 42


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_empty_or_gone_is_found(vault, name):
    path = vault / "step-00000042" / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n", None):
        path.unlink() if content is None else path.write_bytes(content)
        assert found_in(vault, size=2)[0].manifest.step == 7


def test_files_that_changed_places_are_found(vault):
    one, two = (vault / "step-00000042" / f"rank00{rank}.safetensors" for rank in (0, 1))
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert found_in(vault)[0].manifest.step == 7


def test_files_of_another_checkpoint_or_under_another_name_are_found(vault):
    shutil.copy(vault / "step-00000007" / "group.safetensors", vault / "step-00000042")
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(vault / "step-00000007" / name, vault / "step-00000042")
    found, told = found_in(vault)
    assert found.manifest.step == 7 and "step-00000007" in told[0][1]["why"]


def test_a_manifest_of_another_format_is_passed_over(vault):
    folder = vault / "step-00000042"
    found = manifest.read_manifest(folder)[0]
    object.__setattr__(found, "format", 2)
    manifest.write_manifest(folder, found)
    found, told = found_in(vault)
    assert found.manifest.step == 7 and "format is 2" in told[0][1]["why"]


def test_where_nothing_is_whole_nothing_is_found(vault, tmp_path):
    for name in ("step-00000042", "step-00000007"):
        (vault / name / "group.safetensors").write_bytes(b"")
    found, told = found_in(vault, size=2)
    assert found is None and [data["name"] for _, data in told] == ["step-00000042", "step-00000007"]
    assert found_in(tmp_path / "nowhere") == (None, [])


def test_damage_that_only_one_worker_sees_counts_for_all(vault, monkeypatch):
    real = manifest.check_file

    def check(folder, file):
        if folder.name == "step-00000042" and file.name == "rank001.safetensors":
            raise OSError("Input/output error")
        real(folder, file)

    monkeypatch.setattr(manifest, "check_file", check)
    found, told = found_in(vault, size=3)
    assert found.manifest.step == 7 and told[0][1]["why"] == "Input/output error"


def failing_after(monkeypatch, module, name, error, times):
    real, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "error", "times"),
    [
        (checkpoint.safetensors.torch, "save_file", SafetensorError("Error while serializing: I/O error"), 0),
        (checkpoint.safetensors.torch, "save_file", FULL, 1),
        (checkpoint.safetensors.torch, "save_file", FULL, 2),
        (checkpoint, "describe", FULL, 1),
        (checkpoint, "write_manifest", FULL, 0),
        *((os, "fsync", FULL, times) for times in range(7)),
    ],
)
def test_a_write_that_fails_leaves_nothing_and_is_a_fault_of_the_system(
    tmp_path, monkeypatch, module, name, error, times
):
    failing_after(monkeypatch, module, name, error, times)
    with pytest.raises(SystemFault) as raised:
        saved_at(tmp_path / "vault")
    assert raised.value.code == "checkpoint_failed" and "step-00000042" in str(raised.value)
    monkeypatch.undo()
    assert list((tmp_path / "vault").iterdir()) == []
    assert saved_at(tmp_path / "vault").step == 42


def test_a_failure_leaves_older_checkpoints_as_they_are(vault, monkeypatch):
    failing_after(monkeypatch, checkpoint, "write_manifest", FULL, 0)
    with pytest.raises(SystemFault):
        saved_at(vault, step=50)
    assert found_in(vault)[0].manifest.step == 42


def test_a_step_that_is_saved_again_replaces_what_was_there(vault):
    (vault / "step-00000042" / "group.safetensors").write_bytes(b"damaged")
    saved_at(vault, attempt=2)
    assert found_in(vault)[0].manifest.step == 42
    assert sorted(path.name for path in vault.iterdir()) == ["step-00000007", "step-00000042"]


def test_drafts_of_earlier_groups_go_and_those_of_later_ones_stay(tmp_path):
    later = ["step-00000009.tmp-a2.1", "step-00000009.tmp-a3.0", "step-00000042.tmp-a10.0"]
    for name in ("step-00000009.tmp-a1.7", "step-00000042.tmp-a2.0", "step-00000001.tmp-a1.0.old", *later):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank000.safetensors").write_bytes(b"half")
    drop_drafts(Vault(tmp_path, attempt=2, group=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(later)
    saved_at(tmp_path)
    assert manifest.names(tmp_path) == ["step-00000042"]


def test_the_newest_is_the_one_of_the_last_step(tmp_path):
    for name in ("step-00000010", "step-100000000", "step-00000009", "step-9", "other", "step-00000011.tmp-a1"):
        (tmp_path / name).mkdir()
    assert manifest.names(tmp_path) == ["step-100000000", "step-00000010", "step-00000009"]


def test_a_spec_that_trains_alike_has_the_same_fingerprint():
    spec = JobSpec(steps=5)
    outside = {
        "name": "n",
        "metadata": {"a": "b"},
        "priority": 1,
        "queue_timeout_s": 5.0,
        "workers": 7,
        "min_workers": 2,
    }
    assert fingerprint(JobSpec(steps=5, **outside)) == fingerprint(spec)
    assert fingerprint(JobSpec(steps=5, optimiser={"learning_rate": 5e-4})) == fingerprint(spec)
    for other in ({"seed": 1}, {"window": 7}, {"optimiser": {"weight_decay": 0.1}}, {"method": {"strategy": "full"}}):
        assert fingerprint(JobSpec(steps=5, **other)) != fingerprint(spec)


def test_a_checkpoint_of_something_else_is_refused():
    told = manifest_of()
    check_same_job(told, "f", 30)
    for args in (("g", 30), ("f", 31)):
        with pytest.raises(UserError) as raised:
            check_same_job(told, *args)
        assert raised.value.code == "checkpoint_mismatch"


def test_weights_that_do_not_fit_the_model_are_refused(vault):
    found, _ = found_in(vault)
    for model in (tiny_vit(depth=2), tiny_vit(depth=4), tiny_vit(mlp_ratio=4.0)):
        with pytest.raises(UserError) as raised:
            found.load_weights(model.state_dict(), cut_of(model))
        assert raised.value.code == "checkpoint_mismatch"
