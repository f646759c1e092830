"""What Ray Tune runs: one child, followed to its end. It says what it sees, at each new value.

A trial is known by its key. Of a list of settings that is the place in it, so that it means the same after a restart;
of a search that goes by results it is Tune's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import tune

from scheduler.errors import UserError
from workers.sweeps.alike import placed, placement_of, told
from workers.sweeps.children import FAILED, SUCCEEDED, Child, Children, follow
from workers.sweeps.contract import Choice, SweepContext, SweepSpec
from workers.sweeps.direct import Direct
from workers.sweeps.hosted import Hosted
from workers.sweeps.outcome import COSTS

PLACE = "place"  # in Tune's config: the place in the list of settings
HOSTED_POLL_S, DIRECT_POLL_S = 1.0, 0.5
# What a sweep looks for, and what of a child's figures it is by.
METRICS = {"accuracy": "accuracy", **COSTS}
Report = Callable[[dict[str, Any]], None]


def trial_of(context_path: str | Path) -> Callable[[dict[str, Any]], None]:
    """The function for Tune. It reads the context where it runs: Tune writes down what it is given, tokens too."""

    def trial(config: dict[str, Any]) -> None:
        context = SweepContext.model_validate_json(Path(context_path).read_bytes())
        key = key_of(tune.get_context().get_trial_id() or "", config)
        run_trial(context.spec, key, config, children_of(context), tune.report, poll_of(context))

    return trial


def children_of(context: SweepContext) -> Children:
    """Where the children of this sweep run."""
    if context.post_url is None:
        return Direct(context)
    return Hosted(context.post_url, context.post_token)


def poll_of(context: SweepContext) -> float:
    return DIRECT_POLL_S if context.post_url is None else HOSTED_POLL_S


def key_of(trial_id: str, config: Mapping[str, Any]) -> str:
    """A trial's key, by which its child is found again."""
    return f"t-{config[PLACE]:03d}" if PLACE in config else f"t-{trial_id}"


def setting_of(spec: SweepSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The setting behind Tune's config: of a choice there stands the place of the value, which may be any JSON."""
    if PLACE in config:
        return spec.settings()[config[PLACE]]
    return {
        path: of.values[config[path]] if isinstance(of, Choice) else config[path] for path, of in spec.space.items()
    }


def run_trial(
    spec: SweepSpec, key: str, config: Mapping[str, Any], children: Children, report: Report, poll_s: float
) -> None:
    """Have the child of a setting run and report what is seen of it; that it cannot be or fails is a result as well.

    Raises SystemFault where the sweep itself has lost its children.
    """
    setting = setting_of(spec, config)
    try:
        placement = placement_of(spec, children.all())
        child = children.start(key, setting, placed(spec.trial(setting), placement))
        follow(children, child, poll_s, lambda child: report(result_of(spec, told(child, placement))))
    except (UserError, ValidationError) as error:
        report(result_of(spec, Child(key, setting, status=FAILED, error=_told(error))))


def result_of(spec: SweepSpec, child: Child) -> dict[str, Any]:
    """What Tune is told of a child: the child as it is, its step, what is looked for as far as it is known.

    Of one that has come to its end `done` is true, so that ASHA does not stop it there. One that has ended well and
    lacks what is looked for has failed.
    """
    figures = child.figures or {}
    seen: dict[str, float | None] = {name: figures.get(figure) for name, figure in METRICS.items()}
    seen["accuracy"] = child.accuracy if seen["accuracy"] is None else seen["accuracy"]
    seen["loss"] = child.loss
    lacking = [name for name in spec.objectives if seen[name] is None]
    if child.status == SUCCEEDED and lacking:
        error = {"code": "metric_missing", "message": f"The job ended without {' and '.join(lacking)}."}
        child = Child(**{**asdict(child), "status": FAILED, "error": error})
    known = {name: value for name, value in seen.items() if value is not None}
    return {"step": child.step or 0, **known, "child": asdict(child), **({"done": True} if child.is_over else {})}


def _told(error: UserError | ValidationError) -> dict[str, Any]:
    if isinstance(error, UserError):
        return error.to_dict()
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return {"code": "invalid_setting", "fault": "user", "message": message, "param": where or None}
