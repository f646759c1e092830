"""Budgets: the mix of FULL, FORWARD and SKIP worth most within fractions of all-FULL's compute and bytes.

A *mix* is (mean SKIPs per step, price of backward messages, togetherness of blocks). Given the SKIPs, the compute
budget says how many FULL runs are left, so compute is always used up; price and togetherness buy bytes with worth and
with chance. Mixes are tried in order of their worth if bytes were free, each drawn and measured by the exact judges
`step_flops` and `step_bytes`; the search ends when no mix left could be worth more than the best that fits.

Certificate: the LP over runs a[l, h] and FULL runs y[l, h] with a lower bound on bytes (P workers in a block exchange
at least 3·(P − 1) messages each way) bounds the worth of every selection, held or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from ortools.linear_solver import pywraplp

from scheduler.cost import TALLY_BYTES, Costs, trunk_bytes
from scheduler.domain import Op, OpTable, Placement, Scores, SolverReport, step_flops, uniform_ops
from scheduler.draws import PERIOD, Draw, held_cycle, redrawn_cycle
from scheduler.errors import InfeasibleError
from scheduler.knapsack import Held, hold
from scheduler.program import EMBED_UNIT
from scheduler.selection import FORWARD_WEIGHT, Selection, SelectionRequest, pick_swing, worth_fraction
from scheduler.traffic import Traffic
from scheduler.transfers import step_bytes

PRICES = (0.0, 0.1, 0.4, 2.0, 20.0)  # of one backward message per micro-batch, in mean heads' worth
TOGETHER = (0.5, 0.8, 1.0)
NEAR = 1.15  # times the bytes: when the first round came no nearer, there is no second one
GRID = 32  # steps between no SKIP and all but one
STRIDE = 4  # of the grid's mixes in a first round; a second one looks at those that could still be better


def select_budgets(request: SelectionRequest, placement: Placement, costs: Costs, scores: Scores) -> Selection:
    """The selection worth most whose mean step keeps within `compute` and `max_bytes`.

    Raises InfeasibleError (budgets_infeasible) with the nearest budgets that can be met.
    """
    began = time.monotonic()
    search = _Search(request, placement, costs, scores)
    mixes = sorted(search.mixes(), reverse=True)
    best = search.best_among(mixes[::STRIDE])
    if best is not None or search.least_bytes < NEAR * request.max_bytes or not search.tried:
        too_dear = search.refused if best is not None else float("inf")
        best = search.best_among([mix for i, mix in enumerate(mixes) if i % STRIDE and mix.ceiling < too_dear], best)
    if best is None:
        raise _bytes_error(search) if search.tried else _compute_error(search)
    worth, bound = best.report.objective, worth_bound(search)
    report = replace(best.report, bound=bound, gap=max(0.0, bound - worth) / bound, seconds=time.monotonic() - began)
    return Selection(best.cycle, report)


def _compute_error(search: _Search) -> InfeasibleError:
    least = next(percent for percent in range(1, 101) if _feeds(search, percent / 100)) / 100
    return InfeasibleError(
        f"No {search.request.strategy} selection runs on {search.request.compute:.2f} of the compute: the least where "
        f"every micro-batch trains a head on this placement is {least:.2f}.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy=f"Set compute to {least:.2f} or more.",
    )


def _feeds(search: _Search, compute: float) -> bool:
    """Whether some selection within this much compute starves no micro-batch."""
    wider = _Search(replace(search.request, compute=compute), search.placement, search.costs, search.scores)
    return any(wider.fed(mix, PRICES[0], TOGETHER[0]) is not None for mix in wider.mixes())


def _bytes_error(search: _Search) -> InfeasibleError:
    request, least = search.request, search.least_bytes
    return InfeasibleError(
        f"No {request.strategy} selection sends only {request.max_bytes:.2f} of the bytes: the least bytes fraction "
        f"found at compute {request.compute or 1.0:.2f} on this placement is {least:.2f}.",
        code="budgets_infeasible",
        param="method.budgets",
        remedy=f"Set bytes to {_up(least)} or more, lower compute, or choose another placement.",
    )


def _up(fraction: float) -> str:
    """Rounded up to what can be asked for."""
    return f"{min(1.0, np.ceil(fraction * 100) / 100):.2f}"


@dataclass(frozen=True, order=True)
class Mix:
    """One way to spend the budgets; sorts by worth if bytes were free."""

    ceiling: float
    skip: float
    fulls: float  # FULL runs of all heads per step, mean


@dataclass
class _Search:
    request: SelectionRequest
    placement: Placement
    costs: Costs
    scores: Scores
    all_full_flops: int = field(init=False)
    all_full_bytes: int = field(init=False)
    traffic: Traffic = field(init=False)
    least_bytes: float = field(default=float("inf"))
    refused: float = field(default=float("inf"))  # ceiling of the last mix that did not fit before the first that did
    tried: int = 0
    answers: dict[tuple[int, float], Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        full = uniform_ops(self.costs.shape, self.num_micro_batches, Op.FULL)
        self.all_full_flops = step_flops(self.costs.shape, self.costs.step, full)
        self.all_full_bytes = self._bytes(full)
        request = self.request
        self.traffic = Traffic(self.placement, self.costs.shape, self.costs.step, request.embed_grad)

    @property
    def num_micro_batches(self) -> int:
        return self.costs.step.num_micro_batches

    @property
    def forward_flops(self) -> np.ndarray:
        heads = range(self.costs.shape.num_heads)
        return np.array([self.costs.shape.head_forward_flops(h, self.costs.step.micro_batch_size) for h in heads])

    @property
    def head_flops(self) -> float:
        """What the compute budget leaves for the heads of a step, after the trunk."""
        trunk = self.num_micro_batches * self.costs.shape.trunk_flops(self.costs.step.micro_batch_size)
        return (self.request.compute or 1.0) * self.all_full_flops - trunk

    @property
    def fixed_bytes(self) -> int:
        """Bytes that every selection sends: tallies, and the embedding's gradient where several workers hold it."""
        workers, embedders = self.placement.num_workers, len(self.placement.embedders)
        tallies = workers * (workers - 1) * TALLY_BYTES
        embedding = 2 * (embedders - 1) * trunk_bytes(self.costs.shape, self.costs.step, [EMBED_UNIT])
        return tallies + embedding * self.request.embed_grad

    def mixes(self) -> Iterator[Mix]:
        """What the compute budget allows for every number of SKIPs, if each micro-batch can have a FULL run."""
        shape, forward = self.costs.shape, self.forward_flops
        heads = shape.num_blocks * shape.num_heads
        every = max(1, round(PERIOD * (self.num_micro_batches - 1) / GRID))
        for eighths in range(0, PERIOD * (self.num_micro_batches - 1) + 1, every):
            runs = self.num_micro_batches - eighths / PERIOD
            spare = self.head_flops - shape.num_blocks * float(forward.sum()) * runs
            fulls = min(spare / (2 * int(forward.max())), heads * runs)
            if fulls >= self.num_micro_batches:
                yield Mix(self._ceiling(runs, fulls), eighths / PERIOD, fulls)

    def _ceiling(self, runs: float, fulls: float) -> float:
        forward, backward = FORWARD_WEIGHT * self.scores.forward_LH, np.sort(self.scores.backward_LH.ravel())[::-1]
        trained = backward if self.request.strategy == "held" else np.full_like(backward, backward.mean())
        whole, rest = divmod(fulls / runs, 1)
        worth = runs * (forward.sum() + trained[: int(whole)].sum() + rest * (trained[int(whole) :][:1].sum()))
        return float(worth / self.num_micro_batches / (forward.sum() + backward.sum()))

    def best_among(self, mixes: Sequence[Mix], best: Selection | None = None) -> Selection | None:
        """The best selection of some mixes, if better than one known; they come in order of their ceilings."""
        for mix in mixes:
            if best is not None and mix.ceiling <= best.report.objective:
                break
            found = self.best_of(mix)
            if found is None and best is None:
                self.refused = mix.ceiling
            if found is not None and (best is None or found.report.objective > best.report.objective):
                best = found
        return best

    def best_of(self, mix: Mix) -> Selection | None:
        """The most worthy selection of a mix that fits the bytes; the leanest is tried first, to give up early."""
        prices = PRICES if self.request.strategy == "held" else PRICES[:1]
        together = TOGETHER if self.request.strategy != "scattered" else TOGETHER[:1]
        leanest = self.fed(mix, prices[-1], together[-1])
        if leanest is not None and not self.fits(leanest):
            return None
        for price in prices:
            for follow in together:
                cycle = self.fed(mix, price, follow)
                if cycle is not None and self.fits(cycle):
                    return Selection(cycle, self._report(cycle, mix, price, follow))
        return None

    def fed(self, mix: Mix, price: float, together: float) -> tuple[OpTable, ...] | None:
        """The cycle drawn, if every micro-batch has a FULL head."""
        try:
            return self.draw(mix, price, together)
        except InfeasibleError:
            return None

    def draw(self, mix: Mix, price: float, together: float) -> tuple[OpTable, ...]:
        draw = Draw(self.num_micro_batches, self.request.key, together)
        if self.request.strategy != "held":
            return redrawn_cycle(self.placement, self.request.strategy == "scattered", mix.fulls, mix.skip, draw)
        runs = self.num_micro_batches - mix.skip
        total = int(mix.fulls / runs + 1e-9)
        held = self.held(total, price)
        swing = pick_swing(self.scores.backward_LH, held.full_LH, self.placement, int(mix.fulls - total * runs + 1e-9))
        return held_cycle(self.placement, held.full_LH, swing, mix.skip, draw)

    def held(self, total: int, price: float) -> Held:
        """The knapsack's answer, kept: togetherness does not change it."""
        if (total, price) not in self.answers:
            self.answers[total, price] = hold(self.scores.backward_LH, self.placement, total, price)
        return self.answers[total, price]

    def fits(self, cycle: tuple[OpTable, ...]) -> bool:
        """Whether the mean step keeps within the bytes by the quick counter, and then by the exact one."""
        self.tried += 1
        limit = self.request.max_bytes * self.all_full_bytes
        spent = sum(map(self.traffic.step_bytes, cycle)) / len(cycle)
        self.least_bytes = min(self.least_bytes, spent / max(1, self.all_full_bytes))
        return spent <= limit and sum(map(self._bytes, cycle)) / len(cycle) <= limit

    def _bytes(self, ops_LHM: OpTable) -> int:
        link_bytes = step_bytes(self.placement, ops_LHM, self.costs.shape, self.costs.step, self.request.embed_grad)
        return int(link_bytes.sum())

    def _report(self, cycle: tuple[OpTable, ...], mix: Mix, price: float, together: float) -> SolverReport:
        worth = worth_fraction(cycle, self.scores)
        full = mix.fulls / self.placement.owner_LH.size
        note = f"{full:.2f} FULL and {mix.skip:g} SKIP of {self.num_micro_batches} micro-batches per head; "
        note += f"price {price:g}, together {together:g}; {self.tried} tried"
        return SolverReport(f"search {self.request.strategy}", "FEASIBLE", worth, 1.0, 1.0 - worth, 0.0, note)


def worth_bound(search: _Search) -> float:
    """Upper bound on `worth_fraction` of any selection within the budgets, by linear programming."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    micro_batches, owner_LH = search.num_micro_batches, search.placement.owner_LH
    blocks, heads = (range(n) for n in owner_LH.shape)
    runs = [[solver.NumVar(0, micro_batches, "") for _ in heads] for _ in blocks]
    trains = [[solver.NumVar(0, micro_batches, "") for _ in heads] for _ in blocks]
    flops = search.forward_flops.tolist()
    for b in blocks:
        for h in heads:
            solver.Add(trains[b][h] <= runs[b][h])
    solver.Add(sum(flops[h] * (runs[b][h] + 2 * trains[b][h]) for b in blocks for h in heads) <= search.head_flops)
    back = 3 if search.request.embed_grad else 2  # the lowest sub-layer need not send its gradient on
    sent = [times * _beyond(solver, search, units) for times, units in ((3, runs), (back, trains))]
    solver.Add(
        search.costs.residual_bytes * sum(sent) <= search.request.max_bytes * search.all_full_bytes - search.fixed_bytes
    )
    forward, backward = (FORWARD_WEIGHT * search.scores.forward_LH).tolist(), search.scores.backward_LH.tolist()
    worth = sum(forward[b][h] * runs[b][h] + backward[b][h] * trains[b][h] for b in blocks for h in heads)
    solver.Maximize(worth)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return 1.0
    total = sum(map(sum, forward)) + sum(map(sum, backward))
    return float(solver.Objective().Value() / micro_batches / total)


def _beyond(
    solver: pywraplp.Solver, search: _Search, units: Sequence[Sequence[pywraplp.Variable]]
) -> pywraplp.LinearExpr | pywraplp.Variable:
    """Σ over blocks of participations beyond the first of each micro-batch, from below."""
    micro_batches, terms = search.num_micro_batches, []
    for block, row in enumerate(units):
        joins = []
        for worker in search.placement.holders(block):
            join = solver.NumVar(0, micro_batches, "")
            for head in search.placement.heads_of(worker, block):
                solver.Add(join >= row[head])
            joins.append(join)
        beyond = solver.NumVar(0, solver.infinity(), "")
        solver.Add(beyond >= sum(joins) - micro_batches)
        terms.append(beyond)
    return sum(terms)
