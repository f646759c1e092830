"""Values and models come together the same for everybody."""

from __future__ import annotations

import numpy as np
import torch

from scheduler.domain import Placement
from tests.workers.engine import on_threads, tiny_vit
from workers.gather import gather_json, gather_state
from workers.shard import Shard


def test_values_of_any_length_arrive_in_rank_order():
    values = [[], ["a"], {"ü": [1.5, None]}, "x" * 3000]
    for found in on_threads(4, lambda rank, transport: gather_json(transport, values[rank])):
        assert found == values


def test_a_model_in_shards_comes_together_at_rank_0_bit_for_bit():
    model = tiny_vit(init_values=0.2)
    template = {name: t.to("meta") for name, t in model.state_dict().items()}
    placement = Placement.make(np.random.default_rng(3).integers(0, 3, (3, 4)), 3)
    states = on_threads(3, lambda rank, t: gather_state(Shard(model, placement, rank), t, template))
    assert states[1:] == [None, None]
    for name, expected in model.state_dict().items():
        assert torch.equal(states[0][name], expected), name
