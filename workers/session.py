"""One worker's life in a job, from model name to exported weights; knows neither Ray nor HTTP.

    prepare   build the timm model, open the data          evaluate   all heads on, before training
    profile   time heads and links                         rehearse   all-FULL steps without update: the yardstick
    score     worth of heads, on other images each         train      windows of steps, a plan before each
    plan      announce, get the placement                  export     gather heads at rank 0, write plain timm weights

Every worker runs the same phases in the same order; what they exchange goes through the transport or the planner. With
a vault checkpoints are kept while training goes on, and a run can be paused: training stops between two steps, and a
checkpoint takes the place of the export. One that goes on from a checkpoint loads it in `prepare`, neither scores nor
evaluates what was before, and ends the window under the plan that it had, if it has workers of the same kind.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scheduler import failpoints
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import DeviceProfile
from workers.artifact import write_result
from workers.casting import compute_type
from workers.changes import Planned
from workers.checkpoint import Checkpoint, Saved, Vault, check_same_job, newest_whole, part_of, save
from workers.contract import JobSpec
from workers.control import DRAIN, PAUSE, REGROUP, asked
from workers.data import imbalance, open_dataset
from workers.events import EventLog
from workers.executor import Executor
from workers.forward import ForwardPasses
from workers.freezing import choose_trained
from workers.gather import gather_json, gather_state
from workers.keeper import Keeper
from workers.ledger import Ledger
from workers.liveworth import LiveWorth
from workers.manifest import Manifest, fingerprint
from workers.memory import fits, give_back, peak_bytes
from workers.model import build_model, model_input
from workers.optimiser import Adam
from workers.order import MicroBatches
from workers.partition import cut_of, model_shape
from workers.precision import step_shape
from workers.profiling import profile_device
from workers.pulse import Pulse, Quiet
from workers.shard import Shard
from workers.spans import Span
from workers.steps import SAVE, STOP
from workers.transport import Transport
from workers.windows import Engine, Planner, Windows

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this worker runs. `sharers`: workers on the same machine; `memory_bytes`: what its process may take."""

    node: str = "local"
    labels: dict[str, str] | None = None
    device: str = "cpu"
    sharers: int = 1
    memory_bytes: int | None = None

    @property
    def main_memory_bytes(self) -> int | None:
        """What it may take of the machine's memory."""
        return self.memory_bytes if self.device == "cpu" else None


class Session:
    """Runs one job on one worker of a group. `log` is given to rank 0 alone.

    `saved` is the checkpoint that a paused run ended with.
    """

    def __init__(
        self,
        spec: JobSpec,
        run_dir: str | Path,
        transport: Transport,
        planner: Planner,
        log: EventLog | None,
        place: Place,
        vault: Vault | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.spec, self.run_dir, self.transport, self.planner, self.log, self.place = (
            spec,
            Path(run_dir),
            transport,
            planner,
            log,
            place,
        )
        self.rank = transport.rank
        self.device = torch.device(place.device)
        self.autocast = compute_type(spec.precision, self.device)
        self.ledger = Ledger()
        self.vault, self.pulse = vault, pulse or Quiet()
        self.saved: Saved | None = None
        self._found: Checkpoint | None = None
        self._kept: Planned | None = None  # the plan that the checkpoint was trained under, where it holds on
        self._keeper: Keeper | None = None
        if vault is not None:
            self._keeper = Keeper(
                vault, spec.checkpoint, self.rank, transport.size, self._emit,
                fits=lambda num_bytes: fits(num_bytes, place.sharers, place.main_memory_bytes),
            )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """The whole job, or up to a pause; returns the ledger (the same on every rank but for who wrote the result)."""
        try:
            return self._run()
        finally:
            if self._keeper is not None:
                self._keeper.give_up()

    def _run(self) -> dict[str, Any]:
        with self._phase("prepare"):
            self._prepare()
            self._find()
        planned = self._announce_and_plan()
        windows = self._settle(planned)
        self._emit("phase", name="running")
        if self._found is None:
            with self._phase("evaluate before"):
                self.ledger.accuracy_before = self._evaluate("before")
        with self._phase("rehearse"):
            report = windows.rehearse(planned)
        with self._phase("train"):
            rest = windows.train(planned, report)
        if self._keeper is not None:
            self._keeper.finish()
        if rest is not None:
            with self._phase("checkpoint"):
                self.saved = self._save(windows, rest)
            return self.ledger.to_dict()
        self._emit("phase", name="finalizing")
        with self._phase("evaluate after"):
            self.ledger.accuracy_after = self._evaluate("after")
        self._export()
        return self.ledger.to_dict()

    def _prepare(self) -> None:
        # The number of classes comes from the data, the size of its images from the model: a first model tells that.
        with torch.device("meta"):
            self.input = model_input(build_model(self.spec, num_classes=1, load=False))
        self.data = open_dataset(self.spec, self.input, progress=lambda: self.pulse.phase("prepare"))
        self.model = build_model(self.spec, len(self.data.classes))
        choose_trained(self.model, self.spec.method, self.spec.seed)
        self.shape = model_shape(self.model)
        spec, bf16 = self.spec, self.autocast is not None
        self.step_shape = step_shape(spec.micro_batches, spec.micro_batch_size, spec.precision, bf16=bf16)
        self.transport.prepare(residual_bytes(self.shape, self.step_shape))
        self.order = MicroBatches(
            self.data.num_train, self.spec.micro_batch_size, self.spec.micro_batches, self.spec.seed
        )
        self.total_steps = self.spec.steps or max(1, math.ceil(self.spec.epochs * self.order.steps_per_epoch))
        # A file that one worker alone cannot read would shift the order there: what any of them skips, all do.
        skipped = sorted(set().union(*gather_json(self.transport, self.data.skipped, self.device)))
        if skipped != sorted(self.data.skipped):
            self.data = open_dataset(self.spec, self.input, skipped=skipped)
        if self.data.skipped:
            count = len(self.data.skipped)
            self._emit(
                "data.skipped",
                f"{count} images cannot be read and are left out",
                level="warning",
                count=count,
                files=self.data.skipped[:20],
            )
        if (uneven := imbalance(self.data)) is not None:
            message = f"the largest class has {uneven['ratio']} times the images of the smallest"
            self._emit("data.imbalanced", message, level="warning", **uneven)

    def _find(self) -> None:
        """Look for a checkpoint to go on from, and take over its weights and its ledger."""
        if self.vault is None or self.vault.resume_from is None:
            return
        found = newest_whole(self.vault.resume_from, self.transport, self._emit, self.device)
        if found is None:
            message = f"no whole checkpoint in {self.vault.resume_from}; training starts from the beginning"
            self._emit("checkpoint.resumed", message, level="warning", name=None, step=0)
            return
        told = found.manifest
        check_same_job(told, fingerprint(self.spec), self.data.num_train)
        found.load_weights(self.model.state_dict(), cut_of(self.model))
        self.ledger, self._found = Ledger.from_sums(told.ledger), found
        self._emit("checkpoint.resumed", f"training goes on after step {told.step}", name=told.name, step=told.step)

    def _announce_and_plan(self) -> Planned:
        with self._phase("profile"):
            self.profile = profile_device(
                self.model, self.step_shape, self.transport, node=self.place.node, labels=self.place.labels,
                device=self.device, autocast=self.autocast, sharers=self.place.sharers,
                limit_bytes=self.place.memory_bytes,
            )  # fmt: skip
        with self._phase("score"):
            self.worth = LiveWorth(self.spec, self.shape, self.step_shape, self.transport, self.device)
            if self._found is None:
                scores = self.worth.score(self.model, self.data, self.run_dir)
            else:
                scores = self.worth.restore(self._found.group("worth"), self.data.num_train, self.run_dir)
        self._emit("phase", name="planning")
        with self._phase("plan"):
            self.planner.announce(
                {
                    "profile": asdict(self.profile),
                    "scores": scores,
                    "shape": asdict(self.shape),
                    "step": asdict(self.step_shape),
                    "request": plan_request(self.spec),
                }
            )
            done = None if self._found is None else self._found.manifest.step / self.total_steps
            planned = self.planner.plan(0, None if done is None else {"progress": done})
            self._kept = None if self._found is None else kept_plan(self._found, planned.profiles)
            return self._kept or planned

    def _settle(self, planned: Planned) -> Windows:
        """Cut the model under the plan's placement and let go of the whole one."""
        plan, optimiser = planned.plan, self.spec.filled_optimiser
        costs = Costs(self.shape, self.step_shape, planned.profiles)
        self.template = {name: torch.empty_like(t, device="meta") for name, t in self.model.state_dict().items()}
        shard = Shard(self.model, plan.placement, self.rank, self.device, consume=True)
        del self.model
        give_back()
        adam = Adam(shard, optimiser, self.total_steps)
        executor = Executor(shard, self.transport, label_smoothing=optimiser.label_smoothing, autocast=self.autocast)
        executor.pulse = self.pulse
        self.engine = Engine(
            self.transport, costs, shard, adam, executor, ForwardPasses(executor, plan.placement, costs)
        )
        self._emit(
            "plan.created",
            f"plan {plan.version}: {plan.compute_fraction:.2f} of the compute, {plan.bytes_fraction:.2f} of the bytes",
            **planned.shown(),
        )
        windows = Windows(
            self.spec, self.engine, self.profile, self.data, self.order, self.total_steps, self.worth, self.planner,
            self.ledger, self._emit, self._wishes, lambda rest, ledger: self._keep(windows, rest, ledger),
        )  # fmt: skip
        if self._found is not None:
            told = self._found.manifest
            adam.step = told.adam_step
            adam.rebuild(
                shard, self._found.optimiser_state([name for name, _ in shard.named_parameters()], self.device)
            )
            hardest, means = self._found.group("hardest"), self._found.group("means")
            windows.go_on(told.step, hardest, means, told.held, self._kept)
        return windows

    def _evaluate(self, when: str) -> float:
        accuracy, loss = self.engine.passes.evaluate(self.data)
        self._emit(
            "evaluation",
            f"accuracy {when} training: {accuracy:.4f}",
            when=when,
            accuracy=accuracy,
            loss=loss,
            num_images=self.data.num_test,
        )
        return accuracy

    def _wishes(self, span: Span, step: int) -> int:
        """What is wanted behind this step. Only rank 0 looks; the others hear of it with the step's tallies."""
        if self.rank != 0 or self._keeper is None:
            return 0
        want, ends = asked(self.run_dir), step + 1 == span.end
        stop = want in (PAUSE, DRAIN) or (want == REGROUP and ends)
        return (STOP if stop else 0) + (SAVE if self._keeper.is_due(step + 1) else 0)

    def _keep(self, windows: Windows, rest: Span, ledger: Ledger) -> None:
        """Have a checkpoint written while training goes on; between two steps, collective."""
        assert self._keeper is not None
        accuracy = None
        if self.spec.checkpoint.evaluate:
            accuracy = self._evaluate(f"at step {rest.first}")
        part, group = part_of(self.engine.shard, self.engine.adam), self._known_alike(windows)
        self._keeper.begin(self._manifest(windows, rest, ledger, accuracy), part, group, plan_dict(windows.in_use))

    def _save(self, windows: Windows, rest: Span) -> Saved:
        """Write a checkpoint between two steps, `rest` being what is left of the window, while all wait; collective."""
        assert self.vault is not None and self._keeper is not None
        manifest, engine = self._manifest(windows, rest, self.ledger, None), self.engine
        group, plan = self._known_alike(windows), plan_dict(windows.in_use)
        saved = save(self.vault, manifest, engine.shard, engine.adam, self.transport, group, plan)
        self._keeper.listed(saved)
        return saved

    def _known_alike(self, windows: Windows) -> dict[str, dict[str, Tensor]]:
        return {**windows.state(), "worth": self.worth.state()}

    def _manifest(self, windows: Windows, rest: Span, ledger: Ledger, accuracy: float | None) -> Manifest:
        assert self.vault is not None and windows.in_use is not None
        return Manifest(
            job_id=self.vault.job_id,
            fingerprint=fingerprint(self.spec),
            step=rest.first,
            total_steps=self.total_steps,
            adam_step=self.engine.adam.step,
            workers=self.transport.size,
            seed=self.spec.seed,
            num_train=self.data.num_train,
            window={"number": rest.number, "begin": rest.begin, "end": rest.end},
            owners=self.engine.shard.placement.owner_LH.tolist(),
            held=windows.in_use.plan.policy.get("held"),
            ledger=ledger.sums(),
            accuracy=accuracy,
        )

    def _export(self) -> None:
        """Gather every worker's part at rank 0, which writes the result folder."""
        begin = time.perf_counter()
        directory = self.run_dir / "result"
        self.ledger.checkpoint = str(directory)
        self.engine.adam.forget()  # rank 0 needs the room for the whole model
        self.engine.shard.clear()
        state = gather_state(self.engine.shard, self.transport, self.template)
        self.ledger.peak_bytes = gather_json(self.transport, peak_bytes(self.device), self.device)
        if state is None or self.log is None:
            return
        # The ledger is one of the files: its own phase is what has passed until it is written.
        self.ledger.phases["export"] = time.perf_counter() - begin
        ledger = self.ledger.to_dict()
        failpoints.hit("result.write")
        written = write_result(
            directory, state, spec=self.spec, model_input=self.input, classes=self.data.classes, ledger=ledger,
            warn=lambda why: self._emit("export.failed", why, level="warning"),
        )  # fmt: skip
        for artifact in written:
            self._emit("artifact.ready", artifact.name, **asdict(artifact))
        self._emit("ledger", "what it took", **ledger)

    def _emit(self, type: str, message: str = "", **data: Any) -> None:
        if self.log is not None:
            self.log.emit(type, message, **data)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self.pulse.phase(name)
        yield
        seconds = time.perf_counter() - begin
        _LOG.info("%s took %.2f s", name, seconds)
        self.ledger.phases[name] = self.ledger.phases.get(name, 0.0) + seconds


def plan_dict(planned: Planned | None) -> dict[str, Any]:
    """A plan in use and the profiles that it rests on, for a checkpoint; with what is told of it."""
    assert planned is not None
    profiles = [asdict(profile) for profile in planned.profiles]
    return {"plan": planned.plan.to_dict(), "profiles": profiles, "told": planned.told}


def kept_plan(found: Checkpoint, profiles: list[DeviceProfile]) -> Planned | None:
    """The plan that a checkpoint was trained under, if today's workers are of the same kind; with its profiles.

    Programs follow from both, and the order in which sums are added from the programs: under the same plan a resumed
    run computes, bit for bit, what it would have computed.
    """
    then = Planned.from_answer(found.plan)
    alike = [_kind(profile) for profile in then.profiles] == [_kind(profile) for profile in profiles]
    return then if alike else None


def _kind(profile: DeviceProfile) -> tuple[str, Any]:
    """What two devices have in common that may stand in for each other."""
    return profile.device.partition(":")[0], profile.facts.get("name")


def plan_request(spec: JobSpec) -> dict[str, Any]:
    """What the planner needs to know of a job."""
    return {
        **spec.method.to_plan(),
        "placement": spec.placement,
        "embed_grad": spec.trains_embedding,
        "seed": spec.seed,
    }
