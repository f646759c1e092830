"""The shape of a model from the arguments that timm builds it with: arithmetic only, no torch.

A dry run asks what a model costs before anything is built, in a process that must not load torch. Of most models the
catalogue notes `Sizes`, the arguments of timm's `VisionTransformer` that decide about sizes, and of the others
`Measured`, the shape as built, of which less can be changed. `resized` lays a request's own arguments over either,
`shape_of` counts. `partition.model_shape` counts the built model: both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from scheduler.domain import ModelShape
from scheduler.errors import UserError
from workers.contract import ModelArg
from workers.method import Lora, Method

POOLS = ("token", "avg", "avgmax", "max", "map", "prr")  # those that a request may ask for
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
    qk_norm: bool
    proj_bias: bool
    init_values: float
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    final_norm: bool
    global_pool: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sizes:
        """From a line of the catalogue. Raises KeyError where one is missing."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A model as it was built: its shape, and what of it follows from the image's size.

    `position_params` per patch (0 without learnt positions); `has_tables` where every head learns a bias for each
    relative position, as in BEiT. `pools` are what it may pool by without
    another shape.
    """

    img_size: int
    patch_size: int
    in_chans: int
    pools: tuple[str, ...]
    position_params: int
    has_tables: bool
    shape: ModelShape

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """From a line of the catalogue. Raises KeyError where one is missing, TypeError for a shape of other fields."""
        sizes = data["shape"].items()
        shape: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes}
        own = {field.name: data[field.name] for field in fields(cls)}
        return cls(**{**own, "pools": tuple(own["pools"]), "shape": ModelShape(**shape)})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Entry = Sizes | Measured


def read_entry(data: Mapping[str, Any]) -> Entry:
    """A line of the catalogue. Raises KeyError or TypeError where it is none."""
    return Measured.from_dict(data) if "shape" in data else Sizes.from_dict(data)


def resized(entry: Entry, model_args: Mapping[str, ModelArg], img_size: int | None = None) -> Entry:
    """A model under a request's own arguments. Raises UserError where timm or the engine would refuse them."""
    given = dict(model_args) if img_size is None else {**model_args, "img_size": img_size}
    for name, value in given.items():
        _check_kind(name, value)
    if isinstance(entry, Measured):
        return _remeasured(entry, given)
    changed = replace(entry, **given)  # type: ignore[arg-type]
    _check_fit(changed)
    return changed


def shape_of(entry: Entry, num_classes: int) -> ModelShape:
    """The shape of the model that timm builds with these sizes."""
    if isinstance(entry, Measured):
        shape = entry.shape
        classifier = shape.classifier_params + (num_classes - shape.num_classes) * (shape.dim + 1)
        return replace(shape, num_classes=num_classes, classifier_params=classifier)
    sizes = entry
    dim, num_heads = sizes.embed_dim, sizes.num_heads
    head_dim, hidden = dim // num_heads, int(dim * sizes.mlp_ratio)
    mlp_dims = tuple(hidden * (h + 1) // num_heads - hidden * h // num_heads for h in range(num_heads))
    attn = 4 * head_dim * dim + (3 * head_dim if sizes.qkv_bias else 0)
    patches, prefix = (sizes.img_size // sizes.patch_size) ** 2, int(sizes.class_token) + sizes.reg_tokens
    patch_dim = sizes.in_chans * sizes.patch_size**2
    positions = patches + (0 if sizes.no_embed_class else prefix)
    # A block's trunk: two norms, the output biases of both halves, two layer scales, the norms of queries and keys.
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
        norm_params=trunk_widths * dim + (4 * head_dim if sizes.qk_norm else 0),
        classifier_params=_pool_params(sizes) + (2 * dim if sizes.final_norm else 0) + dim * num_classes + num_classes,
    )


def _pool_params(sizes: Sizes) -> int:
    """Pooling by attention has a query that is learnt, projections, a norm and an MLP; the others have nothing."""
    if sizes.global_pool != "map":
        return 0
    dim, hidden = sizes.embed_dim, int(sizes.embed_dim * sizes.mlp_ratio)
    return 4 * dim**2 + 8 * dim + 2 * dim * hidden + hidden


def check_rank(rank: int, most: int) -> None:
    """Raises UserError for adapters of a rank above what the model is wide."""
    if rank > most:
        raise UserError(
            f"A rank of {rank} is more than the model's width of {most}.",
            code="lora_rank",
            param="method.lora.rank",
            remedy=f"Choose a rank of at most {most}; 4 to 64 are usual.",
        )


def check_frozen_blocks(count: int, depth: int) -> None:
    """Raises UserError where freezing so many blocks leaves none."""
    if count >= depth:
        raise UserError(
            f"Freezing {count} blocks leaves none of the model's {depth} to train.",
            code="freeze_blocks",
            param="method.freeze.blocks",
            remedy=f"Freeze at most {depth - 1}, or train the classifier alone: head_only.",
        )


def trained(shape: ModelShape, method: Method) -> ModelShape:
    """The shape of a model of which `method` trains a part, as `partition.cut_of` counts it after `choose_trained`."""
    if method.lora is not None:
        shape = adapted(shape, method.lora)
    if method.head_only:
        none = (0,) * shape.num_heads
        return replace(
            shape, trained_head_params=none, trained_norm_params=0, backward_weight=1, num_frozen=shape.num_blocks
        )
    if method.freeze is None:
        return shape
    check_frozen_blocks(method.freeze.blocks, shape.num_blocks)
    shape = replace(shape, num_frozen=method.freeze.blocks)
    if method.freeze.trunk:
        shape = replace(shape, trained_head_params=shape.head_params, trained_norm_params=0)
    return shape


def adapted(shape: ModelShape, lora: Lora) -> ModelShape:
    """The shape with adapters, as `partition.cut_of` counts the model that `lora.attach` gave them to."""
    rank, gates = lora.rank, shape.mlp_matrices - 1
    of_head = {"qkv": 3 * shape.head_dim, "proj": shape.head_dim}
    check_rank(rank, shape.dim)

    def rows(width: int) -> int:
        widths = {**of_head, "fc1": gates * width, "fc2": width}
        return sum(widths[target] for target in lora.targets)

    added = tuple(rank * rows(width) for width in shape.mlp_dims)
    shared = rank * shape.dim * len(lora.targets)
    return replace(
        shape,
        head_params=tuple(map(sum, zip(shape.head_params, added, strict=True))),
        norm_params=shape.norm_params + shared,
        trained_head_params=added,
        trained_norm_params=shared,
        backward_weight=1,
    )


_WHOLE = {"img_size": 1, "patch_size": 1, "in_chans": 1, "embed_dim": 1, "depth": 1, "num_heads": 1, "reg_tokens": 0}
_NUMBERS = ("mlp_ratio", "init_values")
_SWITCHES = ("qkv_bias", "qk_norm", "class_token")
_OF_MEASURED = ("img_size", "in_chans", "depth", "global_pool")


def _remeasured(entry: Measured, given: Mapping[str, Any]) -> Measured:
    for name in given:
        if name not in _OF_MEASURED:
            raise _bad(name, f"of this model only {', '.join(_OF_MEASURED)} can be changed")
    pool = given.get("global_pool", entry.pools[0])
    if pool not in entry.pools:
        raise _bad("global_pool", f"'global_pool' of this model is {' or '.join(entry.pools)}, not '{pool}'")
    changed = replace(entry, **{name: given[name] for name in ("img_size", "in_chans") if name in given})
    if changed.img_size < entry.patch_size:
        raise _bad("img_size", f"an image of {changed.img_size} px is smaller than a patch of {entry.patch_size} px")
    shape, side, before = entry.shape, changed.img_size // entry.patch_size, entry.img_size // entry.patch_size
    tables = shape.num_heads * ((2 * side - 1) ** 2 - (2 * before - 1) ** 2) if entry.has_tables else 0
    patch_dim = changed.in_chans * entry.patch_size**2
    embed = (side**2 - before**2) * entry.position_params + (patch_dim - shape.patch_dim) * shape.dim
    return replace(
        changed,
        shape=replace(
            shape,
            num_blocks=given.get("depth", shape.num_blocks),
            num_tokens=shape.num_tokens + side**2 - before**2,
            patch_dim=patch_dim,
            head_params=tuple(params + tables // shape.num_heads for params in shape.head_params),
            embed_params=shape.embed_params + embed,
        ),
    )


def _check_kind(name: str, value: ModelArg) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    least = _WHOLE.get(name, 0)
    if name in _WHOLE and not (number and isinstance(value, int) and least <= value <= MAX_SIZE):
        raise _bad(name, f"'{name}' is {value!r}, not a whole number from {least} to {MAX_SIZE}")
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
