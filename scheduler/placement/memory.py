"""Memory: what a placement needs of each worker, and the error when no placement fits.

A worker's need is affine in its heads (a fixed part per block, and so much per head), and any totals of heads by worker
can be dealt out over the blocks. So the least memory to add is found exactly over totals by run, without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, IntArray, Placement
from scheduler.errors import InfeasibleError
from scheduler.placement.instance import Chain, Instance, Row
from scheduler.placement.model import CEILING, Limits, solver_of

GB = 1e9


def counts_of(placement: Placement) -> IntArray:
    """Head counts [L, W] of a placement."""
    rows = [np.bincount(row, minlength=placement.num_workers) for row in placement.owner_LH]
    return np.array(rows, dtype=np.int64)


def rows_of(placement: Placement, full_LH: npt.NDArray[np.bool_] | None = None) -> list[Row]:
    """FULL and FORWARD heads of every block by worker; without `full_LH` all are FULL."""
    workers, out = placement.num_workers, []
    for block, owners in enumerate(placement.owner_LH):
        full = np.ones(len(owners), dtype=bool) if full_LH is None else full_LH[block]
        counts = (np.bincount(owners[full], minlength=workers), np.bincount(owners[~full], minlength=workers))
        out.append(Row(tuple(map(int, counts[0])), tuple(map(int, counts[1]))))
    return out


def memory_bytes_of(
    placement: Placement, costs: Costs, static_full_LH: npt.NDArray[np.bool_] | None = None
) -> list[int]:
    """Bytes that each worker needs; heads that are never FULL in the window need their weights alone."""
    return Instance(costs).memory_bytes(rows_of(placement, static_full_LH), placement.classifier)


@dataclass(frozen=True)
class Shortage:
    """The least memory that would have to be added for a chain, by worker, with what each then needs."""

    chain: Chain
    lacks_W: tuple[int, ...]
    needs_W: tuple[int, ...]
    proved: bool

    @property
    def total(self) -> int:
        return sum(self.lacks_W)


def shortage_of(instance: Instance, chain: Chain, limits: Limits, below: int | None = None) -> Shortage | None:
    """The least lacking bytes of one chain; None if not less than `below`."""
    model = _Slack(instance, chain)
    if below is not None:
        model.model.add(sum(model.lacks.values()) < below)
    solver = solver_of(limits, 0.3)
    solver.parameters.relative_gap_limit = 0.0
    status = solver.solve(model.model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    workers = range(instance.num_workers)
    lacks = tuple(solver.value(model.lacks[w]) if w in model.lacks else 0 for w in workers)
    needs = tuple(solver.value(model.needs[w]) if w in model.needs else 0 for w in workers)
    return Shortage(chain, lacks, needs, status == cp_model.OPTIMAL)


def memory_error(instance: Instance, kinds: Sequence[str], chains: Sequence[Chain], limits: Limits) -> InfeasibleError:
    """Says who lacks how much in the placement that lacks least over the chains given."""
    best: Shortage | None = None
    for chain in chains:
        best = shortage_of(instance, chain, limits, best.total if best else None) or best
    if best is None or best.total == 0:
        return InfeasibleError(
            f"No {' or '.join(kinds)} placement exists for this fleet.", code="placement_infeasible", param="placement"
        )
    parts, profiles = [], instance.costs.profiles
    for w in sorted(range(instance.num_workers), key=lambda w: -best.lacks_W[w]):  # type: ignore[union-attr]
        if best.lacks_W[w]:
            lack, need, free = (n / GB for n in (best.lacks_W[w], best.needs_W[w], profiles[w].free_bytes))
            beside = f"{_bound(profiles[w])}; {profiles[w].device}"
            parts.append(f"worker {w} needs {lack:.3g} GB more ({need:.3g} needed, {free:.3g} free{beside})")
    limited = any(best.lacks_W[w] and profile.limit_bytes for w, profile in enumerate(profiles))
    least = "the least that would do" if best.proved else "which would do"
    return InfeasibleError(
        f"The model does not fit: in the {' or '.join(kinds)} placement that lacks least, {', '.join(parts)}: "
        f"{best.total / GB:.3g} GB in all, {least}. Counted are weights, gradients and AdamW's moments of heads that "
        f"train, weights of the others, and the activations of {instance.in_flight} micro-batches in flight.",
        code="memory_infeasible",
        param="worker_memory_bytes" if limited else "workers",
        remedy=f"Add workers, {'raise worker_memory_bytes' if limited else 'free memory'}, make micro-batches smaller, "
        "or train fewer heads.",
    )


def _bound(profile: DeviceProfile) -> str:
    """What the free memory lies beside, where it is known."""
    base = f" beside the {profile.base_bytes / GB:.3g} of its process" if profile.base_bytes else ""
    return base + (f", of {profile.limit_bytes / GB:.3g} allowed" if profile.limit_bytes else "")


class _Slack:
    """Totals by run and worker: heads[r, w] of which full[r, w] FULL, in trains[r, w] blocks."""

    def __init__(self, instance: Instance, chain: Chain) -> None:
        self.instance, self.chain, self.model = instance, chain, cp_model.CpModel()
        blocks, heads = instance.num_blocks, instance.num_heads
        lengths = [self.model.new_int_var(1, blocks, f"blocks{r}") for r in range(len(chain))]
        self.model.add(sum(lengths) == blocks)
        self.needs: dict[int, Any] = {}
        self.lacks: dict[int, Any] = {}
        classifies = {w: self.model.new_bool_var(f"classifies{w}") for w in chain[-1]}
        self.model.add_exactly_one(classifies.values())
        all_full: list[Any] = []
        for length, team in zip(lengths, chain, strict=True):
            totals = []
            for w in team:
                total, full, trains = (self.model.new_int_var(0, blocks * heads, "") for _ in range(3))
                self.model.add(total >= length)
                self.model.add(total <= (heads - len(team) + 1) * length)
                self.model.add(full <= total)
                self.model.add(trains <= length)
                self.model.add(full <= heads * trains)
                if instance.static is None:
                    self.model.add(full == total)
                    self.model.add(trains == length)
                totals.append(total)
                all_full.append(full)
                self._worker(w, length, total - full, full, trains)
            self.model.add(sum(totals) == heads * length)
        self.model.add(sum(all_full) == instance.num_full)
        for w in self.needs:
            self.needs[w] += instance.fixed_bytes(w in chain[0])
            self.needs[w] += instance.trunk_bytes(False, True) * classifies.get(w, 0)
            self.lacks[w] = self.model.new_int_var(0, CEILING, f"lacks{w}")
            self.model.add(self.needs[w] <= instance.costs.profiles[w].free_bytes + self.lacks[w])
        self.model.minimize(sum(self.lacks.values()))

    def _worker(self, worker: int, length: Any, only: Any, full: Any, trains: Any) -> None:
        size_AO = self.instance.bytes_AO.tolist()
        first_full, first_only = size_AO[1][0], size_AO[0][1]
        per_full = size_AO[2][0] - first_full if len(size_AO) > 2 else first_full
        per_only = size_AO[0][2] - first_only if len(size_AO) > 2 else first_only
        need = (first_full - per_full) * trains + per_full * full
        need += (first_only - per_only) * (length - trains) + per_only * only
        self.needs[worker] = self.needs.get(worker, 0) + need
