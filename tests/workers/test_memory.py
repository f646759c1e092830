"""What a worker may take: limits of containers in both versions, and of users; set-up that holds no model twice."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from scheduler.actor import Scheduler
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, Placement, Scores, StepShape
from scheduler.errors import D2ftError, InfeasibleError
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from tests.workers.engine import on_threads, tiny_vit
from tests.workers.planners import DirectPlanner
from tests.workers.test_checkpoint import manifest_of
from workers import memory
from workers.checkpoint import Vault
from workers.contract import Checkpoints, JobSpec, RunContext
from workers.events import EventLog, read_events
from workers.keeper import Keeper
from workers.model import build_model, load_weights
from workers.muster import resources_of
from workers.partition import model_shape
from workers.session import Place, Session
from workers.shard import Shard

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of our own making: write(path, {file: content}), and the lines of /proc/self/cgroup."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")

    def write(own, **folders):
        (tmp_path / "own").write_text(own)
        for path, files in folders.items():
            folder = tmp_path / "cgroup" / path.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_text(content)

    return write


def test_no_group_no_limit(groups, tmp_path):
    assert memory.container_bytes() == []
    groups("0::/\n")
    assert memory.container_bytes() == []


def test_version_2_counts_every_group_around_and_what_could_be_dropped(groups):
    inner = {"memory.max": "max\n", "memory.current": "1000\n"}
    outer = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 2500\ninactive_file 400\n"}
    groups("0::/pod/box\n", pod=outer, pod__box=inner)
    assert memory.container_bytes() == [2400]


def test_version_1_knows_its_own_names_and_a_huge_number_as_no_limit(groups):
    box = {
        "memory.limit_in_bytes": "5000\n",
        "memory.usage_in_bytes": "6000\n",
        "memory.stat": "total_inactive_file 100\n",
    }
    free = {"memory.limit_in_bytes": f"{(1 << 63) - 4096}\n", "memory.usage_in_bytes": "6000\n"}
    groups("9:name=systemd:/\n4:memory:/box\n3:cpu:/other\n", memory__box=box, memory=free)
    assert memory.container_bytes() == [0]
    assert memory.available_bytes(CPU) == 0


def test_a_limit_leaves_what_the_process_does_not_take():
    memory.give_back()
    held, model_bytes = memory.resident_bytes(CPU), 10 * MIB
    has = memory.room(model_bytes, CPU, 1, None)
    assert abs(has.base_bytes + model_bytes - held) < 64 * MIB
    assert has.free_bytes >= model_bytes
    limited = memory.room(model_bytes, CPU, 1, held + 100 * MIB)
    assert limited.free_bytes + limited.base_bytes == held + 100 * MIB
    assert memory.room(model_bytes, CPU, 1, MIB).free_bytes == 1  # less than the process itself: no plan will fit
    assert memory.peak_bytes(CPU) >= held


def test_a_copy_fits_only_within_machine_and_limit():
    held = memory.resident_bytes(CPU)
    assert memory.fits(MIB, 1, None) and not memory.fits(1 << 50, 1, None)
    assert memory.fits(MIB, 1, held + 256 * MIB) and not memory.fits(257 * MIB, 1, held)


@pytest.mark.parametrize(
    ("asked", "booked", "use_gpu", "allowed", "memory_booked"),
    [
        (None, {}, False, None, None),
        (4 * MIB, {}, False, 4 * MIB, 4 * MIB),
        (None, {"memory": 3e6}, False, 3_000_000, 3e6),
        (4 * MIB, {"memory": 3e6}, False, 3_000_000, 3e6),
        (4 * MIB, {"memory": 3e6}, True, 4 * MIB, 3e6),
    ],
)
def test_a_worker_may_take_what_the_job_says_and_ray_books(asked, booked, use_gpu, allowed, memory_booked):
    context = RunContext(
        job_id="j", spec=JobSpec(worker_memory_bytes=asked), run_dir="/r", storage_path="/s", use_gpu=use_gpu,
        resources_per_worker={"CPU": 1.0, **booked},
    )  # fmt: skip
    assert context.worker_memory_bytes == allowed
    assert resources_of(context).get("memory") == memory_booked


def test_a_cut_model_keeps_no_weights_of_its_blocks():
    model, whole = tiny_vit(), tiny_vit()
    placement = Placement.make([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], 2)
    shard, same = Shard(model, placement, 0, consume=True), Shard(whole, placement, 0)
    assert all(param.is_meta for param in model.blocks.parameters())
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(shard.named_parameters(), same.named_parameters(), strict=True)
    )


def test_loaded_weights_take_the_place_of_the_first_ones(tmp_path):
    spec = JobSpec(model="vit_tiny_patch16_224", model_args={"img_size": 32, "depth": 2})
    other = build_model(spec.model_copy(update={"seed": 1}), 3)
    safetensors.torch.save_file({k: v.half() for k, v in other.state_dict().items()}, tmp_path / "w.safetensors")
    model = build_model(spec, 3)
    frozen = next(iter(model.blocks.parameters())).requires_grad_(False)
    load_weights(model, tmp_path / "w.safetensors")
    assert not frozen.is_meta and not any(param.is_meta for param in model.parameters())
    assert next(iter(model.blocks.parameters())).requires_grad is False
    assert all(param.dtype == torch.float32 for param in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name].half().float(), rtol=0, atol=0)


class _Capped(DirectPlanner):
    """Tells the scheduler of a device that holds `room` bytes of a model, beside its process."""

    room = base = 0

    def announce(self, announcement):
        profile = announcement["profile"]
        self.base = profile["base_bytes"]
        profile = {**profile, "free_bytes": self.room, "limit_bytes": self.base + self.room}
        super().announce({**announcement, "profile": profile})


SMALL = {"model": "vit_small_patch16_224", "model_args": {"img_size": 32}, "steps": 1, "images_per_class": 8,
         "micro_batches": 3, "micro_batch_size": 2, "dataset": "digits"}  # fmt: skip


def run_capped(spec, folder, size, room):
    scheduler = Scheduler()

    def work(rank, transport):
        planner = _Capped(scheduler, rank, size)
        planner.room = room
        with EventLog(folder) if rank == 0 else nullcontext() as log:
            ledger = Session(spec, folder, transport, planner, log, Place(sharers=size)).run()
        return ledger["memory"], planner.base

    torch.set_num_threads(1)
    return on_threads(size, work)


@pytest.mark.slow
def test_22_million_parameters_train_on_two_workers_of_which_one_is_too_small(tmp_path):
    spec = JobSpec.model_validate(SMALL)
    shape, step = model_shape(build_model(spec, 10)), StepShape(3, 2)
    zeros = (0,) * (shape.num_heads + 1)
    alone = DeviceProfile(0, "n", "cpu", zeros, zeros, zeros, zeros, 1, 1, 1, 1, 1 << 40, (None,))
    worth = Scores(*np.ones((2, shape.num_blocks, shape.num_heads)))
    (whole,) = make_plan(PlanRequest(), Costs(shape, step, [alone]), worth).memory_bytes
    room = round(0.6 * whole)
    with pytest.raises(D2ftError) as refused:
        run_capped(spec, tmp_path / "one", 1, room)
    assert (refused.value.code, refused.value.param) == ("memory_infeasible", "worker_memory_bytes")
    with pytest.raises(InfeasibleError):
        make_plan(PlanRequest(), Costs(shape, step, [replace(alone, free_bytes=room)]), worth)

    (told, base), (_, other) = run_capped(spec, tmp_path / "two", 2, room)
    needs = [need - own for need, own in zip(told["predicted_bytes"], (base, other), strict=True)]
    assert all(0 < need <= room for need in needs) and len(told["measured_bytes"]) == 2
    (plan,) = [e["data"] for _, e in read_events(tmp_path / "two" / "events.jsonl", 0) if e["type"] == "plan.created"]
    owners = np.array(plan["placement"]["owners"])
    assert {0, 1} == set(owners.ravel().tolist())
    # Programs are ordered anew after the rehearsal, so that other activations may be kept at once.
    assert plan["memory_bytes"] == pytest.approx(told["predicted_bytes"], rel=0.02)
    assert (tmp_path / "two" / "result" / "model.safetensors").stat().st_size > 80_000_000


@pytest.mark.parametrize("has_room", [True, False])
def test_a_checkpoint_is_copied_where_there_is_room_and_else_waited_for(tmp_path, has_room):
    told, sizes = [], []

    def fits(num_bytes):
        sizes.append(num_bytes)
        return has_room

    keeper = Keeper(Vault(tmp_path), Checkpoints(), 0, 1, lambda type, *_, **__: told.append(type), fits=fits)
    held = torch.arange(6.0)
    keeper.begin(manifest_of(step=1), {"head.weight": held}, {}, {})
    if not has_room:
        assert told == ["checkpoint.saved"]  # already
    held.zero_()  # as the next step's update would
    keeper.finish()
    assert told == ["checkpoint.saved"] and sizes == [24]
    (folder,) = tmp_path.iterdir()
    assert safetensors.torch.load_file(folder / "rank000.safetensors")["head.weight"].tolist() == list(range(6))
