"""The shape of a model from the arguments that timm builds it with: arithmetic only, no torch.

A dry run asks what a model costs before anything is built, in a process that must not load torch. `Sizes` are the
arguments of timm's `VisionTransformer` that decide about sizes, as the catalogue notes them of every model; `resized`
lays a request's own arguments over them, `shape_of` counts. `partition.model_shape` counts the built model: both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from scheduler.domain import ModelShape
from scheduler.errors import UserError
from workers.contract import ModelArg

POOLS = ("token", "avg")  # those that the engine has
MAX_SIZE = 1 << 20  # of any one argument: more is a slip of the hand, and must not fill the memory


@dataclass(frozen=True)
class Sizes:
    """Arguments of timm's VisionTransformer; `init_values` above 0 means that the model has layer scales."""

    img_size: int
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    proj_bias: bool
    init_values: float
    class_token: bool
    no_embed_class: bool
    final_norm: bool
    global_pool: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sizes:
        """From a line of the catalogue. Raises KeyError where one is missing."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resized(sizes: Sizes, model_args: Mapping[str, ModelArg], img_size: int | None = None) -> Sizes:
    """The sizes under a request's own arguments. Raises UserError where timm or the engine would refuse them."""
    given = dict(model_args) if img_size is None else {**model_args, "img_size": img_size}
    for name, value in given.items():
        _check_kind(name, value)
    changed = replace(sizes, **given)  # type: ignore[arg-type]
    _check_fit(changed)
    return changed


def shape_of(sizes: Sizes, num_classes: int) -> ModelShape:
    """The shape of the model that timm builds with these sizes."""
    dim, num_heads = sizes.embed_dim, sizes.num_heads
    head_dim, hidden = dim // num_heads, int(dim * sizes.mlp_ratio)
    mlp_dims = tuple(hidden * (h + 1) // num_heads - hidden * h // num_heads for h in range(num_heads))
    attn = 4 * head_dim * dim + (3 * head_dim if sizes.qkv_bias else 0)
    patches, prefix = (sizes.img_size // sizes.patch_size) ** 2, int(sizes.class_token)
    patch_dim = sizes.in_chans * sizes.patch_size**2
    positions = patches + (0 if sizes.no_embed_class else prefix)
    # A block's trunk: two norms, the output biases of both halves, two layer scales.
    trunk_widths = 2 * 2 + (2 if sizes.proj_bias else 0) + (2 if sizes.init_values else 0)
    return ModelShape(
        num_blocks=sizes.depth,
        num_heads=num_heads,
        dim=dim,
        head_dim=head_dim,
        mlp_dims=mlp_dims,
        num_tokens=patches + prefix,
        patch_dim=patch_dim,
        num_classes=num_classes,
        head_params=tuple(attn + width * (2 * dim + int(sizes.proj_bias)) for width in mlp_dims),
        embed_params=patch_dim * dim + dim + (prefix + positions) * dim,
        norm_params=trunk_widths * dim,
        classifier_params=(2 * dim if sizes.final_norm else 0) + dim * num_classes + num_classes,
    )


_WHOLE = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
_NUMBERS = ("mlp_ratio", "init_values")
_SWITCHES = ("qkv_bias", "class_token")


def _check_kind(name: str, value: ModelArg) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _WHOLE and not (number and isinstance(value, int) and 1 <= value <= MAX_SIZE):
        raise _bad(name, f"'{name}' is {value!r}, not a whole number from 1 to {MAX_SIZE}")
    if name in _NUMBERS and not (number and 0 <= float(value) <= MAX_SIZE):
        raise _bad(name, f"'{name}' is {value!r}, not a number from 0 to {MAX_SIZE}")
    if name in _SWITCHES and not isinstance(value, bool):
        raise _bad(name, f"'{name}' is {value!r}, neither true nor false")
    if name == "global_pool" and value not in POOLS:
        raise _bad(name, f"'global_pool' is {value!r}, not one of {', '.join(POOLS)}")


def _check_fit(sizes: Sizes) -> None:
    if sizes.embed_dim % sizes.num_heads:
        raise _bad("num_heads", f"{sizes.num_heads} heads do not divide a width of {sizes.embed_dim}")
    if int(sizes.embed_dim * sizes.mlp_ratio) < sizes.num_heads:
        raise _bad("mlp_ratio", "the MLP is narrower than the number of heads")
    if sizes.img_size < sizes.patch_size:
        raise _bad("img_size", f"an image of {sizes.img_size} px is smaller than a patch of {sizes.patch_size} px")
    if sizes.global_pool == "token" and not sizes.class_token:
        raise _bad("class_token", "pooling 'token' needs the class token")


def _bad(name: str, why: str) -> UserError:
    field = "img_size" if name == "img_size" else f"model_args.{name}"
    return UserError(
        f"The model cannot be built: {why}.",
        code="bad_model_args",
        param=field,
        remedy="Correct model_args and img_size.",
    )
