"""A job as a run of MLflow: its spec as parameters, its steps as metrics, its ledger, small files and its outcome.

The run is found again by the tag `d2ft.job_id`, so that all attempts of a job are one run. Weights are not uploaded: a
tag `d2ft.artifact.NAME` says where each file lies. Where MLflow is, and as whom we ask, its own variables say:
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ("d2ft"), MLFLOW_TRACKING_USERNAME and so on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.contract import RunContext
from workers.tracking import Event, Scalars

# Where nobody has said otherwise: it would try for minutes while a server is away, and tell its makers of us.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402 - it reads them when it is loaded
from mlflow.entities import Metric, Param, Run  # noqa: E402

EXPERIMENT, EXPERIMENT_NAME = "d2ft", "MLFLOW_EXPERIMENT_NAME"
JOB_TAG, ERROR_TAG, RESULT_TAG = "d2ft.job_id", "d2ft.error", "d2ft.artifact"
UPLOAD_BYTES = 1 << 20  # larger files stay where they are
MAX_TEXT = 500
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one request
ENDS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
PAUSED, RUNNING = "SCHEDULED", "RUNNING"
_NO_NAME = re.compile(r"[^\w\-. /]+", re.ASCII)
_LOG = logging.getLogger(__name__)


class MlflowRun:
    """Takes over events of one attempt."""

    def __init__(self, context: RunContext) -> None:
        self._client = MlflowClient()
        self._scalars = Scalars()
        run = self._find(context) or self._create(context)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status=RUNNING)
        self._client.set_tag(self._run_id, "d2ft.attempt", str(context.attempt))

    def take(self, events: Sequence[Event]) -> None:
        scalars = [scalar for event in events for scalar in self._scalars.of(event)]
        metrics = [Metric(name, value, int(at * 1000), step) for name, value, step, at in scalars]
        for begin in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + MAX_METRICS])
        for event in events:
            self._take_one(event["type"], event["data"], int(event["at"] * 1000))

    def close(self) -> None:
        """Nothing is kept back."""

    def _take_one(self, type: str, data: Mapping[str, Any], at_ms: int) -> None:
        if type == "ledger":
            figures = [(f"ledger/{row['name']}/{side}", row[side]) for row in data["rows"] for side in _SIDES]
            metrics = [Metric(name, float(value), at_ms, 0) for name, value in figures if value is not None]
            self._client.log_batch(self._run_id, metrics=metrics)
        elif type == "artifact.ready":
            self._client.set_tag(self._run_id, f"{RESULT_TAG}.{_named(data['name'])}", data["path"])
            if data["bytes"] <= UPLOAD_BYTES:
                self._upload(data["path"])
        elif type == "outcome":
            if data.get("error"):
                self._client.set_tag(self._run_id, ERROR_TAG, json.dumps(data["error"])[:MAX_TEXT])
            if data["status"] in ENDS:
                self._client.set_terminated(self._run_id, ENDS[data["status"]], at_ms)
            else:
                self._client.update_run(self._run_id, status=PAUSED)

    def _upload(self, path: str) -> None:
        """Copy a small file there. Its store may be one that only the server reaches: then the tag has to do."""
        try:
            self._client.log_artifact(self._run_id, path)
        except Exception as error:
            _LOG.warning("MLflow does not take %s: %s", path, error)

    def _find(self, context: RunContext) -> Run | None:
        """The run of the job's earlier attempts."""
        if not re.fullmatch(r"[\w.\-]+", context.job_id, re.ASCII):
            return None
        wanted = f"tags.`{JOB_TAG}` = '{context.job_id}'"
        found = self._client.search_runs([self._experiment()], wanted, max_results=1)
        return found[0] if found else None

    def _create(self, context: RunContext) -> Run:
        spec = context.spec
        tags = {JOB_TAG: context.job_id, **{f"metadata.{_named(key)}": value for key, value in spec.metadata.items()}}
        run = self._client.create_run(self._experiment(), tags=tags, run_name=spec.name or context.job_id)
        told = spec.model_dump(mode="json", exclude={"metadata"})
        params = [Param(name, value[:MAX_TEXT]) for name, value in _flat(told)]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[begin : begin + MAX_PARAMS])
        return run

    def _experiment(self) -> str:
        name = os.environ.get(EXPERIMENT_NAME, EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))


_SIDES = ("predicted", "measured", "all_full")


def _flat(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("method.ratios.full", "3"): what is said of a job, one line each; what is None is left away."""
    for key, value in told.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value)


def _named(text: str) -> str:
    """A name that MLflow takes."""
    return _NO_NAME.sub("_", text)
