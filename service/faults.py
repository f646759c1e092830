"""What becomes of a job whose attempt was lost to a fault of the system: another attempt, or the end.

| lost by | then |
|---|---|
| a driver that died without a word, a cluster that forgot it, a last word of `system` | again, `max_faults` times |
| one of `FINAL_CODES` | the end: it would go the same way again |
| a driver that died 3 times running and got no step further | the end, `poisoned`: the job itself kills it |
| a fault of the user or of capacity | the end |

Pauses, preemptions and drains lose nothing and are not counted. A user's retry begins anew with all counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.errors import SystemFault

DIED = "driver_died"  # without a last word, as Ray says
FORGOTTEN = "ray_restarted"  # Ray no longer knows the run
FINAL_CODES = frozenset({"not_finite", "poisoned", "checkpoint_mismatch"})
POISONED_AFTER = 3


@dataclass(frozen=True)
class Losses:
    """What was lost of one job so far.

    `faults` attempts in all. At the last `stuck` deaths of its driver it had come no further than `step`, the step
    that any attempt had reached at the most.
    """

    faults: int = 0
    stuck: int = 0
    step: int | None = None


def may_go_on(error: Mapping[str, Any]) -> bool:
    """Whether another attempt may help after this error of a run."""
    return error["fault"] == "system" and error["code"] not in FINAL_CODES


def with_one_more(losses: Losses, error: Mapping[str, Any], step: int) -> Losses:
    """The losses with one attempt more, lost to this error when the job had come as far as `step`."""
    if error["code"] != DIED:
        return Losses(losses.faults + 1, losses.stuck, losses.step)
    is_further = losses.step is None or step > losses.step
    return Losses(losses.faults + 1, 1 if is_further else losses.stuck + 1, max(step, losses.step or 0))


def verdict(losses: Losses, error: Mapping[str, Any], max_faults: int) -> dict[str, Any] | None:
    """The error with which the job fails; None where it gets another attempt."""
    if losses.stuck >= POISONED_AFTER:
        message = f"Its driver died {losses.stuck} times running, never further than step {losses.step}."
        remedy = "Read what each attempt printed: `d2ft logs JOB --attempt N`."
        poisoned = SystemFault(message, code="poisoned", remedy=remedy).to_dict()
        return {**poisoned, "message": f"{poisoned['message']}\nThe last time: {error['message']}"}
    if losses.faults <= max_faults:
        return None
    lost = "1 attempt was" if losses.faults == 1 else f"{losses.faults} attempts were"
    told = f"{lost} lost to faults of the system; {max_faults} may be (D2FT_MAX_FAULTS)."
    return {**error, "message": f"{error['message']}\n{told}"}
