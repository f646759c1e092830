"""The model that comes with the package: a small vision transformer that has seen MNIST digits.

Facts only, no torch. The weights are `digits_vit.safetensors`; `pretrain.py` makes them again.
"""

from __future__ import annotations

from pathlib import Path

TIMM_NAME = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, int | float | bool | str] = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 6,
    "global_pool": "token",
}
WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")
FACTS = Path(__file__).with_name("digits_vit.json")
