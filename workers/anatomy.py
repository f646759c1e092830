"""What the engine knows of timm's vision transformers: the halves of a block, the ends of a model, what cannot be run.

Every block is two halves, each of which adds something to the residual stream:

    x ← x + scale · after(sub-layer(before(x)))

    | block of timm | before | after | scale |
    | `vision_transformer.Block` | norm1, norm2 | | ls1.gamma, ls2.gamma |
    | `vision_transformer.ResPostBlock` | | norm1, norm2 | |
    | `eva.EvaBlock`, `beit.Block` | norm1, norm2 | | gamma_1, gamma_2 |
    | `eva.EvaBlockPostNorm` | | norm1, norm2 | |

A half is cut into heads where its sub-layer is a sum over heads. Where something looks at all heads at once, a norm
say, the block is `bound`: it is one head, and stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models import beit, eva
from timm.models import vision_transformer as vit
from torch import Tensor, nn

# timm's modules whose models may be run; the catalogue and `build_model` look no further.
MODULES = frozenset({"vision_transformer", "deit", "eva", "beit"})
POOLS = frozenset({"token", "avg", "avgmax", "max", "map", "prr"})
ATTENTIONS: tuple[type[nn.Module], ...] = (Attention, AttentionRope, eva.EvaAttention, beit.Attention)
MLPS: tuple[type[nn.Module], ...] = (Mlp, GluMlp, SwiGLU)
Model = vit.VisionTransformer | eva.Eva | beit.Beit


class Half(NamedTuple):
    """The names of a half's pieces within its block; "" for what it does not have."""

    part: str  # "attn" or "mlp"; timm's name of the sub-layer as well
    before: str
    after: str
    scale: str


class _Kind(NamedTuple):
    norms_before: bool
    scales: tuple[str, str]


_KINDS = {
    vit.Block: _Kind(True, ("ls1.gamma", "ls2.gamma")),
    vit.ResPostBlock: _Kind(False, ("", "")),
    eva.EvaBlock: _Kind(True, ("gamma_1", "gamma_2")),
    eva.EvaBlockPostNorm: _Kind(False, ("", "")),
    beit.Block: _Kind(True, ("gamma_1", "gamma_2")),
}


# What is foreign about timm's larger modules, in plain words; of the others their name has to do.
_FOREIGN = {
    "attention within windows": (
        "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "vision_transformer_sam", "davit", "gcvit",
        "maxxvit",
    ),
    "convolutional stem": ("vision_transformer_hybrid", "levit", "vitamin", "xcit"),
    "a convolutional network": (
        "byobnet", "convnext", "cspnet", "densenet", "dla", "efficientnet", "ghostnet", "hrnet", "mobilenetv3", "nfnet",
        "regnet", "resnet", "resnetv2", "senet", "vgg", "vovnet",
    ),
    "no attention": ("mlp_mixer",),
}  # fmt: skip


def halves(block: nn.Module) -> tuple[Half, Half]:
    """The attention half and the MLP half of a block that `refusal` lets through."""
    kind = _KINDS[type(block)]
    params = dict(block.named_parameters())
    found = []
    for part, norm, scale in (("attn", "norm1", kind.scales[0]), ("mlp", "norm2", kind.scales[1])):
        before, after = (norm, "") if kind.norms_before else ("", norm)
        found.append(Half(part, before, after, scale if scale in params else ""))
    return found[0], found[1]


def bound(block: Any) -> str | None:
    """What looks at all heads of the block at once, in words; None where each is for itself."""
    attn, mlp = block.attn, block.mlp
    reasons = (
        (not _KINDS[type(block)].norms_before, "norms behind the sub-layers"),
        (type(attn) not in ATTENTIONS, f"attention {type(attn).__name__}"),
        (not isinstance(getattr(attn, "norm", None), nn.Identity | None), "a norm inside the attention"),
        (getattr(attn, "gate", None) is not None, "gated attention"),
        (getattr(attn, "num_kv_groups", 1) != 1, "keys shared by several heads"),
        (type(mlp) not in MLPS, f"MLP {type(mlp).__name__}"),
        (not isinstance(getattr(mlp, "norm", None), nn.Identity | None), "a norm inside the MLP"),
    )
    return next((reason for found, reason in reasons if found), None)


def embed(model: Any, images_BCHW: Tensor) -> Tensor:
    """Images to the residual stream before block 0: B, N, D."""
    x_BND = model.patch_embed(images_BCHW)
    if isinstance(model, beit.Beit):
        x_BND = torch.cat((model.cls_token.expand(len(x_BND), -1, -1), x_BND), dim=1)
        return x_BND if model.pos_embed is None else x_BND + model.pos_embed
    if isinstance(model, eva.Eva):
        return model.norm_pre(model._pos_embed(x_BND)[0])
    return model.norm_pre(model._pos_embed(x_BND))


@torch.no_grad()
def rotary(model: Any) -> Tensor | None:
    """The rotary positions of the model's own image size, N - prefix, 2·K; None for a model without."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    rope.eval()  # in training timm moves the positions at random
    grid: Any = model.patch_embed.grid_size
    # Of some kinds the table is kept, and only without a shape is it read.
    kept = getattr(rope, "feat_shape", None) is not None
    return rope.get_embed() if kept else rope.get_embed(shape=grid)


def is_classifier(name: str) -> bool:
    """Whether a parameter outside the blocks is behind them."""
    return name.split(".")[0] in ("norm", "fc_norm", "attn_pool", "head")


def foreign_architecture(timm_name: str) -> str | None:
    """Why a timm name cannot be run, known from its module alone; None when it may."""
    module = timm.models.model_entrypoint(timm_name).__module__.rpartition(".")[2]
    if module in MODULES:
        return None
    why = next((f" ({why})" for why, modules in _FOREIGN.items() if module in modules), "")
    return f"architecture {module} is not a plain vision transformer{why}"


def refusal(model: nn.Module) -> str | None:
    """The first feature of `model` that the engine cannot run, in words; None when there is none."""
    if type(model) not in (vit.VisionTransformer, eva.Eva, beit.Beit):
        return f"architecture {type(model).__name__} is not a plain vision transformer"
    blocks: Any = model.blocks
    reasons = (*_of_model(model), *(reason for block in blocks for reason in _of_block(block)))
    return next((reason for found, reason in reasons if found), None) or _unlike(blocks)


def _of_model(model: Any) -> Iterator[tuple[bool, str]]:
    """(present, name) of each feature around the blocks that is not supported."""
    stem = model.patch_embed
    if type(stem) is not PatchEmbed:
        yield True, f"convolutional stem {type(stem).__name__}"
        return
    yield len(model.blocks) == 0, "no blocks"
    yield model.global_pool not in POOLS, f"pooling '{model.global_pool}'"
    yield stem.dynamic_img_pad, "dynamic image padding"
    yield stem.img_size is None, "no image size"
    yield stem.img_size is not None and stem.img_size[0] != stem.img_size[1], "image that is not square"
    yield stem.num_patches is not None and stem.num_patches < 1, "image smaller than one patch"
    yield stem.patch_size[0] != stem.patch_size[1], "patch that is not square"
    yield not isinstance(getattr(model, "patch_drop", None), nn.Identity | None), "patch drop"
    yield model.pos_drop.p > 0 or model.head_drop.p > 0, "dropout"
    yield not isinstance(model.head, nn.Linear), "no classifier"
    yield isinstance(getattr(model, "rope", None), RotaryEmbeddingMixed), "rotary positions that are learnt"
    yield getattr(model, "rel_pos_bias", None) is not None, "relative positions shared by all blocks"


def _of_block(block: Any) -> Iterator[tuple[bool, str]]:
    """(present, name) of each feature of one block that is not supported, outermost first."""
    if type(block) not in _KINDS:
        yield True, f"block {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    yield type(attn) not in (*ATTENTIONS, DiffAttention), f"attention {type(attn).__name__}"
    yield type(mlp) not in MLPS, f"MLP {type(mlp).__name__}"
    yield not isinstance(mlp.fc2, nn.Linear), "convolutions in the MLP"
    yield any(m.p > 0 for m in block.modules() if isinstance(m, nn.Dropout)), "dropout"
    paths = (block.drop_path1, block.drop_path2)
    yield any(not isinstance(path, nn.Identity) for path in paths), "drop path"
    scales = (scale for scale in (getattr(block, "ls1", None), getattr(block, "ls2", None)) if scale is not None)
    yield any(type(scale) not in (LayerScale, nn.Identity) for scale in scales), "layer scale of another kind"
    yield bound(block) is None and mlp.fc2.in_features < attn.num_heads, "MLP narrower than the number of heads"


def _unlike(blocks: Any) -> str | None:
    """Programs and profiles are of one kind of block."""
    shapes = [[(name, param.shape) for name, param in block.named_parameters()] for block in blocks]
    return None if all(each == shapes[0] for each in shapes) else "blocks that are not alike"
