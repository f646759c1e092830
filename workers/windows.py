"""The windows of a job: rehearse, then train, each window under the plan that the last one's measurements gave.

    window 0    all-FULL steps without update: the yardstick, and a first look at live timings
    window n    steps ─► timings folded into the profile ─► gathered by all ─► report ─► planner ─► plan of window n + 1
                                                                     another placement? ─► migrate, rehearse one step

Windows end where a phase of the schedule does. All workers see the same gathered values, so they hand the same report
to the planner and get the same plan.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from scheduler.compiler import compile_step
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, Op, OpTable, Plan, step_flops, uniform_ops
from scheduler.errors import SystemFault
from scheduler.profiles import Observations, fold
from scheduler.transfers import step_bytes
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
from workers.steps import Batch, StepPrograms, StepReport
from workers.transport import Transport, all_sum

REHEARSED_STEPS = 2
TIMED_STEPS = 2  # of a window on CUDA, where timing an instruction means waiting for it

Report = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """The planner's answer: the plan, the profiles in rank order that it rests on, and why it is what it is."""

    plan: Plan
    profiles: list[DeviceProfile]
    change: dict[str, Any] = field(default_factory=dict)


class Planner(Protocol):
    """Where plans come from: the scheduler actor, or a function in tests."""

    def announce(self, announcement: dict[str, Any]) -> None:
        """Say who this worker is and what it measured; repeating it is harmless."""

    def plan(self, window: int, report: Report | None) -> Planned:
        """The plan of a window; waits until all have announced. All workers give the same report (None at first)."""


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
    """Runs all windows of a job on one worker; methods are collective. `emit(type, message, **data)` tells the log."""

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
    ) -> None:
        self.spec, self.engine, self.profile, self.data, self.order = spec, engine, profile, data, order
        self.total_steps, self.worth, self.planner, self.ledger, self.emit = total_steps, worth, planner, ledger, emit
        self.spans = window_spans(total_steps, spec.window, [phase.share for phase in spec.method.schedule])
        self.device = engine.shard.device
        self.hardest = HardestFirst(order) if spec.method.sorts_images else None
        self._full = Measured()  # all-FULL steps under the placement in use

    def rehearse(self, planned: Planned) -> Report:
        """Window 0: all-FULL steps on training data, without update; what to tell the planner afterwards."""
        seen = self._all_full(REHEARSED_STEPS, warm_up=1)
        return self._close(0, planned.plan, planned.plan.all_full.step_us, seen)

    def train(self, planned: Planned, report: Report) -> None:
        """All windows of training, each under its own plan."""
        engine = self.engine
        engine.executor.gates = self.worth.gates
        for window, (begin, end) in enumerate(self.spans, 1):
            before, planned = planned, self.planner.plan(window, report)
            self._change(before.plan, planned, begin)
            plan = planned.plan
            if plan.skip_fill == "mean":
                images_BCHW, _ = self.data.train_batch(self.order.indices(begin)[0])
                engine.executor.means = engine.passes.measure_means(images_BCHW.to(self.device))
            engine.executor.update = engine.adam
            seen = self._steps(plan, begin, end)
            engine.executor.update = None
            self.ledger.training.add(self._over_workers(seen.measured))
            self.ledger.rehearsal.add(self._full.of_steps(end - begin))
            report = self._close(window, plan, plan.forecast.step_us, seen)

    def _steps(self, plan: Plan, begin: int, end: int) -> _Seen:
        compiled = self._compile(plan)
        tolls = [self._toll(plan, ops_LHM) for ops_LHM in plan.cycle]
        seen, on_cuda = _Seen(), self.device.type == "cuda"

        def needs(step: int) -> Needs | None:
            return _needs(compiled[(step - begin) % len(compiled)]) if step < end else None

        with Prefetcher(self.data, self.hardest or self.order, needs) as batches:
            for step in range(begin, end):
                which = (step - begin) % len(compiled)
                learning_rate = self.engine.adam.learning_rate
                timed = begin < step <= begin + TIMED_STEPS if on_cuda else None
                report = self.engine.executor.run(compiled[which], self._batch(batches, step), step=step, timed=timed)
                _check_finite(report, step)
                if self.hardest is not None:
                    self.hardest.learn(step, report.losses_MB, compiled[which].running)
                seen.add(report)
                self.ledger.planned(plan, *tolls[which])
                self._emit_metrics(report, step, learning_rate, plan, len(compiled[which].running), *tolls[which])
        return seen

    def _close(self, window: int, plan: Plan, forecast_us: int, seen: _Seen) -> Report:
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
        begin, end = self.spans[window] if window < len(self.spans) else (self.total_steps, self.total_steps)
        return {
            "profiles": {str(rank): of["profile"] for rank, of in enumerate(everyone)},
            **self.worth.report(self.order, begin, end),
            "progress": begin / self.total_steps,
            "steps_left": self.total_steps - begin,
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
        if _owners(plan) != _owners(before):
            moved = migrate(engine.shard, engine.adam, engine.transport, plan.placement)
            sent = all_sum(engine.transport, torch.tensor([sum(moved.sent_bytes)], device=self.device))
            migration = {"heads": moved.moved_heads, "bytes": int(sent), "seconds": moved.seconds}
            self.ledger.migrations.append(migration)
            self._all_full(1, begin=begin)
        if _look(plan) != _look(before):
            told = changed(before, planned, migration)
            what = f"{told['moved_heads']} heads move" if migration else "other operations, heads stay"
            why = f"{told['cause']}; {told['reason']}"
            self.emit("plan.changed", f"plan {plan.version}: {what}; {why}", **plan.to_dict(), change=told)

    def _all_full(self, steps: int, *, begin: int = 0, warm_up: int = 0) -> _Seen:
        """All-FULL steps without update: what the fractions under this placement are measured against."""
        engine = self.engine
        ops_LHM = uniform_ops(engine.costs.shape, engine.costs.step.num_micro_batches, Op.FULL)
        placement = engine.shard.placement
        programs = compile_step(placement, ops_LHM, engine.costs, embed_grad=self.spec.train_embed)
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
                plan.placement, ops_LHM, engine.costs, embed_grad=self.spec.train_embed, skip_fill=plan.skip_fill
            )
            compiled.append(StepPrograms(programs, engine.transport.rank, engine.costs, engine.shard.dtype))
        return compiled

    def _toll(self, plan: Plan, ops_LHM: OpTable) -> tuple[int, int]:
        """(FLOPs, bytes) of one step under an op table."""
        costs = self.engine.costs
        sent = step_bytes(plan.placement, ops_LHM, costs.shape, costs.step, self.spec.train_embed).sum()
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


def window_spans(total_steps: int, window: int, shares: list[float]) -> list[tuple[int, int]]:
    """(first step, end) of every window: `window` steps long, or shorter before a phase of the schedule ends."""
    # The first step at or behind a phase's end belongs to the next phase, as `PlanRequest.at` has it.
    ends = [math.ceil((sum(shares[: i + 1]) - 1e-9) * total_steps) for i in range(len(shares) - 1)]
    spans, begin = [], 0
    for border in (*ends, total_steps):
        while begin < border:
            spans.append((begin, min(begin + window, border)))
            begin = spans[-1][1]
    return spans


def changed(before: Plan, planned: Planned, migration: dict[str, Any] | None) -> dict[str, Any]:
    """What a new plan changes, for the event; the planner's own words where it has some."""
    told, plan = planned.change, planned.plan
    old, new = (
        {
            "version": p.version,
            "step_us": p.forecast.step_us,
            "heads": p.placement.heads_owned.tolist(),
            "full_heads": full_heads_of(p),
        }
        for p in (before, plan)
    )
    return {
        "migrated": migration is not None,
        "moved_heads": migration["heads"] if migration else 0,
        "migration": migration,
        "cause": told.get("cause") or "the planner does not say",
        "reason": told.get("reason") or "the planner does not say",
        # Of a move the planner has forecast the old placement under today's profiles: that is what the new one beats.
        "before": {**old, **(_known(told.get("before")) if migration else {})},
        "after": new,
    }


def full_heads_of(plan: Plan) -> list[float]:
    """FULL heads of each worker: the mean over micro-batches and the plan's cycle."""
    full_LH = np.mean([(ops_LHM == Op.FULL).mean(axis=2) for ops_LHM in plan.cycle], axis=0)
    counts = np.bincount(plan.placement.owner_LH.ravel(), full_LH.ravel(), plan.placement.num_workers)
    return counts.round(2).tolist()


def _known(figures: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (figures or {}).items() if value is not None}


def _owners(plan: Plan) -> tuple[Any, int]:
    return plan.placement.owner_LH.tolist(), plan.placement.classifier


def _look(plan: Plan) -> tuple[Any, ...]:
    """What makes a plan another one to its reader: who owns what, which heads train, how much; not which SKIPs fell."""
    trained_LH = np.any([(ops_LHM == Op.FULL).any(axis=2) for ops_LHM in plan.cycle], axis=0)
    fractions = round(plan.compute_fraction, 3), round(plan.bytes_fraction, 3)
    return _owners(plan), trained_LH.tolist(), [round(n, 1) for n in full_heads_of(plan)], fractions


def _needs(steps: StepPrograms) -> Needs:
    return Needs(frozenset(steps.own.image_micro_batches), frozenset(steps.own.label_micro_batches))


def _measured(report: StepReport) -> Measured:
    return Measured(1, report.flops, float(sum(report.sent_bytes)), report.wall_s, report.cpu_s, report.idle_share)


def _check_finite(report: StepReport, step: int) -> None:
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        raise SystemFault(
            f"Step {step + 1}: the loss is {report.loss} and the gradient norm {report.grad_norm}.",
            code="not_finite",
            param="optimiser.learning_rate",
            remedy="Lower the learning rate, or set optimiser.clip_norm.",
        )
