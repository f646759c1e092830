"""Selection: which op each head runs for each micro-batch.

    words ─┬─► shares (who does how much) ─► ratios ─┬─► assign, held, draws
           │                              └► budgets ┘   menus ─► hull │ proof │ stages
           └─► hardest (whole micro-batches)

Asked as exact ratios F:O:S of a step's M micro-batches, or as budgets on compute and bytes. A strategy says who
chooses, `hold` what stays the same over a window, `grain` whether a worker's heads of a block sit out together.
"""

from scheduler.selection.door import select, static_part
from scheduler.selection.words import (
    FORWARD_WEIGHT,
    GRAINS,
    HOLDS,
    PERIOD,
    STRATEGIES,
    Selection,
    SelectionRequest,
    all_full,
    check_words,
    groups_of,
    heads_of,
    worth_fraction,
)

__all__ = [
    "FORWARD_WEIGHT",
    "GRAINS",
    "HOLDS",
    "PERIOD",
    "STRATEGIES",
    "Selection",
    "SelectionRequest",
    "all_full",
    "check_words",
    "groups_of",
    "heads_of",
    "select",
    "static_part",
    "worth_fraction",
]
