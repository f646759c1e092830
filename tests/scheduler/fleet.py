"""Invented models and fleets for the planner's tests: a ViT of given sizes, devices and links of given speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from scheduler.domain import DeviceProfile, LinkProfile, ModelShape, Scores

GIB = 1 << 30


def vit_shape(
    num_blocks: int = 6,
    num_heads: int = 6,
    dim: int = 96,
    num_tokens: int = 50,
    *,
    patch_dim: int = 48,
    num_classes: int = 10,
) -> ModelShape:
    """A plain ViT with class token, qkv bias and an MLP of 4 × dim, cut evenly into heads."""
    head_dim = dim // num_heads
    mlp_dims = tuple(4 * dim * (h + 1) // num_heads - 4 * dim * h // num_heads for h in range(num_heads))
    attn = 3 * (dim * head_dim + head_dim) + dim * head_dim
    return ModelShape(
        num_blocks=num_blocks,
        num_heads=num_heads,
        dim=dim,
        head_dim=head_dim,
        mlp_dims=mlp_dims,
        num_tokens=num_tokens,
        patch_dim=patch_dim,
        num_classes=num_classes,
        head_params=tuple(attn + 2 * dim * width + width for width in mlp_dims),
        embed_params=patch_dim * dim + dim + dim + num_tokens * dim,
        norm_params=6 * dim,
        classifier_params=2 * dim + dim * num_classes + num_classes,
    )


def fleet(
    speeds: Sequence[float] = (1.0, 1.0),
    *,
    shape: ModelShape | None = None,
    batch: int = 16,
    gflops: float = 20.0,
    overhead_us: int = 60,
    link_bytes_per_s: int | Callable[[int, int], int] = 1_000_000_000,
    latency_us: int | Callable[[int, int], int] = 100,
    free_bytes: int | Sequence[int] = 8 * GIB,
) -> tuple[DeviceProfile, ...]:
    """One device per entry of `speeds`; speed 1.0 runs `gflops`. Links may be functions of (src, dst)."""
    shape = shape or vit_shape()
    free = [free_bytes] * len(speeds) if isinstance(free_bytes, int) else list(free_bytes)

    def link(src: int, dst: int) -> LinkProfile | None:
        if src == dst:
            return None
        latency = latency_us(src, dst) if callable(latency_us) else latency_us
        width = link_bytes_per_s(src, dst) if callable(link_bytes_per_s) else link_bytes_per_s
        return LinkProfile(latency, width)

    return tuple(
        _device(
            rank,
            speed * gflops * 1e3,
            shape,
            batch,
            overhead_us,
            free[rank],
            [link(rank, v) for v in range(len(speeds))],
        )
        for rank, speed in enumerate(speeds)
    )


def two_nodes(src: int, dst: int) -> int:
    """Bytes/s of a fleet whose even and odd ranks sit in different machines: 10 GB/s inside, 100 MB/s between."""
    return 10_000_000_000 if (src - dst) % 2 == 0 else 100_000_000


def _device(
    rank: int,
    flops_per_us: float,
    shape: ModelShape,
    batch: int,
    overhead_us: int,
    free_bytes: int,
    links: Sequence[LinkProfile | None],
) -> DeviceProfile:
    tokens = batch * shape.num_tokens
    attn = 2 * (tokens * shape.dim * 4 * shape.head_dim + 2 * tokens * shape.num_tokens * shape.head_dim)
    mlp = 4 * tokens * shape.dim * max(shape.mlp_dims)

    def curve(head_flops: int, passes: int) -> tuple[int, ...]:
        fixed, one = overhead_us * passes, head_flops * passes / flops_per_us
        return (0, *(round(fixed + k * one) for k in range(1, shape.num_heads + 1)))

    trunk_us = round(overhead_us + shape.trunk_flops(batch) / flops_per_us)
    return DeviceProfile(
        rank=rank,
        node=f"node{rank}",
        device="cpu",
        attn_forward_us=curve(attn, 1),
        attn_backward_us=curve(attn, 2),
        mlp_forward_us=curve(mlp, 1),
        mlp_backward_us=curve(mlp, 2),
        embed_us=trunk_us,
        classify_us=trunk_us // 2,
        sum_us=max(1, round(4 * tokens * shape.dim / flops_per_us)),
        update_us=max(1, round(20 * max(shape.head_params) / flops_per_us)),
        free_bytes=free_bytes,
        links=tuple(links),
    )


def random_scores(num_blocks: int = 6, num_heads: int = 6, seed: int = 0) -> Scores:
    """Worths as unlike as real ones: a few heads matter much."""
    rng = np.random.default_rng(seed)
    backward_LH, forward_LH = rng.lognormal(sigma=(1.0, 0.3), size=(num_blocks, num_heads, 2)).transpose(2, 0, 1)
    return Scores(backward_LH / backward_LH.mean(), forward_LH / forward_LH.mean())
