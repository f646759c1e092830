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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scheduler.domain import SUBLAYERS, ModelShape, Placement
from scheduler.program import EMBED_UNIT
from workers.partition import ATTN_SLICES, MLP_SLICES, SLICES, head_slices, model_shape, slice_rows, write_head

_HEAD_NAME = re.compile(r"b(\d+)\.h(\d+)\.(\w+)")

Weights = tuple[Any, ...]  # tensors, None for a bias that the model lacks: qkv_w, qkv_b, proj_w or fc1_w, fc1_b, fc2_w


class BlockShard:
    """The heads of one block that a worker owns, with the block's norms, layer scales γ and output biases."""

    def __init__(
        self, state: Mapping[str, Tensor], block: Any, index: int, heads: tuple[int, ...], shape: ModelShape
    ) -> None:
        self.index, self.heads, self.shape = index, heads, shape
        self.norms = {"attn": block.norm1, "mlp": block.norm2}
        gammas = (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None))
        self.gammas: dict[str, nn.Parameter | None] = dict(zip(SUBLAYERS, gammas, strict=True))
        self.biases: dict[str, nn.Parameter | None] = {"attn": block.attn.proj.bias, "mlp": block.mlp.fc2.bias}
        self.act = block.mlp.act
        self._position = {head: i for i, head in enumerate(heads)}
        slices = [head_slices(state, index, head, shape) for head in heads]
        self.bank = {name: torch.cat([s[name] for s in slices]) for name in slices[0]}
        self._bounds = {name: _cumulative(slice_rows(name, heads, shape)) for name in SLICES}
        self.params: dict[int, dict[str, nn.Parameter]] = {head: self._head_params(i) for i, head in enumerate(heads)}
        self._leaves: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._frozen: dict[tuple[str, tuple[int, ...]], Weights] = {}
        self._changing: set[int] = set()  # heads that this step's update changes

    def attend(self, y_BND: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Σ over the heads in `weights` of their attention output, plus `bias`: B, N, D."""
        qkv_w, qkv_b, proj_w = weights
        batch, tokens, _ = y_BND.shape
        qkv = F.linear(y_BND, qkv_w, qkv_b).view(batch, tokens, -1, 3, self.shape.head_dim)
        q_BkNK, k_BkNK, v_BkNK = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        out_BkNK = F.scaled_dot_product_attention(q_BkNK, k_BkNK, v_BkNK)
        return F.linear(out_BkNK.transpose(1, 2).reshape(batch, tokens, -1), proj_w.T, bias)

    def perceive(self, y_BND: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Σ over the heads in `weights` of their MLP slice's output, plus `bias`: B, N, D."""
        fc1_w, fc1_b, fc2_w = weights
        return F.linear(self.act(F.linear(y_BND, fc1_w, fc1_b)), fc2_w.T, bias)

    def run(self, part: str, y_BND: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        return self.attend(y_BND, weights, bias) if part == "attn" else self.perceive(y_BND, weights, bias)

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

    def trunk(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the timm state dict, in a fixed order."""
        names = (("norm1", "ls1.gamma", "attn.proj.bias", "attn"), ("norm2", "ls2.gamma", "mlp.fc2.bias", "mlp"))
        for norm, gamma, bias, part in names:
            yield from ((f"blocks.{self.index}.{norm}.{n}", p) for n, p in self.norms[part].named_parameters())
            for name, param in ((gamma, self.gammas[part]), (bias, self.biases[part])):
                if param is not None:
                    yield f"blocks.{self.index}.{name}", param

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
    """

    def __init__(
        self, model: VisionTransformer, placement: Placement, rank: int, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.placement, self.rank = model_shape(model), placement, rank
        self.device = torch.device(device)
        model = copy.deepcopy(model).to(self.device)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        owned = {block: placement.heads_of(rank, block) for block in range(self.shape.num_blocks)}
        self.blocks = {
            index: BlockShard(state, model.blocks[index], index, heads, self.shape)
            for index, heads in owned.items()
            if heads
        }
        self.no_decay: frozenset[str] = frozenset(model.no_weight_decay())
        model.blocks = nn.Sequential()
        self._ends: Any = model  # what is left: embedding and classifier
        self.holds_embedding = rank in placement.embedders
        self.holds_classifier = rank == placement.classifier
        self.dtype = next(model.parameters()).dtype

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
            return list(self.blocks[unit].trunk())
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
            for head, params in block.params.items():
                for name, param in params.items():
                    yield f"b{block.index:02d}.h{head}.{name}", param

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


def _is_classifier(name: str) -> bool:
    return name.split(".")[0] in ("norm", "fc_norm", "head")


def _cumulative(rows: list[int]) -> list[int]:
    bounds = [0]
    for count in rows:
        bounds.append(bounds[-1] + count)
    return bounds
