"""The quick byte counter says what the compiler's own pass says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.domain import Placement, StepShape
from scheduler.selection.traffic import Traffic
from scheduler.transfers import step_bytes
from tests.scheduler.fleet import vit_shape


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.integers(1, 5),
    heads=st.integers(1, 4),
    workers=st.integers(1, 4),
    coherent=st.booleans(),
    wire=st.sampled_from([2, 4]),
    embed_grad=st.booleans(),
    seed=st.integers(0, 100_000),
)
def test_it_equals_the_exact_bytes(
    blocks: int, heads: int, workers: int, coherent: bool, wire: int, embed_grad: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    owners = rng.integers(0, workers, (blocks, heads))
    placement = Placement(owners, workers, int(rng.choice(owners[-1])))
    ops = rng.integers(0, 3, (blocks, heads, 4)).astype(np.int8)
    if coherent:
        by_group = rng.integers(0, 3, (blocks, workers, 4))
        ops = np.take_along_axis(by_group, owners[:, :, None], axis=1).astype(np.int8)
    shape, step = vit_shape(blocks, heads, 8 * heads), StepShape(4, 8, wire)
    quick = Traffic(placement, shape, step, embed_grad).step_bytes(ops)
    assert quick == step_bytes(placement, ops, shape, step, embed_grad).sum()
