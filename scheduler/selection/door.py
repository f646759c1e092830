"""The door: one request, one placement, one selection."""

from __future__ import annotations

from scheduler.cost import Costs
from scheduler.domain import BoolArray, ModelShape, Placement, Scores, StaticPart
from scheduler.errors import UserError
from scheduler.selection.budgets import likely_mix, select_budgets
from scheduler.selection.frozen import above, scores_above, select_above, static_above
from scheduler.selection.hardest import select_hardest
from scheduler.selection.ratios import select_ratios
from scheduler.selection.strategies import strategy_of
from scheduler.selection.words import Selection, SelectionRequest, all_full


def select(
    request: SelectionRequest,
    placement: Placement,
    costs: Costs,
    scores: Scores,
    *,
    full_LH: BoolArray | None = None,
) -> Selection:
    """The ops of one window on a placement; the same for the same request, placement, costs and scores.

    `full_LH` are the FULL heads that the placement was made for: they are taken where they fit what is asked and the
    present costs. Raises UserError for what cannot be asked together, InfeasibleError for amounts that cannot be met.
    """
    request.check()
    if request.is_all_full:
        if request.ratios is not None:
            request.checked_ratios(costs.step.num_micro_batches)
        return all_full(costs.shape, costs.step.num_micro_batches)
    if request.strategy == "hardest":
        return select_hardest(request, placement, costs)
    _check_heads_train(request, costs.shape)
    if costs.shape.num_frozen:
        return select_above(_of_heads, request, placement, costs, scores, full_LH)
    return _of_heads(request, placement, costs, scores, full_LH)


def static_part(request: SelectionRequest, costs: Costs, scores: Scores) -> StaticPart | None:
    """What placement should know of the heads to be held still; None where none are, or all are FULL."""
    request.check()
    if frozen := costs.shape.num_frozen:
        whole = frozen == costs.shape.num_blocks
        part = None if whole else static_part(request, above(costs), scores_above(scores, frozen))
        return static_above(part, costs)
    if request.hold != "training" or request.is_all_full or request.strategy in ("hardest", "uniform"):
        return None
    heads, micro_batches = costs.shape.num_blocks * costs.shape.num_heads, costs.step.num_micro_batches
    if request.ratios is not None:
        full, forward, _ = request.checked_ratios(micro_batches)
        if full == 0:
            return None
        num_full, run_share = heads * full // (full + forward), (full + forward) / micro_batches
    else:
        num_full, run_share = likely_mix(request, costs)
    if not 0 < num_full < heads:
        return None
    return StaticPart(strategy_of(request).sees(request, scores).backward_LH, num_full, run_share)


def _of_heads(
    request: SelectionRequest, placement: Placement, costs: Costs, scores: Scores, full_LH: BoolArray | None
) -> Selection:
    if request.ratios is not None:
        return select_ratios(request, placement, costs, scores, full_LH)
    return select_budgets(request, placement, costs, scores, full_LH)


def _check_heads_train(request: SelectionRequest, shape: ModelShape) -> None:
    if shape.num_frozen == shape.num_blocks:
        raise UserError(
            f"Strategy '{request.strategy}' chooses heads, and all of them are frozen.",
            code="no_heads_train",
            param="method.strategy",
            remedy="Leave strategy and the words about heads away: whole micro-batches are left out then.",
        )
