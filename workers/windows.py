"""The windows of a job: rehearse, then train, each window under the plan that the last one's measurements gave.

    window 0    all-FULL steps without update: the yardstick, and a first look at live timings
    window n    steps ─► timings folded into the profile ─► gathered by all ─► report ─► planner ─► plan of window n + 1
                                                                     another placement? ─► migrate, rehearse one step

Windows end where a phase of the schedule does, and where training stops on a wish; what goes on from there begins with
the rest of that window. All workers see the same gathered values, so they hand the same report
to the planner and get the same plan.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scheduler import failpoints
from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, Op, OpTable, Plan, step_flops, uniform_ops
from scheduler.errors import SystemFault
from scheduler.profiles import Observations, fold
from scheduler.transfers import step_bytes
from workers.changes import Planned, changed, look, owners
from workers.contract import JobSpec
from workers.data import Dataset, Needs, Prefetcher
from workers.executor import Executor
from workers.forward import ForwardPasses
from workers.gather import gather_json
from workers.hardest import HardestFirst
from workers.ledger import Ledger, Measured, WindowSeen
from workers.liveworth import LiveWorth
from workers.migration import migrate
from workers.optimiser import Adam
from workers.order import MicroBatches
from workers.shard import Shard
from workers.spans import Span, spans_from, window_spans
from workers.steps import SAVE, STOP, Batch, StepPrograms, StepReport
from workers.timeline import Timeline
from workers.trace import UNTRACED
from workers.transport import Transport, all_sum

REHEARSED_STEPS = 2
TIMED_STEPS = 2  # of a window on CUDA, where timing an instruction means waiting for it

Report = dict[str, Any]


class Planner(Protocol):
    """Where plans come from: the scheduler actor, or a function in tests."""

    def announce(self, announcement: dict[str, Any]) -> None:
        """Say who this worker is and what it measured; repeating it is harmless."""

    def plan(self, window: int, report: Report | None) -> Planned:
        """The plan of a window; waits until all have announced. All workers give the same report.

        There is none at first, but for the `progress` of a run that goes on from a checkpoint.
        """


@dataclass
class Engine:
    """What runs steps on one worker, under the placement in use."""

    transport: Transport
    costs: Costs
    shard: Shard
    adam: Adam
    executor: Executor
    passes: ForwardPasses


@dataclass
class _Seen:
    """What one worker saw in one window."""

    reports: list[tuple[float, float]] = field(default_factory=list)  # wall and busy seconds of each step
    measured: Measured = field(default_factory=Measured)
    observed: Observations = field(default_factory=Observations)

    def add(self, report: StepReport) -> None:
        self.reports.append((report.wall_s, report.wall_s - report.wait_s))
        self.measured.add(_measured(report))
        self.observed.add(report.timings_us)


class Windows:
    """Runs all windows of a job on one worker; methods are collective. `emit(type, message, **data)` tells the log.

    `wishes` says, before every step, what this worker wants behind it: STOP, SAVE or both; `save` is called between two
    steps, with what is left of the window and the ledger up to there, when rank 0 has wished for it.
    """

    def __init__(
        self,
        spec: JobSpec,
        engine: Engine,
        profile: DeviceProfile,
        data: Dataset,
        order: MicroBatches,
        total_steps: int,
        worth: LiveWorth,
        planner: Planner,
        ledger: Ledger,
        emit: Callable[..., None],
        wishes: Callable[[Span, int], int] = lambda span, step: 0,
        save: Callable[[Span, Ledger], None] = lambda rest, ledger: None,
    ) -> None:
        self.spec, self.engine, self.profile, self.data, self.order = spec, engine, profile, data, order
        self.total_steps, self.worth, self.planner, self.ledger, self.emit = total_steps, worth, planner, ledger, emit
        self.wishes, self.save, self.pulse = wishes, save, engine.executor.pulse
        self.in_use: Planned | None = None
        self._kept: Planned | None = None  # the plan that the rest of a window goes on under
        self._held: Any = None  # heads that a plan before the first one here held FULL
        self.spans = window_spans(total_steps, spec.window, [phase.share for phase in spec.method.schedule])
        self.device = engine.shard.device
        self.hardest = HardestFirst(order) if spec.method.sorts_images else None
        self.timeline = Timeline(engine.transport, self.device, emit)
        self._full = Measured()  # all-FULL steps under the placement in use

    def go_on(
        self,
        step: int,
        hardest: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        held: Any,
        kept: Planned | None = None,
    ) -> None:
        """Begin at a step in the middle, with what `state` said there and the heads that were held FULL.

        With `kept` the window ends under the plan that it began with.
        """
        self.spans, self._held = spans_from(self.spans, step), held
        self._kept = kept if kept is not None and self.spans[0].first > self.spans[0].begin else None
        if self.hardest is not None:
            self.hardest.restore(hardest)
        for name, mean_HD in means.items():
            block, _, part = name.partition(".")
            self.engine.executor.means[int(block), part] = mean_HD.to(self.device)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What has to be known between two steps, besides weights and AdamW's state, to go on as if nothing was."""
        means = {f"{block}.{part}": mean_HD for (block, part), mean_HD in self.engine.executor.means.items()}
        return {"hardest": {} if self.hardest is None else self.hardest.state(), "means": means}

    def rehearse(self, planned: Planned) -> Report:
        """All-FULL steps on training data, without update; what to tell the planner afterwards."""
        seen = self._all_full(REHEARSED_STEPS, warm_up=1)
        report = self._close(0, planned.plan, planned.plan.all_full.step_us, seen, self.spans[0])
        if self._held is not None:
            report["policy"] = {**report["policy"], "held": self._held}
        return report

    def train(self, planned: Planned, report: Report) -> Span | None:
        """All windows of training, each under its own plan. The rest of the span that a wish stopped; None at the end.

        A wish at the last step comes too late.
        """
        engine = self.engine
        engine.executor.gates = self.worth.gates
        for span, following in zip(self.spans, [*self.spans[1:], None], strict=True):
            self.pulse.phase("plan")
            before, planned = planned, self._kept or self.planner.plan(span.number, report)
            self._kept, planned = None, replace(planned, told=planned.told or before.told)
            self._change(before.plan, planned, span.first)
            self.in_use, plan = planned, planned.plan
            if plan.skip_fill == "mean" and span.first == span.begin:
                images_BCHW, _ = self.data.train_batch(self.order.indices(span.begin)[0])
                engine.executor.means = engine.passes.measure_means(images_BCHW.to(self.device))
            engine.executor.update = engine.adam
            seen, rest = self._steps(plan, span)
            engine.executor.update = None
            self._with(self.ledger, seen)
            report = self._close(span.number, plan, plan.forecast.step_us, seen, following)
            if rest is not None:
                return rest
        return None

    def _steps(self, plan: Plan, span: Span) -> tuple[_Seen, Span | None]:
        """Run a span's steps; with what was seen, what is left of it if a wish stopped them."""
        compiled = self._compile(plan)
        tolls = [self._toll(plan, ops_LHM) for ops_LHM in plan.cycle]
        seen, on_cuda, executor = _Seen(), self.device.type == "cuda", self.engine.executor

        def needs(step: int) -> Needs | None:
            return _needs(compiled[(step - span.begin) % len(compiled)]) if step < span.end else None

        self.pulse.phase("train")
        augment = self.spec.augment.wanted
        with Prefetcher(self.data, self.hardest or self.order, needs, augment=augment) as batches:
            for step in range(span.first, span.end):
                self.pulse.step(step)
                failpoints.hit("step.begin")
                which = (step - span.begin) % len(compiled)
                learning_rate = self.engine.adam.learning_rate
                trace = self.timeline.trace(step, span, len(compiled))
                timed = bool(trace) or span.first < step <= span.first + TIMED_STEPS if on_cuda else None
                executor.wishes = self.wishes(span, step) | self.timeline.wishes(trace)
                batch = self._batch(batches, step)
                report = executor.run(compiled[which], batch, step=step, timed=timed, trace=trace or UNTRACED)
                self._check_finite(report, step)
                if self.hardest is not None:
                    self.hardest.learn(step, report.losses_MB, compiled[which].running)
                seen.add(report)
                self.ledger.planned(plan, *tolls[which])
                self._emit_metrics(report, step, learning_rate, plan, len(compiled[which].running), *tolls[which])
                self.timeline.tell(step, span, trace, report)
                if report.wishes & (STOP | SAVE) and step + 1 < self.total_steps:
                    rest = replace(span, first=step + 1)
                    if report.wishes & STOP:
                        return seen, rest
                    self.pulse.phase("checkpoint")
                    self.save(rest, self._with(copy.deepcopy(self.ledger), seen))
                    self.pulse.phase("train")
        return seen, None

    def _check_finite(self, report: StepReport, step: int) -> None:
        """Raise on all workers, with where it shows, when loss or gradients are no numbers; collective then."""
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            return
        shard = self.engine.shard
        mine = all(bool(param.isfinite().all()) for _, param in shard.named_parameters())
        ranks = [rank for rank, fine in enumerate(gather_json(self.engine.transport, mine, self.device)) if not fine]
        images = (self.hardest or self.order).indices(step)
        bad = sorted({int(images[m][b]) for m, b in np.argwhere(~np.isfinite(report.losses_MB))})
        where = f"weights of the workers {ranks}" if ranks else "no weights"
        raise SystemFault(
            f"Step {step + 1}: the loss is {report.loss} and the gradient norm {report.grad_norm}; this shows in the "
            f"losses of the images {bad[:20] or 'none'} and in {where}.",
            code="not_finite",
            param="optimiser.learning_rate",
            remedy="Lower the learning rate, or set optimiser.clip_norm.",
        )

    def _with(self, ledger: Ledger, seen: _Seen) -> Ledger:
        """The ledger, to which the steps of a window are added; collective."""
        ledger.training.add(self._over_workers(seen.measured))
        ledger.rehearsal.add(self._full.of_steps(len(seen.reports)))
        return ledger

    def _close(self, window: int, plan: Plan, forecast_us: int, seen: _Seen, following: Span | None) -> Report:
        """Fold what was timed, gather it, and say how good the forecast was; the report for the next plan."""
        self.profile = fold(self.profile, seen.observed, time.time())
        step_s, busy_s = (statistics.median(column) for column in zip(*seen.reports, strict=True))
        mine = {"profile": asdict(self.profile), "step_s": step_s, "busy_s": busy_s, "worth": self.worth.take()}
        everyone = gather_json(self.engine.transport, mine, self.device)
        self.worth.learn([of["worth"] for of in everyone], self.order)
        told = WindowSeen(
            window=window,
            steps=len(seen.reports),
            step_seconds_median=max(of["step_s"] for of in everyone),
            forecast_seconds=forecast_us / 1e6,
            busy=[of["busy_s"] for of in everyone],
        )
        self.ledger.windows.append(told)
        self.emit("window", f"window {window}: {told.error:+.0%} of the forecast", **told.to_dict())
        begin, end, first = (self.total_steps,) * 3
        if following is not None:
            begin, end, first = following.begin, following.end, following.first
        return {
            "profiles": {str(rank): of["profile"] for rank, of in enumerate(everyone)},
            **self.worth.report(self.order, begin, end),
            "progress": first / self.total_steps,
            "steps_left": self.total_steps - first,
            "measured": {"step_us": round(1e6 * told.step_seconds_median), "forecast_us": forecast_us},
            "policy": plan.policy,
            "placement": plan.placement.to_dict(),
        }

    def _change(self, before: Plan, planned: Planned, begin: int) -> None:
        """Go over to the next window's plan: move heads where it says so, and say what is different."""
        engine, plan = self.engine, planned.plan
        engine.costs = Costs(engine.costs.shape, engine.costs.step, planned.profiles)
        engine.passes = ForwardPasses(engine.executor, plan.placement, engine.costs)
        migration = None
        if owners(plan) != owners(before):
            moved = migrate(engine.shard, engine.adam, engine.transport, plan.placement)
            sent = all_sum(engine.transport, torch.tensor([sum(moved.sent_bytes)], device=self.device))
            migration = {"heads": moved.moved_heads, "bytes": int(sent), "seconds": moved.seconds}
            self.ledger.migrations.append(migration)
            self._all_full(1, begin=begin)
        if look(plan) != look(before):
            told = changed(before, planned, migration)
            what = f"{told['moved_heads']} heads move" if migration else "other operations, heads stay"
            why = f"{told['cause']}; {told['reason']}"
            self.emit("plan.changed", f"plan {plan.version}: {what}; {why}", **planned.shown(), change=told)

    def _all_full(self, steps: int, *, begin: int = 0, warm_up: int = 0) -> _Seen:
        """All-FULL steps without update: what the fractions under this placement are measured against."""
        engine = self.engine
        ops_LHM = uniform_ops(engine.costs.shape, engine.costs.step.num_micro_batches, Op.FULL)
        placement = engine.shard.placement
        programs = compile_step(placement, ops_LHM, engine.costs, embed_grad=self.spec.trains_embedding)
        compiled = StepPrograms(programs, engine.transport.rank, engine.costs, engine.shard.dtype)
        seen = _Seen()
        with Prefetcher(self.data, self.order, lambda _: _needs(compiled)) as batches:
            for step in range(warm_up + steps):
                report = engine.executor.run(compiled, self._batch(batches, begin + step), timed=True)
                engine.shard.clear()
                if step >= warm_up:  # the first one warms caches and connections
                    seen.add(report)
        self._full = self._over_workers(seen.measured)
        return seen

    def _compile(self, plan: Plan) -> list[StepPrograms]:
        engine = self.engine
        compiled = []
        for ops_LHM in plan.cycle:
            programs = compile_step(
                plan.placement, ops_LHM, engine.costs, embed_grad=self.spec.trains_embedding, skip_fill=plan.skip_fill
            )
            compiled.append(StepPrograms(programs, engine.transport.rank, engine.costs, engine.shard.dtype))
        return compiled

    def _toll(self, plan: Plan, ops_LHM: OpTable) -> tuple[int, int]:
        """(FLOPs, bytes) of one step under an op table."""
        costs = self.engine.costs
        sent = step_bytes(plan.placement, ops_LHM, costs.shape, costs.step, self.spec.trains_embedding).sum()
        return step_flops(costs.shape, costs.step, ops_LHM), int(sent)

    def _batch(self, batches: Prefetcher, step: int) -> Batch:
        data = batches.get(step)
        to = self.device
        return Batch({m: x.to(to) for m, x in data.images.items()}, {m: y.to(to) for m, y in data.labels.items()})

    def _emit_metrics(
        self, report: StepReport, step: int, learning_rate: float, plan: Plan, ran: int, flops: int, sent_bytes: int
    ) -> None:
        self.emit(
            "metrics",
            step=step + 1,
            total_steps=self.total_steps,
            epoch=(step + 1) / self.order.steps_per_epoch,
            loss=report.loss,
            train_accuracy=report.correct / (ran * self.engine.costs.step.micro_batch_size),
            learning_rate=learning_rate,
            grad_norm=report.grad_norm,
            step_seconds=report.wall_s,
            idle_share=report.idle_share,
            compute_fraction=flops / plan.all_full.flops,
            bytes_fraction=sent_bytes / max(1, plan.all_full.total_bytes),
        )

    def _over_workers(self, mine: Measured) -> Measured:
        """Sums over the group, but wall seconds of this worker and the mean idle share."""
        values = [mine.flops, mine.sent_bytes, mine.cpu_s, mine.idle_share]
        totals = all_sum(self.engine.transport, torch.tensor(values, dtype=torch.float64, device=self.device))
        flops, sent_bytes, cpu_s, idle = totals.tolist()
        return Measured(mine.steps, flops, sent_bytes, mine.wall_s, cpu_s, idle / self.engine.transport.size)


def _needs(steps: StepPrograms) -> Needs:
    return Needs(frozenset(steps.own.image_micro_batches), frozenset(steps.own.label_micro_batches))


def _measured(report: StepReport) -> Measured:
    return Measured(1, report.flops, float(sum(report.sent_bytes)), report.wall_s, report.cpu_s, report.idle_share)
