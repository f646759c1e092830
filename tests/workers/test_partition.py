"""Cutting and joining is exact, and counts what it cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scheduler.domain import Placement
from tests.workers.engine import tiny_vit
from tests.workers.test_engine import BUILDS
from workers.partition import cut_of, head_slices, model_shape, write_head
from workers.shard import Shard, join


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_heads_cut_and_joined_are_the_same_bits(name):
    model = tiny_vit(**BUILDS[name])
    cut, state = cut_of(model), model.state_dict()
    shape = cut.shape
    blank = {key: torch.full_like(value, torch.nan) if ".norm" not in key else value for key, value in state.items()}
    for block in range(shape.num_blocks):
        for head in range(shape.num_heads):
            slices = head_slices(state, block, head, cut)
            assert sum(t.numel() for t in slices.values()) == shape.head_params[head]
            write_head(blank, block, head, slices, cut)
    for key in state:
        if any(part in key for part in ("qkv", "proj.weight", "fc1", "fc2.weight")) and "blocks" in key:
            assert torch.equal(blank[key], state[key]), key


@pytest.mark.parametrize("name", sorted(BUILDS))
def test_counts_add_up_to_the_model(name):
    model = tiny_vit(**BUILDS[name])
    shape = model_shape(model)
    blocks = shape.num_blocks * (sum(shape.head_params) + shape.norm_params)
    assert blocks + shape.embed_params + shape.classifier_params == sum(p.numel() for p in model.parameters())
    assert model.forward_features(torch.zeros(1, model.in_chans, 12, 12).double()).shape[1] == shape.num_tokens


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_speak_for_every_parameter_once(num_workers):
    model = tiny_vit(init_values=0.1)
    owners = np.random.default_rng(num_workers).integers(0, num_workers, (3, 4))
    placement = Placement.make(owners, num_workers)
    shards = [Shard(model, placement, rank) for rank in range(num_workers)]
    state = {key: torch.full_like(value, torch.nan) for key, value in model.state_dict().items()}
    seen = [name for shard in shards for name in shard.spoken_for()]
    assert len(seen) == len(set(seen))
    for shard in shards:
        join(shard.spoken_for(), state, shard.cut)
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_neighbouring_heads_are_a_view_and_others_a_copy():
    shard = Shard(tiny_vit(), Placement.make(np.zeros((3, 4), dtype=int), 1), 0)
    block = shard.blocks[0]
    bank = block.bank["qkv_w"].untyped_storage().data_ptr()
    assert block.frozen("attn", (1, 2))["qkv_w"].untyped_storage().data_ptr() == bank
    assert block.frozen("attn", (0, 2))["qkv_w"].untyped_storage().data_ptr() != bank
    rows = torch.cat([block.params[0]["qkv_w"], block.params[2]["qkv_w"]])
    assert torch.equal(block.frozen("attn", (0, 2))["qkv_w"], rows)


def test_gathered_weights_live_until_one_of_their_heads_is_updated():
    shard = Shard(tiny_vit(), Placement.make(np.zeros((3, 4), dtype=int), 1), 0)
    block = shard.blocks[0]
    kept, dropped = block.frozen("attn", (0, 2)), block.frozen("attn", (1, 3))
    trained = block.trainable("attn", (1, 2))
    trained["qkv_w"].grad = torch.ones_like(trained["qkv_w"])
    block.collect()
    shard.clear()
    assert block.frozen("attn", (1, 3)) is not dropped
    assert block.frozen("attn", (0, 2)) is not kept, "head 2 was trained too"
    kept = block.frozen("mlp", (0, 3))
    trained = block.trainable("mlp", (1, 2))
    trained["fc1_w"].grad = torch.ones_like(trained["fc1_w"])
    block.collect()
    shard.clear()
    assert block.frozen("mlp", (0, 3)) is kept
