"""What one worker holds: its heads of each block, the trunk beside them, and the arithmetic of a sub-layer.

Shapes: B images, N tokens, D width, K head width, k heads run together, F their MLP rows.

The slices of a worker's heads in a block lie in one tensor each (a bank), in head order. Heads that are neighbours
there are a view, others are gathered once and kept until an update changes one of them; either way one call runs all of
them in one matrix product. `Parameter`s of single heads are views of the bank, so that the optimiser skips a head
without gradient.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scheduler.domain import SUBLAYERS, ModelShape, Placement
from scheduler.program import EMBED_UNIT
from workers.gates import Watch
from workers.partition import ATTN_SLICES, MLP_SLICES, SLICES, head_slices, model_shape, slice_rows, write_head

_HEAD_NAME = re.compile(r"b(\d+)\.h(\d+)\.(\w+)")

Weights = tuple[Any, ...]  # tensors, None for a bias that the model lacks: qkv_w, qkv_b, proj_w or fc1_w, fc1_b, fc2_w


class BlockTrunk:
    """What every holder of a block has of it: norms, layer scales γ, output biases, and the activation function."""

    def __init__(self, block: Any, index: int) -> None:
        self.index = index
        self.norms = {"attn": block.norm1, "mlp": block.norm2}
        gammas = (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None))
        self.gammas: dict[str, nn.Parameter | None] = dict(zip(SUBLAYERS, gammas, strict=True))
        self.biases: dict[str, nn.Parameter | None] = {"attn": block.attn.proj.bias, "mlp": block.mlp.fc2.bias}
        self.act = block.mlp.act

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the timm state dict, in a fixed order."""
        names = (("norm1", "ls1.gamma", "attn.proj.bias", "attn"), ("norm2", "ls2.gamma", "mlp.fc2.bias", "mlp"))
        for norm, gamma, bias, part in names:
            yield from ((f"blocks.{self.index}.{norm}.{n}", p) for n, p in self.norms[part].named_parameters())
            for name, param in ((gamma, self.gammas[part]), (bias, self.biases[part])):
                if param is not None:
                    yield f"blocks.{self.index}.{name}", param


class BlockShard:
    """The heads of one block that a worker owns, with the block's trunk. `slices[i]` are those of `heads[i]`."""

    def __init__(
        self, trunk: BlockTrunk, heads: tuple[int, ...], slices: Sequence[Mapping[str, Tensor]], shape: ModelShape
    ) -> None:
        self.trunk, self.index, self.heads, self.shape = trunk, trunk.index, heads, shape
        self.norms, self.gammas, self.biases, self.act = trunk.norms, trunk.gammas, trunk.biases, trunk.act
        self._position = {head: i for i, head in enumerate(heads)}
        self.bank = {name: torch.cat([s[name] for s in slices]) for name in SLICES if name in slices[0]}
        self._bounds = {name: _cumulative(slice_rows(name, heads, shape)) for name in SLICES}
        self.params: dict[int, dict[str, nn.Parameter]] = {head: self._head_params(i) for i, head in enumerate(heads)}
        self._leaves: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._frozen: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._changing: set[int] = set()  # heads that this step's update changes

    def attend(self, y_BND: Tensor, weights: Weights, bias: Tensor | None = None, watch: Watch | None = None) -> Tensor:
        """Σ over the heads in `weights` of their attention output, plus `bias`: B, N, D.

        `watch` is shown the heads' outputs side by side, before the projection: B, N, k·K.
        """
        qkv_w, qkv_b, proj_w = weights
        batch, tokens, _ = y_BND.shape
        qkv = F.linear(y_BND, qkv_w, qkv_b).view(batch, tokens, -1, 3, self.shape.head_dim)
        q_BkNK, k_BkNK, v_BkNK = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        out_BkNK = F.scaled_dot_product_attention(q_BkNK, k_BkNK, v_BkNK)
        out_BNF = out_BkNK.transpose(1, 2).reshape(batch, tokens, -1)
        if watch is not None:
            watch(out_BNF)
        return F.linear(out_BNF, proj_w.T, bias)

    def perceive(
        self, y_BND: Tensor, weights: Weights, bias: Tensor | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Σ over the heads in `weights` of their MLP slice's output, plus `bias`: B, N, D.

        `watch` is shown the slices' hidden units side by side: B, N, F.
        """
        fc1_w, fc1_b, fc2_w = weights
        hidden_BNF = self.act(F.linear(y_BND, fc1_w, fc1_b))
        if watch is not None:
            watch(hidden_BNF)
        return F.linear(hidden_BNF, fc2_w.T, bias)

    def run(
        self, part: str, y_BND: Tensor, weights: Weights, bias: Tensor | None = None, watch: Watch | None = None
    ) -> Tensor:
        return (self.attend if part == "attn" else self.perceive)(y_BND, weights, bias, watch)

    def trainable(self, part: str, heads: tuple[int, ...]) -> Weights:
        """Weights of the heads as leaves that collect gradients until `collect`."""
        key = (part, heads)
        if key not in self._leaves:
            self._leaves[key] = tuple(None if w is None else w.detach().requires_grad_() for w in self._gather(key))
        return self._leaves[key]

    def frozen(self, part: str, heads: tuple[int, ...]) -> Weights:
        """Weights of the heads without gradient."""
        key = (part, heads)
        if key not in self._frozen:
            self._frozen[key] = self._gather(key)
        return self._frozen[key]

    def collect(self) -> None:
        """Move the gradients of this step from the leaves to the heads' own parameters."""
        for (part, heads), leaves in self._leaves.items():
            for name, leaf in zip(_names(part), leaves, strict=True):
                if leaf is not None and leaf.grad is not None:
                    self._changing.update(heads)
                    rows = slice_rows(name, heads, self.shape)
                    for head, grad in zip(heads, leaf.grad.split(rows), strict=True):
                        param = self.params[head][name]
                        param.grad = grad if param.grad is None else param.grad + grad
        self._leaves.clear()

    def forget(self) -> None:
        """Drop uncollected gradients and gathered weights that have changed; those of heads held FORWARD stay."""
        self._leaves.clear()
        self._frozen = {key: w for key, w in self._frozen.items() if self._changing.isdisjoint(key[1])}
        self._changing.clear()

    def head_parameters(self, head: int) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((f"b{self.index:02d}.h{head}.{name}", param) for name, param in self.params[head].items())

    def _gather(self, key: tuple[str, tuple[int, ...]]) -> Weights:
        part, heads = key
        at = [self._position[head] for head in heads]
        return tuple(self._rows(name, at) if name in self.bank else None for name in _names(part))

    def _rows(self, name: str, at: list[int]) -> Tensor:
        bank, bounds = self.bank[name], self._bounds[name]
        if at == list(range(at[0], at[-1] + 1)):
            return bank[bounds[at[0]] : bounds[at[-1] + 1]]
        return torch.cat([bank[bounds[i] : bounds[i + 1]] for i in at])

    def _head_params(self, i: int) -> dict[str, nn.Parameter]:
        return {n: nn.Parameter(bank[self._bounds[n][i] : self._bounds[n][i + 1]]) for n, bank in self.bank.items()}


class Shard:
    """One worker's part of a model under a placement.

    The embedding is held by the owners of block 0's heads, the classifier (final norm, pooling, head) by one worker.
    What a worker does not hold is on the meta device: its shape is known, it has no memory.
    """

    def __init__(
        self, model: VisionTransformer, placement: Placement, rank: int, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.placement, self.rank = model_shape(model), placement, rank
        self.device = torch.device(device)
        self.dtype = next(model.parameters()).dtype
        self.no_decay: frozenset[str] = frozenset(model.no_weight_decay())
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._skeletons = [copy.deepcopy(block).to("meta") for block in model.blocks]
        self._ends: Any = copy.deepcopy(model, {id(model.blocks): nn.Sequential()}).to(self.device)
        self.blocks = {
            index: self._cut(state, index, heads)
            for index in range(self.shape.num_blocks)
            if (heads := placement.heads_of(rank, index))
        }
        self._hold_ends(placement)

    def rebuild(self, placement: Placement, arrived: Mapping[str, Tensor]) -> None:
        """Change to another placement; `arrived` has what was not here yet, named as `named_parameters` does.

        Parameters of what stays are kept as they are, but a head's where others of its block come or go.
        """
        blocks, self.blocks = self.blocks, {}
        for index in range(self.shape.num_blocks):
            heads, block = placement.heads_of(self.rank, index), blocks.pop(index, None)
            if heads:
                self.blocks[index] = self._rebuilt(index, heads, block, arrived)
        self._hold_ends(placement, arrived)
        self.placement = placement

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Images to the residual stream: B, N, D."""
        model = self._ends
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_BCHW))))

    def classify(self, x_BND: Tensor) -> Tensor:
        """The residual stream after the last block to logits."""
        return self._ends.forward_head(self._ends.norm(x_BND))

    def unit(self, unit: int) -> list[tuple[str, nn.Parameter]]:
        """The trunk parameters of a unit: -1 the embedding, l ≥ 0 the norms, scales and biases of block l."""
        if unit != EMBED_UNIT:
            return list(self.blocks[unit].trunk.parameters())
        return [(n, p) for n, p in self._ends.named_parameters() if not _is_classifier(n)]

    def units(self) -> list[int]:
        return [*([EMBED_UNIT] if self.holds_embedding else []), *self.blocks]

    def classifier(self) -> list[tuple[str, nn.Parameter]]:
        if not self.holds_classifier:
            return []
        return [(n, p) for n, p in self._ends.named_parameters() if _is_classifier(n)]

    def leads(self, unit: int) -> bool:
        """Whether this worker speaks for the unit: the lowest rank that holds it."""
        holders = self.placement.embedders if unit == EMBED_UNIT else self.placement.holders(unit)
        return self.rank == min(holders)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter this worker updates, once each; a head's are named b03.h1.qkv_w."""
        for unit in self.units():
            yield from self.unit(unit)
        yield from self.classifier()
        yield from self.head_parameters()

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for block in self.blocks.values():
            for head in block.heads:
                yield from block.head_parameters(head)

    def collect(self) -> None:
        for block in self.blocks.values():
            block.collect()

    def clear(self) -> None:
        """Drop all gradients and gathered weights."""
        for block in self.blocks.values():
            block.forget()
        for _, param in self.named_parameters():
            param.grad = None

    def spoken_for(self) -> dict[str, Tensor]:
        """What this worker answers for in the whole model: trunk under timm's names, heads as b03.h1.qkv_w.

        Over all workers every parameter appears exactly once; `join` puts them together.
        """
        named = [pair for unit in filter(self.leads, self.units()) for pair in self.unit(unit)]
        return {name: param.detach() for name, param in (*named, *self.classifier(), *self.head_parameters())}

    def _cut(self, state: Mapping[str, Tensor], index: int, heads: tuple[int, ...]) -> BlockShard:
        slices = [head_slices(state, index, head, self.shape) for head in heads]
        own = [{name: value.to(self.device) for name, value in one.items()} for one in slices]
        return BlockShard(self._new_trunk(index, state), heads, own, self.shape)

    def _rebuilt(
        self, index: int, heads: tuple[int, ...], block: BlockShard | None, arrived: Mapping[str, Tensor]
    ) -> BlockShard:
        if block is not None and block.heads == heads:
            return block
        trunk = self._new_trunk(index, arrived) if block is None else block.trunk
        kept = {} if block is None else block.params
        slices = [
            {name: param.detach() for name, param in kept[head].items()}
            if head in kept
            else _slices(arrived, index, head)
            for head in heads
        ]
        return BlockShard(trunk, heads, slices, self.shape)

    def _new_trunk(self, index: int, values: Mapping[str, Tensor]) -> BlockTrunk:
        block = copy.deepcopy(self._skeletons[index])
        for name, _ in list(BlockTrunk(block, index).parameters()):
            _set_param(block, name.removeprefix(f"blocks.{index}."), values[name].to(self.device, copy=True))
        return BlockTrunk(block, index)

    def _hold_ends(self, placement: Placement, arrived: Mapping[str, Tensor] | None = None) -> None:
        """Have the embedding and the classifier in memory if they are this worker's, else only their shapes."""
        self.holds_embedding = self.rank in placement.embedders
        self.holds_classifier = self.rank == placement.classifier
        for name, param in list(self._ends.named_parameters()):
            held = self.holds_classifier if _is_classifier(name) else self.holds_embedding
            if held and param.is_meta:
                _set_param(self._ends, name, (arrived or {})[name])
            elif not held and not param.is_meta:
                _set_param(self._ends, name, param.detach().to("meta"))


@torch.no_grad()
def join(parts: Mapping[str, Tensor], state: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Copy tensors as `spoken_for` names them into a plain timm state dict."""
    for name, tensor in parts.items():
        if match := _HEAD_NAME.fullmatch(name):
            write_head(state, int(match[1]), int(match[2]), {match[3]: tensor}, shape)
        else:
            state[name].copy_(tensor)


def _names(part: str) -> tuple[str, ...]:
    return ATTN_SLICES if part == "attn" else MLP_SLICES


def _set_param(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of the one called `name`."""
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, nn.Parameter(value))


def _slices(arrived: Mapping[str, Tensor], block: int, head: int) -> dict[str, Tensor]:
    prefix = f"b{block:02d}.h{head}."
    return {name.removeprefix(prefix): value for name, value in arrived.items() if name.startswith(prefix)}


def _is_classifier(name: str) -> bool:
    return name.split(".")[0] in ("norm", "fc_norm", "head")


def _cumulative(rows: list[int]) -> list[int]:
    bounds = [0]
    for count in rows:
        bounds.append(bounds[-1] + count)
    return bounds
