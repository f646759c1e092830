"""One worker's life in a job, from model name to exported weights; knows neither Ray nor HTTP.

    prepare   build the timm model, open the data          evaluate   all heads on, before training
    profile   time heads and links                         rehearse   all-FULL steps without update: the yardstick
    score     Fisher of head gates, on other images each   train      windows of steps under plans
    plan      announce, get placement and op tables        export     gather heads at rank 0, write plain timm weights

Every worker runs the same phases in the same order; what they exchange goes through the transport or the planner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scheduler.compiler import compile_step
from scheduler.cost import Costs, residual_bytes
from scheduler.domain import DeviceProfile, Op, OpTable, Plan, StepShape, step_flops, uniform_ops
from scheduler.errors import SystemFault
from scheduler.transfers import step_bytes
from workers.artifact import write_result
from workers.contract import JobSpec
from workers.data import Needs, Prefetcher, open_dataset
from workers.events import EventLog
from workers.executor import Batch, Executor, StepPrograms, StepReport
from workers.forward import ForwardPasses
from workers.gather import gather_json, gather_state
from workers.ledger import Ledger, Measured
from workers.model import build_model, model_input
from workers.optimiser import Adam
from workers.order import MicroBatches
from workers.partition import model_shape
from workers.profiling import profile_device
from workers.scoring import fisher_sums, weight_magnitudes
from workers.shard import Shard
from workers.transport import Transport, all_sum

SCORED_IMAGES = 256
REHEARSED_STEPS = 2


class Planner(Protocol):
    """Where plans come from: the scheduler actor, or a function in tests."""

    def announce(self, announcement: dict[str, Any]) -> None:
        """Say who this worker is and what it measured; repeating it is harmless."""

    def plan(self, window: int) -> tuple[Plan, list[DeviceProfile]]:
        """The plan of a window, and every worker's profile in rank order; waits until all have announced."""


@dataclass(frozen=True)
class Place:
    """Where this worker runs. `sharers`: workers on the same machine."""

    node: str = "local"
    labels: dict[str, str] | None = None
    device: str = "cpu"
    sharers: int = 1


class Session:
    """Runs one job on one worker of a group. `log` is given to rank 0 alone."""

    def __init__(
        self,
        spec: JobSpec,
        run_dir: str | Path,
        transport: Transport,
        planner: Planner,
        log: EventLog | None,
        place: Place,
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
        self.autocast = torch.bfloat16 if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else None
        self.ledger = Ledger()

    def run(self) -> dict[str, Any]:
        """The whole job; returns the ledger (the same on every rank but for who wrote the checkpoint)."""
        with self._phase("prepare"):
            self._prepare()
        plan, profiles = self._announce_and_plan()
        self._settle(plan, profiles)
        self._emit("phase", name="running")
        with self._phase("evaluate before"):
            self.ledger.accuracy_before = self._evaluate("before")
        with self._phase("rehearse"):
            self._rehearse()
        with self._phase("train"):
            self._train(plan)
        self._emit("phase", name="finalizing")
        with self._phase("evaluate after"):
            self.ledger.accuracy_after = self._evaluate("after")
        self._export()
        return self.ledger.to_dict()

    def _prepare(self) -> None:
        # The number of classes comes from the data, the size of its images from the model: a first model tells that.
        probe = build_model(self.spec, num_classes=1, load=False)
        self.input = model_input(probe)
        self.data = open_dataset(self.spec, self.input)
        self.model = build_model(self.spec, len(self.data.classes))
        self.shape = model_shape(self.model)
        self.step_shape = StepShape(self.spec.micro_batches, self.spec.micro_batch_size)
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

    def _announce_and_plan(self) -> tuple[Plan, list[DeviceProfile]]:
        with self._phase("profile"):
            profile = profile_device(
                self.model, self.step_shape, self.transport, node=self.place.node, labels=self.place.labels,
                device=self.device, autocast=self.autocast, sharers=self.place.sharers,
            )  # fmt: skip
        with self._phase("score"):
            fisher_LH, count = fisher_sums(self.model, self._scored_batches())
        self._emit("phase", name="planning")
        with self._phase("plan"):
            self.planner.announce(
                {
                    "profile": asdict(profile),
                    "fisher": fisher_LH.tolist(),
                    "samples": count,
                    "magnitude": weight_magnitudes(self.model).tolist(),
                    "shape": asdict(self.shape),
                    "step": asdict(self.step_shape),
                    "request": plan_request(self.spec),
                }
            )
            return self.planner.plan(0)

    def _scored_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's share of the scored images: the first ones of an order of their own."""
        size = self.spec.micro_batch_size
        order = MicroBatches(self.data.num_train, size, 1, self.spec.seed + 1)
        for index in range(self.rank, math.ceil(min(SCORED_IMAGES, self.data.num_train) / size), self.transport.size):
            yield self.data.train_batch(order.indices(index)[0])

    def _settle(self, plan: Plan, profiles: list[DeviceProfile]) -> None:
        """Cut the model under the plan's placement and let go of the whole one."""
        self.costs = Costs(self.shape, self.step_shape, profiles)
        self.placement = plan.placement
        self.shard = Shard(self.model, plan.placement, self.rank, self.device)
        self.template = {name: torch.empty_like(t, device="meta") for name, t in self.model.state_dict().items()}
        del self.model
        self.adam = Adam(self.shard, self.spec.optimiser, self.total_steps)
        self.executor = Executor(
            self.shard, self.transport, label_smoothing=self.spec.optimiser.label_smoothing, autocast=self.autocast
        )
        self.passes = ForwardPasses(self.executor, plan.placement, self.costs)
        self._emit(
            "plan.created",
            f"plan {plan.version}: {plan.compute_fraction:.2f} of the compute, {plan.bytes_fraction:.2f} of the bytes",
            **plan.to_dict(),
        )

    def _compile(self, plan: Plan) -> list[StepPrograms]:
        compiled = []
        for ops_LHM in plan.cycle:
            programs = compile_step(
                plan.placement, ops_LHM, self.costs, embed_grad=self.spec.train_embed, skip_fill=plan.skip_fill
            )
            compiled.append(StepPrograms(programs, self.rank, self.costs, self.shard.dtype))
        return compiled

    def _rehearse(self) -> None:
        """All-FULL steps on training data, without update: what the plan's fractions are measured against."""
        ops_LHM = uniform_ops(self.shape, self.step_shape.num_micro_batches, Op.FULL)
        programs = compile_step(self.placement, ops_LHM, self.costs, embed_grad=self.spec.train_embed)
        steps = StepPrograms(programs, self.rank, self.costs, self.shard.dtype)
        with Prefetcher(self.data, self.order, lambda _: _needs(steps)) as batches:
            for step in range(1 + REHEARSED_STEPS):
                report = self.executor.run(steps, self._batch(batches, step))
                self.shard.clear()
                if step > 0:  # the first one warms caches and connections
                    self.ledger.rehearsal.add(_measured(report))
        self.ledger.rehearsal = self._over_workers(self.ledger.rehearsal)

    def _train(self, plan: Plan) -> None:
        self.executor.update = self.adam
        window_steps = self.spec.window
        for window in range(math.ceil(self.total_steps / window_steps)):
            if window:
                plan, _ = self.planner.plan(window)
                self._emit("plan.changed", f"plan {plan.version} for window {window}", **plan.to_dict())
            begin, end = window * window_steps, min(self.total_steps, (window + 1) * window_steps)
            if plan.skip_fill == "mean":
                images_BCHW, _ = self.data.train_batch(self.order.indices(begin)[0])
                self.executor.means = self.passes.measure_means(images_BCHW.to(self.device))
            measured = self._run_window(plan, begin, end)
            self.ledger.training.add(self._over_workers(measured))
        self.executor.update = None

    def _run_window(self, plan: Plan, begin: int, end: int) -> Measured:
        compiled = self._compile(plan)
        tolls = [_toll(plan, ops_LHM, self.costs, self.spec.train_embed) for ops_LHM in plan.cycle]
        measured = Measured()

        def needs(step: int) -> Needs | None:
            return _needs(compiled[(step - begin) % len(compiled)]) if step < end else None

        with Prefetcher(self.data, self.order, needs) as batches:
            for step in range(begin, end):
                which = (step - begin) % len(compiled)
                learning_rate = self.adam.learning_rate
                report = self.executor.run(compiled[which], self._batch(batches, step))
                self._check_finite(report, step)
                measured.add(_measured(report))
                self.ledger.planned(plan, *tolls[which])
                self._emit_metrics(report, step, learning_rate, plan, *tolls[which])
        return measured

    def _batch(self, batches: Prefetcher, step: int) -> Batch:
        data = batches.get(step)
        to = self.device
        return Batch({m: x.to(to) for m, x in data.images.items()}, {m: y.to(to) for m, y in data.labels.items()})

    def _emit_metrics(
        self, report: StepReport, step: int, learning_rate: float, plan: Plan, flops: int, sent_bytes: int
    ) -> None:
        images = self.step_shape.num_micro_batches * self.step_shape.micro_batch_size
        self._emit(
            "metrics",
            step=step + 1,
            total_steps=self.total_steps,
            epoch=(step + 1) / self.order.steps_per_epoch,
            loss=report.loss,
            train_accuracy=report.correct / images,
            learning_rate=learning_rate,
            grad_norm=report.grad_norm,
            step_seconds=report.wall_s,
            idle_share=report.idle_share,
            compute_fraction=flops / plan.all_full.flops,
            bytes_fraction=sent_bytes / max(1, plan.all_full.total_bytes),
        )

    def _check_finite(self, report: StepReport, step: int) -> None:
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            raise SystemFault(
                f"Step {step + 1}: the loss is {report.loss} and the gradient norm {report.grad_norm}.",
                code="not_finite",
                param="optimiser.learning_rate",
                remedy="Lower the learning rate, or set optimiser.clip_norm.",
            )

    def _evaluate(self, when: str) -> float:
        accuracy, loss = self.passes.evaluate(self.data)
        self._emit(
            "evaluation",
            f"accuracy {when} training: {accuracy:.4f}",
            when=when,
            accuracy=accuracy,
            loss=loss,
            num_images=self.data.num_test,
        )
        return accuracy

    def _export(self) -> None:
        """Gather every worker's part at rank 0, which writes the result folder."""
        begin = time.perf_counter()
        directory = self.run_dir / "result"
        self.ledger.checkpoint = str(directory)
        state = gather_state(self.shard, self.transport, self.template)
        if state is None or self.log is None:
            return
        # The ledger is one of the files: its own phase is what has passed until it is written.
        self.ledger.phases["export"] = time.perf_counter() - begin
        ledger = self.ledger.to_dict()
        written = write_result(
            directory, state, spec=self.spec, model_input=self.input, classes=self.data.classes, ledger=ledger
        )
        for artifact in written:
            self._emit("artifact.ready", artifact.name, **asdict(artifact))
        self._emit("ledger", "what it took", **ledger)

    def _over_workers(self, mine: Measured) -> Measured:
        """Sums over the group, but wall seconds of this worker and the mean idle share."""
        totals = all_sum(
            self.transport,
            torch.tensor(
                [mine.flops, mine.sent_bytes, mine.cpu_s, mine.idle_share], dtype=torch.float64, device=self.device
            ),
        )
        flops, sent_bytes, cpu_s, idle = totals.tolist()
        return Measured(mine.steps, flops, sent_bytes, mine.wall_s, cpu_s, idle / self.transport.size)

    def _emit(self, type: str, message: str = "", **data: Any) -> None:
        if self.log is not None:
            self.log.emit(type, message, **data)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.ledger.phases[name] = time.perf_counter() - begin


def plan_request(spec: JobSpec) -> dict[str, Any]:
    """What the planner needs to know of a job."""
    method = spec.method
    return {
        "ratios": method.ratios and method.ratios.model_dump(),
        "budgets": method.budgets and method.budgets.model_dump(),
        "strategy": method.strategy,
        "score": method.score,
        "skip_fill": method.skip_fill,
        "placement": spec.placement,
        "embed_grad": spec.train_embed,
        "seed": spec.seed,
    }


def _needs(steps: StepPrograms) -> Needs:
    return Needs(frozenset(steps.own.image_micro_batches), frozenset(steps.own.label_micro_batches))


def _measured(report: StepReport) -> Measured:
    return Measured(1, report.flops, float(sum(report.sent_bytes)), report.wall_s, report.cpu_s, report.idle_share)


def _toll(plan: Plan, ops_LHM: OpTable, costs: Costs, embed_grad: bool) -> tuple[int, int]:
    """(FLOPs, bytes) of one step under an op table."""
    sent = step_bytes(plan.placement, ops_LHM, costs.shape, costs.step, embed_grad).sum()
    return step_flops(costs.shape, costs.step, ops_LHM), int(sent)
