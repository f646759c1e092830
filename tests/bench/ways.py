"""The ways to train that `accuracy` puts side by side: methods of ours, and what people would do instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FULL = "full fine-tuning"


@dataclass(frozen=True)
class Way:
    """A method, for a `share` of the steps at `rate` times the learning rate.

    `last` trains that share of the blocks, those nearest the classifier, and nothing else of them. `batches` is how
    many micro-batches a step has in place of the setting's. `window` overrides the length of windows, as a share of
    the steps.
    """

    method: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    rate: float = 1.0
    last: float | None = None
    batches: int | None = None
    window: float | None = None


def mix(full, forward, skip):
    """Exact counts of operations over a step's micro-batches."""
    return {"ratios": {"full": full, "forward": forward, "skip": skip}}


def heads(full, forward, skip, *, rate=1.0, window=None, strategy="hull", **words):
    """Ratios met head by head, and how the heads are chosen."""
    return Way({**mix(full, forward, skip), "strategy": strategy, **words}, rate=rate, window=window)


def hardest(full, forward, skip, *, rate=1.0):
    """Ratios met by whole micro-batches, the hardest images first."""
    return Way({**mix(full, forward, skip), "strategy": "hardest"}, rate=rate)


def budgets(strategy, compute, most_bytes=1.0):
    return Way({"budgets": {"compute": compute, "bytes": most_bytes}, "strategy": strategy})


def phases(strategy, *pairs):
    """(share of the steps, ratios or None for all-FULL) after one another."""
    schedule = [{"share": share, **(ratios or {})} for share, ratios in pairs]
    return Way({"schedule": schedule, "strategy": strategy})


SCORES = ("fisher", "gradient", "taylor", "weight", "activation")
HALF, FIFTH, THREE = mix(2, 3, 0), mix(1, 4, 0), mix(3, 0, 2)
LOOSE = {"hold": "none", "grain": "scattered"}  # every head by itself, for every micro-batch
LORA = {"lora": {"rank": 8}}
WAYS = {
    FULL: Way(),
    "full fine-tuning, rate × 0.5": Way(rate=0.5),
    "full fine-tuning, rate × 2": Way(rate=2.0),
    "stopped at 80 %": Way(share=0.8),
    "stopped at 60 %": Way(share=0.6),
    "stopped at 60 %, rate × 2": Way(share=0.6, rate=2.0),
    "stopped at 50 %": Way(share=0.5),
    "stopped at 40 %": Way(share=0.4),
    "3 of 5 micro-batches": Way(batches=3),
    "last 40 % of the blocks": Way(last=0.4),
    **{f"LoRA of rank 8, rate × {rate:g}": Way(LORA, rate=rate) for rate in (1, 2, 4, 8, 20, 40, 80)},
    "LoRA of rank 8, rate × 2, hardest 3F2S": Way({**LORA, **mix(3, 0, 2), "strategy": "hardest"}, rate=2.0),
    "half of the blocks frozen": Way({"freeze": {"blocks": 3}}),
    "trunk frozen": Way({"freeze": {"trunk": True}}),
    "classifier alone, rate × 20": Way({"head_only": True}, rate=20.0),
    "hardest 4F1S": hardest(4, 0, 1),
    "hardest 3F2S": hardest(3, 0, 2),
    "hardest 3F1O1S": hardest(3, 1, 1),
    "hardest 2F3O": hardest(2, 3, 0),
    "hardest 2F1O2S": hardest(2, 1, 2),
    "hardest 2F3S": hardest(2, 0, 3),
    "hardest 3F2S, rate × 2": hardest(3, 0, 2, rate=2.0),
    "hardest 0.6 compute, 0.5 bytes": budgets("hardest", 0.6, 0.5),
    "hardest, 2F3S for 1/2, then 4F1S": phases("hardest", (0.5, mix(2, 0, 3)), (0.5, mix(4, 0, 1))),
    "all-FULL for 1/5, then hardest 5/10": phases("hardest", (0.2, None), (0.4, THREE), (0.4, mix(2, 0, 3))),
    **{f"held 2F3O, {score}": heads(2, 3, 0, score=score) for score in SCORES},
    "held 2F3O, by chance": heads(2, 3, 0, score="random"),
    "held 2F3O, another chance per window": heads(2, 3, 0, strategy="random"),
    "held 2F3O, another chance, 20 windows": heads(2, 3, 0, strategy="random", window=0.05),
    "held 2F3O, taylor, rate × 2": heads(2, 3, 0, rate=2.0, score="taylor"),
    "held 1F4O, taylor": heads(1, 4, 0, score="taylor"),
    "held 2F2O1S, coherent": heads(2, 2, 1),
    "held 2F2O1S, scattered": heads(2, 2, 1, grain="scattered"),
    "held 2F1O2S, coherent": heads(2, 1, 2),
    "held 3F2S, coherent": heads(3, 0, 2, hold="all"),
    "3F2S, redrawn, coherent": heads(3, 0, 2),
    "3F2S, redrawn, scattered": heads(3, 0, 2, grain="scattered"),
    "3F2S, redrawn, mean fill": heads(3, 0, 2, skip_fill="mean"),
    "3F2S, redrawn, rescaled": heads(3, 0, 2, skip_fill="rescale"),
    "3F2S, per micro-batch, fisher": heads(3, 0, 2, **LOOSE),
    "2F3O, per micro-batch, fisher": heads(2, 3, 0, **LOOSE),
    "2F3O, per micro-batch, random": heads(2, 3, 0, strategy="random", **LOOSE),
    "2F2O1S, per micro-batch, two-stage": heads(2, 2, 1, strategy="two_stage", **LOOSE),
    "3F2S, per micro-batch, two-stage": heads(3, 0, 2, strategy="two_stage", **LOOSE),
    "3F2S, per micro-batch, random": heads(3, 0, 2, strategy="random", **LOOSE),
    "heads, 0.6 compute": budgets("hull", 0.6),
    "heads, 0.6 compute, 0.5 bytes": budgets("hull", 0.6, 0.5),
    "all-FULL for 1/4, then held 1F4O": phases("hull", (0.25, None), (0.75, FIFTH)),
    "held 1F4O, then all-FULL for 1/4": phases("hull", (0.75, FIFTH), (0.25, None)),
    "redrawn 3F2S for half, then held 2F3O": phases("hull", (0.5, THREE), (0.5, HALF)),
}
# What the command shows by itself: enough to see what works, in minutes.
SHOWN = (
    FULL,
    "stopped at 60 %",
    "3 of 5 micro-batches",
    "last 40 % of the blocks",
    "hardest 3F2S",
    "hardest 2F3O",
    "hardest 0.6 compute, 0.5 bytes",
    "held 2F3O, taylor",
    "held 2F3O, by chance",
    "3F2S, redrawn, coherent",
    "2F3O, per micro-batch, random",
    "2F2O1S, per micro-batch, two-stage",
)
