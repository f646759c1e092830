"""Whole micro-batches: every head alike, FULL ones first, as many as the budgets allow and no fewer."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.check import check
from scheduler.domain import Op
from scheduler.errors import InfeasibleError, UserError
from scheduler.plan import make_plan
from scheduler.request import PlanRequest
from scheduler.selection import PERIOD, SelectionRequest, select, static_part
from tests.scheduler.test_budgets import spent
from tests.scheduler.test_selection import costs_of, random_scores, split, whole

PLACEMENTS = st.sampled_from([split, whole])


def hardest(placement, costs, **words):
    request = SelectionRequest(strategy="hardest", **words)
    return select(request, placement, costs, random_scores(*placement.owner_LH.shape))


def fulls_of(cycle):
    """FULL micro-batches of each table, having checked that all heads do the same and that the FULL ones come first."""
    for ops_LHM in cycle:
        assert (ops_LHM == ops_LHM[0, 0]).all()
        assert (np.diff(ops_LHM[0, 0].astype(int)) <= 0).all() and Op.FULL > Op.FORWARD > Op.SKIP
    return [int((ops_LHM[0, 0] == Op.FULL).sum()) for ops_LHM in cycle]


@settings(max_examples=60, deadline=None)
@given(kind=PLACEMENTS, workers=st.integers(1, 3), counts=st.tuples(st.integers(1, 4), *[st.integers(0, 3)] * 2))
def test_ratios_are_counts_of_whole_micro_batches(kind, workers, counts):
    costs = costs_of(3, 4, workers, micro_batches=sum(counts))
    found = hardest(kind(3, 4, workers), costs, ratios=counts)
    assert fulls_of(found.cycle) == [counts[0]]
    assert (found.cycle[0][0, 0] == Op.SKIP).sum() == counts[2]


@example(split, 2, 2, 1.0, 1 - 1e-16, False)
@settings(max_examples=80, deadline=None)
@given(
    kind=PLACEMENTS,
    workers=st.integers(1, 3),
    micro_batches=st.integers(1, 7),
    compute=st.floats(0.05, 1.0),
    max_bytes=st.floats(0.05, 1.0),
    embed_grad=st.booleans(),
)
def test_budgets_are_kept_and_used_up(kind, workers, micro_batches, compute, max_bytes, embed_grad):
    costs, placement = costs_of(3, 4, workers, micro_batches=micro_batches), kind(3, 4, workers)

    def within(fulls, slack=-1e-9):
        tables = [_table(full, micro_batches) for full in fulls]
        flops, sent = spent(costs, placement, tuple(tables), embed_grad)
        return flops <= compute + slack and sent <= max_bytes + slack

    try:
        found = hardest(placement, costs, compute=compute, max_bytes=max_bytes, embed_grad=embed_grad)
    except InfeasibleError as error:
        assert not within([1])
        name, least = re.search(r"all-FULL's (\w+)|$", error.message)[1], re.search(r" ([\d.]+) of all", error.message)
        assert error.param == "method.budgets" and name in ("compute", "bytes")
        assert {"compute": compute, "bytes": max_bytes}[name] <= float(least[1]) + 1e-9
        return
    fulls = fulls_of(found.cycle)
    assert within(fulls, 1e-9) and max(fulls) - min(fulls) <= 1
    trained = sum(fulls) * PERIOD // len(fulls)
    if trained < PERIOD * micro_batches:
        one_more = [(step + 1) * (trained + 1) // PERIOD - step * (trained + 1) // PERIOD for step in range(PERIOD)]
        assert not within(one_more)


def _table(full, micro_batches):
    ops_M = np.array([Op.FULL] * full + [Op.SKIP] * (micro_batches - full), dtype=np.int8)
    return np.tile(ops_M, (3, 4, 1))


def test_half_a_micro_batch_is_one_in_every_other_step():
    costs = costs_of(3, 4, 2, micro_batches=5)
    assert sorted(set(fulls_of(hardest(split(3, 4, 2), costs, compute=0.5).cycle))) == [2, 3]


@pytest.mark.parametrize(
    ("words", "param"),
    [({"ratios": (0, 5, 0)}, "method.ratios"), ({"ratios": (3, 0, 3)}, "method.ratios"), ({"compute": 0.1}, None)],
)
def test_what_cannot_be_is_refused(words, param):
    with pytest.raises(UserError) as caught:
        hardest(split(3, 4, 2), costs_of(3, 4, 2, micro_batches=5), **words)
    assert caught.value.param == (param or "method.budgets")


@pytest.mark.parametrize("words", [{"ratios": (2, 1, 2)}, {"compute": 0.6, "max_bytes": 0.5}])
def test_a_plan_of_it_passes_the_judge(words):
    costs, request = costs_of(3, 4, 2, micro_batches=5), PlanRequest(strategy="hardest", **words)
    plan = make_plan(request, costs, random_scores(3, 4))
    assert check(plan, costs, request) == []
    assert static_part(request.selection(0), costs, random_scores(3, 4)) is None
