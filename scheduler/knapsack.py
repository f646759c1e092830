"""Knapsack: which heads stay FULL over a window, the static part of a selection.

    maximise   Σ worth of the FULL heads − price · messages of their backward passes
    subject to `total` FULL heads, each worker its share of them (by heads owned, rounded down or up)

Messages per micro-batch, over the workers P_l with FULL heads in block l: 4·(|P_l| − 1) for the gradient sums of both
sub-layers, and one for each worker that needs the gradient and does not hold it from above. Participation is a fixed
charge: a worker's first FULL head of a block pays it, the others are free. With price 0 the answer is the most worthy
heads of each worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from scheduler.domain import Placement

BoolArray = npt.NDArray[np.bool_]
SCALE = 10_000  # worths become integers of 1e-4 of a mean head's worth
EFFORT = 0.25  # deterministic seconds of CP-SAT: the answer does not depend on how busy the machine is
SUM_MESSAGES = 4  # gradient sums of one block per worker beyond the first: two sub-layers, there and back


@dataclass(frozen=True, eq=False)
class Held:
    """The FULL heads, and how good they are: worth less priced messages, with the solver's bound."""

    full_LH: BoolArray
    objective: float
    bound: float
    status: str
    seconds: float


def hold(worth_LH: npt.NDArray[np.float64], placement: Placement, total: int, price: float = 0.0) -> Held:
    """Choose `total` heads; `price` is what one message per micro-batch costs, in worths of a mean head."""
    model = _Knapsack(worth_LH, placement, total, round(price * SCALE))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # one thread: the same answer every time
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = EFFORT
    status = solver.solve(model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise ValueError(f"{total} heads cannot be chosen from {worth_LH.size}")
    full_LH = np.array([[solver.boolean_value(y) for y in row] for row in model.full], dtype=np.bool_)
    objective, bound = solver.objective_value / SCALE, solver.best_objective_bound / SCALE
    return Held(full_LH, objective, bound, solver.status_name(status), solver.wall_time)


def shares(placement: Placement, total: int) -> list[tuple[int, int]]:
    """Fewest and most FULL heads of each worker: its part of `total` by heads owned, rounded down and up."""
    owned_W = np.bincount(placement.owner_LH.ravel(), minlength=placement.num_workers)
    heads = placement.owner_LH.size
    return [(int(n) * total // heads, -(-int(n) * total // heads)) for n in owned_W]


class _Knapsack:
    def __init__(self, worth_LH: npt.NDArray[np.float64], placement: Placement, total: int, price: int) -> None:
        self.placement = placement
        self.model = cp_model.CpModel()
        blocks, heads = worth_LH.shape
        self.full = [[self.model.new_bool_var(f"full{b}_{h}") for h in range(heads)] for b in range(blocks)]
        flat = [y for row in self.full for y in row]
        self.model.add(sum(flat) == total)
        owners = placement.owner_LH.ravel()
        for worker, (least, most) in enumerate(shares(placement, total)):
            mine = [y for y, owner in zip(flat, owners, strict=True) if owner == worker]
            self.model.add_linear_constraint(sum(mine), least, most)
        worths = np.rint(worth_LH.ravel() * SCALE).astype(int).tolist()
        worth = sum(w * y for w, y in zip(worths, flat, strict=True))
        messages = self._messages() if price and placement.num_workers > 1 else 0
        self.model.maximize(worth - price * messages)

    def _messages(self) -> Any:
        """Walks down from the classifier; holds[w]: worker w has the gradient that leaves the block above."""
        holds: list[Any] = [int(w == self.placement.classifier) for w in range(self.placement.num_workers)]
        terms: list[Any] = []
        for block in reversed(range(len(self.full))):
            trains = self._trains(block)
            beyond = self.model.new_int_var(0, self.placement.num_workers, f"beyond{block}")
            self.model.add(beyond >= sum(trains) - 1)
            terms.append(SUM_MESSAGES * beyond)
            for worker, (here, above) in enumerate(zip(trains, holds, strict=True)):
                brought = self.model.new_bool_var(f"brought{block}_{worker}")
                self.model.add(brought >= here - above)
                terms.append(brought)
            holds = self._passed_on(block, trains, holds)
        return sum(terms)

    def _trains(self, block: int) -> list[cp_model.IntVar]:
        """For each worker, whether it has a FULL head in the block."""
        trains = [self.model.new_bool_var(f"trains{block}_{w}") for w in range(self.placement.num_workers)]
        for head, owner in enumerate(self.placement.owner_LH[block].tolist()):
            self.model.add_implication(self.full[block][head], trains[owner])
        return trains

    def _passed_on(self, block: int, trains: list[cp_model.IntVar], above: list[Any]) -> list[Any]:
        """Who has the gradient below the block: those who trained there or, if nobody did, those who had it before."""
        idle = self.model.new_bool_var(f"idle{block}")
        for full in self.full[block]:
            self.model.add_implication(full, idle.negated())
        holds = [self.model.new_bool_var(f"holds{block}_{w}") for w in range(self.placement.num_workers)]
        for here, trained, had in zip(holds, trains, above, strict=True):
            self.model.add(here <= trained + idle)
            self.model.add(here <= trained + had)
        return holds
