"""What one worker holds: its heads of each block, and the trunk beside them.

Shapes: B images, N tokens, D width.

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
from torch import Tensor, nn

from scheduler.domain import Placement
from scheduler.program import EMBED_UNIT
from workers import anatomy
from workers.anatomy import Model, halves, is_classifier
from workers.gates import Watch
from workers.partition import Cut, cut_of, head_slices, write_head
from workers.sublayers import Weights, sub_layer

MATRICES = ("_w", "_up", "_down")  # how the names of a head's matrices end
_HEAD_NAME = re.compile(r"b(\d+)\.h(\d+)\.([\w.]+)")


class BlockTrunk:
    """What every holder of a block has of it: norms, layer scales γ, output biases; and how its halves are run."""

    def __init__(self, block: nn.Module, index: int, cut: Cut, rope: Tensor | None) -> None:
        self.index, self.block, self.halves = index, block, halves(block)
        self.norms = {half.part: self._module(half.before) for half in self.halves}
        self.gammas = {half.part: self._param(half.scale) for half in self.halves}
        outer = {"attn": "attn.proj.bias", "mlp": "mlp.fc2.bias"}
        self.biases = {part: None if cut.whole else self._param(name) for part, name in outer.items()}
        self.run = {half.part: sub_layer(block, half, cut, rope) for half in self.halves}
        self._names = _trunk_names(block, cut)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the timm state dict, in a fixed order."""
        yield from ((f"blocks.{self.index}.{name}", self.block.get_parameter(name)) for name in self._names)

    def _module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name) if name else nn.Identity()

    def _param(self, name: str) -> nn.Parameter | None:
        path, _, last = name.rpartition(".")
        return getattr(self.block.get_submodule(path), last, None) if name else None


class BlockShard:
    """The heads of one block that a worker owns, with the block's trunk. `slices[i]` are those of `heads[i]`."""

    def __init__(
        self, trunk: BlockTrunk, heads: tuple[int, ...], slices: Sequence[Mapping[str, Tensor]], cut: Cut
    ) -> None:
        self.trunk, self.index, self.heads, self.cut = trunk, trunk.index, heads, cut
        self.norms, self.gammas, self.biases = trunk.norms, trunk.gammas, trunk.biases
        self._position = {head: i for i, head in enumerate(heads)}
        self.bank = {name: torch.cat([s[name] for s in slices]) for name in cut.slices}
        self._bounds = {name: _cumulative([len(s[name]) for s in slices]) for name in cut.slices}
        self.params: dict[int, dict[str, nn.Parameter]] = {head: self._head_params(i) for i, head in enumerate(heads)}
        self._leaves: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._narrowed: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._frozen: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._changing: set[int] = set()  # heads that this step's update changes

    def run(
        self, part: str, y_BND: Tensor, weights: Weights, bias: Tensor | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Σ over the heads in `weights` of their output, plus `bias`, as `sublayers.sub_layer` says: B, N, D."""
        return self.trunk.run[part](y_BND, weights, bias, watch)

    def trainable(self, part: str, heads: tuple[int, ...], kind: torch.dtype | None = None) -> Weights:
        """Weights of the heads as leaves that collect gradients until `collect`; matrices in `kind`, cast once."""
        key = (part, heads)
        if key not in self._leaves:
            frozen = self.cut.frozen
            self._leaves[key] = {n: w.detach().requires_grad_(n not in frozen) for n, w in self._gather(key).items()}
        if kind is not None and key not in self._narrowed:
            # Autocast would cast them for every call, and every graph would keep a copy of its own.
            self._narrowed[key] = self._cast(self._leaves[key], kind)
        return self._leaves[key] if kind is None else self._narrowed[key]

    def frozen(self, part: str, heads: tuple[int, ...], kind: torch.dtype | None = None) -> Weights:
        """Weights of the heads without gradient; matrices in `kind`."""
        key = (part, heads)
        if key not in self._frozen:
            self._frozen[key] = self._cast(self._gather(key), kind)
        return self._frozen[key]

    def collect(self) -> None:
        """Move the gradients of this step from the leaves to the heads' own parameters."""
        for (_, heads), leaves in self._leaves.items():
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    self._changing.update(heads)
                    for head, grad in zip(heads, leaf.grad.split(self._rows_of(name, heads)), strict=True):
                        param = self.params[head][name]
                        param.grad = grad if param.grad is None else param.grad + grad
        self._leaves.clear()
        self._narrowed.clear()

    def forget(self) -> None:
        """Drop uncollected gradients and gathered weights that have changed; those of heads held FORWARD stay."""
        self._leaves.clear()
        self._narrowed.clear()
        self._frozen = {key: w for key, w in self._frozen.items() if self._changing.isdisjoint(key[1])}
        self._changing.clear()

    def head_parameters(self, head: int) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((f"b{self.index:02d}.h{head}.{name}", param) for name, param in self.params[head].items())

    def _gather(self, key: tuple[str, tuple[int, ...]]) -> Weights:
        part, heads = key
        at = [self._position[head] for head in heads]
        return {name: self._rows(name, at) for name in self.cut.pieces[part]}

    def _cast(self, weights: Weights, kind: torch.dtype | None) -> Weights:
        """The matrices that autocast multiplies in `kind`; what it keeps wide, as norms within a bound block, stays."""
        if kind is None or self.cut.whole:
            return weights
        return {n: w.to(kind) if n.endswith(MATRICES) else w for n, w in weights.items()}

    def _rows_of(self, name: str, heads: tuple[int, ...]) -> list[int]:
        """How many rows of a slice each of the heads has."""
        return [len(self.params[head][name]) for head in heads]

    def _rows(self, name: str, at: list[int]) -> Tensor:
        bank, bounds = self.bank[name], self._bounds[name]
        if at == list(range(at[0], at[-1] + 1)):
            return bank[bounds[at[0]] : bounds[at[-1] + 1]]
        return torch.cat([bank[bounds[i] : bounds[i + 1]] for i in at])

    def _head_params(self, i: int) -> dict[str, nn.Parameter]:
        rows = {n: bank[self._bounds[n][i] : self._bounds[n][i + 1]] for n, bank in self.bank.items()}
        return {n: nn.Parameter(of_head, requires_grad=n not in self.cut.frozen) for n, of_head in rows.items()}


class Shard:
    """One worker's part of a model under a placement.

    The embedding is held by the owners of block 0's heads, the classifier (final norm, pooling, head) by one worker.
    What a worker does not hold is on the meta device: its shape is known, it has no memory.
    """

    def __init__(
        self,
        model: Model,
        placement: Placement,
        rank: int,
        device: torch.device | str = "cpu",
        *,
        consume: bool = False,
    ) -> None:
        """With `consume` the blocks of `model` lose their weights as they are cut: nothing is held twice."""
        self.cut, self.placement, self.rank = cut_of(model), placement, rank
        self.shape = self.cut.shape
        self.device = torch.device(device)
        self.dtype = next(model.parameters()).dtype
        self.no_decay = _not_decayed(model, self.cut)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        blocks: Any = model.blocks
        self._skeletons = [_skeleton(block, self.device) for block in blocks]
        self._ends: Any = copy.deepcopy(model, {id(blocks): nn.Sequential()}).to(self.device)
        self._rope = anatomy.rotary(self._ends)
        self.blocks: dict[int, BlockShard] = {}
        for index in range(self.shape.num_blocks):
            if heads := placement.heads_of(rank, index):
                self.blocks[index] = self._cut(state, index, heads)
            if consume:
                _empty(blocks[index], state, f"blocks.{index}.")
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
        return anatomy.embed(self._ends, images_BCHW)

    def classify(self, x_BND: Tensor) -> Tensor:
        """The residual stream after the last block to logits."""
        return self._ends.forward_head(self._ends.norm(x_BND))

    def unit(self, unit: int) -> list[tuple[str, nn.Parameter]]:
        """The trunk parameters of a unit: -1 the embedding, l ≥ 0 the norms, scales and biases of block l."""
        if unit != EMBED_UNIT:
            return list(self.blocks[unit].trunk.parameters())
        return [(n, p) for n, p in self._ends.named_parameters() if not is_classifier(n)]

    def trained_unit(self, unit: int) -> list[tuple[str, nn.Parameter]]:
        """Those of a unit that train: what the step's gradient messages are made of."""
        return [(name, param) for name, param in self.unit(unit) if param.requires_grad]

    def units(self) -> list[int]:
        return [*([EMBED_UNIT] if self.holds_embedding else []), *self.blocks]

    def classifier(self) -> list[tuple[str, nn.Parameter]]:
        if not self.holds_classifier:
            return []
        return [(n, p) for n, p in self._ends.named_parameters() if is_classifier(n)]

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
        slices = [head_slices(state, index, head, self.cut) for head in heads]
        own = [{name: value.to(self.device) for name, value in one.items()} for one in slices]
        return BlockShard(self._new_trunk(index, state), heads, own, self.cut)

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
        return BlockShard(trunk, heads, slices, self.cut)

    def _new_trunk(self, index: int, values: Mapping[str, Tensor]) -> BlockTrunk:
        block = copy.deepcopy(self._skeletons[index])
        for name in _trunk_names(block, self.cut):
            _set_param(block, name, values[f"blocks.{index}.{name}"].to(self.device, copy=True))
        return BlockTrunk(block, index, self.cut, self._rope)

    def _hold_ends(self, placement: Placement, arrived: Mapping[str, Tensor] | None = None) -> None:
        """Have the embedding and the classifier in memory if they are this worker's, else only their shapes."""
        self.holds_embedding = self.rank in placement.embedders
        self.holds_classifier = self.rank == placement.classifier
        for name, param in list(self._ends.named_parameters()):
            held = self.holds_classifier if is_classifier(name) else self.holds_embedding
            if held and param.is_meta:
                _set_param(self._ends, name, (arrived or {})[name])
            elif not held and not param.is_meta:
                _set_param(self._ends, name, param.detach().to("meta"))


@torch.no_grad()
def join(parts: Mapping[str, Tensor], state: Mapping[str, Tensor], cut: Cut) -> None:
    """Copy tensors as `spoken_for` names them into a plain timm state dict."""
    for name, tensor in parts.items():
        if match := _HEAD_NAME.fullmatch(name):
            write_head(state, int(match[1]), int(match[2]), {match[3]: tensor}, cut)
        else:
            state[name].copy_(tensor)


def _trunk_names(block: nn.Module, cut: Cut) -> list[str]:
    """What all heads of a block share, under timm's names within it: half by half all that is no head's."""
    of_heads = {piece.key for pieces in cut.slices.values() for piece in pieces}
    names = []
    for half in halves(block):
        inside = tuple(f"{path}." for path in (half.before, half.part) if path)
        names += [name for name, _ in block.named_parameters() if name.startswith(inside) and name not in of_heads]
        names += [half.scale] if half.scale else []
    return names


def _skeleton(block: nn.Module, device: torch.device) -> nn.Module:
    """A block without memory but that of its buffers."""
    kept = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        for param in block.parameters()
    }
    skeleton = copy.deepcopy(block, kept)
    for module in skeleton.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return skeleton


def _empty(block: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Leave a block the shapes of its parameters alone, and `state` nothing of it."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    for name, param in list(block.named_parameters()):
        _set_param(block, name, param.detach().to("meta"))


def _not_decayed(model: Any, cut: Cut) -> frozenset[str]:
    """Parameters that timm names as not to be decayed, vectors apart."""
    tables = "table" in cut.slices
    grid = [(b, h) for b in range(cut.shape.num_blocks) for h in range(cut.shape.num_heads) if tables]
    return frozenset(model.no_weight_decay()) | {f"b{block:02d}.h{head}.table" for block, head in grid}


def _set_param(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of the one called `name`; frozen if that was."""
    path, _, last = name.rpartition(".")
    setattr(
        module.get_submodule(path), last, nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad)
    )


def _slices(arrived: Mapping[str, Tensor], block: int, head: int) -> dict[str, Tensor]:
    prefix = f"b{block:02d}.h{head}."
    return {name.removeprefix(prefix): value for name, value in arrived.items() if name.startswith(prefix)}


def _cumulative(rows: list[int]) -> list[int]:
    bounds = [0]
    for count in rows:
        bounds.append(bounds[-1] + count)
    return bounds
