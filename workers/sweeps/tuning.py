"""Ray Tune told what to try: a list of settings, or Optuna's proposals; ASHA; and to go on after a lost driver.

A grid and a random search are lists that follow from the spec alone, so what Tune varies is the place in the list. What
Tune keeps of a sweep lies in `storage_path/sweeps/ID`; it is Tune's own form, which is unpickled, so only who may start
jobs on the cluster may write there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial

from scheduler.errors import UserError
from workers.sweeps.children import FAILED, Child
from workers.sweeps.contract import Choice, Span, SweepContext, SweepSpec
from workers.sweeps.halving import Halving
from workers.sweeps.trial import PLACE, key_of, setting_of, trial_of

SWEEPS_DIR = "sweeps"  # in the storage path
MOST_STEPS = 10**9  # ASHA's end of the scale: a trial that ends by itself is not to look as if it had reached it
TUNE_ENV = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # what is looked for appears when the first evaluation does
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # tables of Tune's own, which nobody reads
    "TUNE_GLOBAL_CHECKPOINT_S": "0",  # after every change: what a killed driver does not remember is proposed anew
}
RETRIES = 2  # of a trial whose process is lost; it finds its child again
Ended = Callable[[Child], None]
_LOG = logging.getLogger(__name__)


class Teller(tune.Callback):
    """Tells the driver of each trial that has ended. Tune writes it down with all else, so it goes there empty.

    Its state, which Tune keeps with that of the trials, is what ASHA has seen: Tune itself forgets that.
    """

    def __init__(
        self, spec: SweepSpec | None = None, ended: Ended | None = None, halving: Halving | None = None
    ) -> None:
        self._spec, self._ended, self._halving = spec, ended, halving

    def __getstate__(self) -> dict[str, Any]:
        return {"_spec": None, "_ended": None, "_halving": None}

    def get_state(self) -> dict[str, Any] | None:
        return None if self._halving is None else self._halving.seen()

    def set_state(self, state: dict[str, Any]) -> None:
        if self._halving is not None:
            self._halving.remember(state)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        if self._spec is not None and self._ended is not None:
            self._ended(child_of(self._spec, trial))


def run_tuner(context: SweepContext, context_path: Path, ended: Ended) -> list[Child]:
    """Run what is left of the search, and tell of each trial that ends; all of them as Tune has seen them.

    One that Tune has stopped early is told with the status it had then: its job still runs. Raises UserError where a
    package is missing.
    """
    for name, value in TUNE_ENV.items():
        os.environ.setdefault(name, value)
    spec = context.spec
    if spec.search.type == "optuna":
        _need_optuna()
    trial = tune.with_resources(trial_of(context_path), _beside_the_driver())
    kept = Path(context.storage_path).absolute() / SWEEPS_DIR
    scheduler = _scheduler(spec)
    teller = Teller(spec, ended, scheduler)
    if tune.Tuner.can_restore(str(kept / context.sweep_id)):
        _LOG.info("the sweep goes on where an earlier driver has left it")
        tuner = tune.Tuner.restore(
            str(kept / context.sweep_id), trial, restart_errored=True, param_space=_param_space(spec)
        )
        _inner(tuner).get_run_config().callbacks = [teller]  # the one that was written down is silent
        _inner(tuner)._tune_config.scheduler = scheduler  # and this one is empty
    else:
        tuner = tune.Tuner(
            trial,
            param_space=_param_space(spec),
            tune_config=tune.TuneConfig(
                num_samples=spec.search.samples if spec.search.type == "optuna" else 1,
                search_alg=_optuna(spec) if spec.search.type == "optuna" else None,
                scheduler=scheduler,
                max_concurrent_trials=spec.at_once,
                # A stopped child that its trial's own process trains ends with that process alone.
                reuse_actors=context.post_url is not None or spec.asha is None,
                trial_name_creator=name_of,
                trial_dirname_creator=name_of,
            ),
            run_config=tune.RunConfig(
                name=context.sweep_id,
                storage_path=str(kept),
                callbacks=[teller],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        )
    tuner.fit()
    return [child_of(spec, trial) for trial in _inner(tuner).get_results()._experiment_analysis.trials]


def _inner(tuner: tune.Tuner) -> Any:
    """Where Tune keeps what its `Tuner` does not show: callbacks of a restored one, and trials without a result."""
    return tuner._local_tuner


def name_of(trial: Trial) -> str:
    """A trial's key."""
    return key_of(trial.trial_id, trial.config)


def child_of(spec: SweepSpec, trial: Trial) -> Child:
    """What Tune has last heard of a trial's child; where it has heard nothing, what it knows of the trial itself."""
    told = (trial.last_result or {}).get("child")
    if told is not None and trial.status != Trial.ERROR:
        return Child.from_dict(told)
    error = {"code": "trial_lost", "message": f"The process that followed this trial is lost: {_cause(trial)}"}
    return Child(name_of(trial), setting_of(spec, trial.config), status=FAILED, error=error)


def _cause(trial: Trial) -> str:
    path = trial.error_file
    lines = Path(path).read_text().strip().splitlines() if path and Path(path).exists() else []
    return lines[-1] if lines else "nobody says why"


def _param_space(spec: SweepSpec) -> dict[str, Any]:
    if spec.search.type != "optuna":
        return {PLACE: tune.grid_search(list(range(len(spec.settings()))))}
    return {path: _domain(of) for path, of in spec.space.items()}


def _domain(of: Choice | Span) -> Any:
    if isinstance(of, Choice):
        return tune.choice(list(range(len(of.values))))
    if of.whole:
        low, high = round(of.low), round(of.high) + 1  # Tune leaves the upper end out
        return tune.lograndint(low, high) if of.log else tune.randint(low, high)
    return tune.loguniform(of.low, of.high) if of.log else tune.uniform(of.low, of.high)


def _scheduler(spec: SweepSpec) -> Halving | None:
    if spec.asha is None:
        return None
    metric, mode = next(iter(spec.objectives.items()))
    return Halving(
        time_attr="step",
        metric=metric,
        mode=mode,
        max_t=MOST_STEPS,
        grace_period=spec.asha.grace_steps,
        reduction_factor=spec.asha.reduction,
    )


def _optuna(spec: SweepSpec) -> Any:
    """Optuna's search, for one objective or for the front of several."""
    metrics, modes = list(spec.objectives), list(spec.objectives.values())
    kind = importlib.import_module("workers.sweeps.proposals").Proposals
    if len(metrics) == 1:
        return kind(metric=metrics[0], mode=modes[0], seed=spec.search.seed)
    return kind(metric=metrics, mode=modes, seed=spec.search.seed)


def _need_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "The search 'optuna' needs a package that this cluster lacks.",
            code="optuna_missing",
            param="search.type",
            remedy="Install d2ft[sweeps] where jobs run, or search by grid or random.",
        )


def _beside_the_driver() -> PlacementGroupFactory:
    """Trials run on the driver's machine, where the context lies, and book no processor: their children do that."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return PlacementGroupFactory([{f"node:{node['NodeManagerAddress']}": 0.001}])
