"""One placement for all points of a sweep, so that they differ by what their settings say.

Blocks that lie whole on workers send a few percent of what split blocks send, whatever is selected: where the planner
placed full fine-tuning one way and a trial the other, their bytes would compare placements. So where the job leaves its
placement to the planner ("auto") and the space does not search it, jobs of a sweep get

    split     all of them, if any setting asks for a share of the bytes by choosing heads: whole blocks cannot save them
    unmixed   those that begin before any has ended: split or whole, as the planner finds them faster
    split or whole, as the first that has ended was placed, all others

With baselines the first is full fine-tuning, so all follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workers.contract import JobSpec
from workers.sweeps.children import FAILED, Child
from workers.sweeps.contract import SweepSpec

SETTLED = ("split", "whole")
# Refusals of the planner that another placement might not have met with.
REFUSALS = frozenset({"placement_infeasible", "memory_infeasible", "budgets_infeasible"})


def placement_of(spec: SweepSpec, children: Sequence[Child]) -> str | None:
    """What a job that begins now gets as its placement, by the `children` so far, oldest first; None: what it says."""
    if "placement" in spec.space or spec.job.placement != "auto":
        return None
    if any(_saves_bytes_by_heads(job) for job in spec.tried()):
        return "split"
    placed = (str((child.figures or {}).get("placement")).rpartition(" ")[2] for child in children)
    return next((kind for kind in placed if kind in SETTLED), "unmixed")


def placed(job: JobSpec, placement: str | None) -> JobSpec:
    """The job with the placement of its sweep."""
    return job if placement is None else job.model_copy(update={"placement": placement})


def told(child: Child, placement: str | None) -> Child:
    """The child, and if the planner has refused it, that its sweep has chosen the placement."""
    error = child.error or {}
    if child.status != FAILED or placement not in SETTLED or error.get("code") not in REFUSALS:
        return child
    why = f"All points of this sweep are placed {placement}; set job.placement, or search placement, for another one."
    return replace(child, error={**error, "message": f"{error.get('message', '')} {why}".strip()})


def _saves_bytes_by_heads(job: JobSpec) -> bool:
    budgets = (job.method.budgets, *(phase.budgets for phase in job.method.schedule))
    return job.method.words["strategy"] != "hardest" and any(each is not None and each.bytes < 1 for each in budgets)
