"""How a driver is started: the command, its environment, and the context that it reads.

A job's driver holds the job's workers. A sweep's holds none: it asks the service for jobs, at `/v1/runs/trials`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.lifecycle import SWEEP
from service.processes import package_env
from service.settings import Settings
from service.store import Attempt
from workers.contract import RunContext
from workers.sources.address import HOME_VARIABLE
from workers.sweeps.contract import SweepContext

STOP_WAIT_S = 15


class Launch:
    """What the settings say about drivers; `have` are the resources of the cluster, all of it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def entrypoint(self, attempt: Attempt, context: Path) -> str:
        module = self._settings.sweep_module if attempt.kind == SWEEP else self._settings.driver_module
        return shlex.join([self._settings.driver_python, "-m", module, "--context", str(context)])

    def context(self, attempt: Attempt, have: Mapping[str, float], *, resumes: bool) -> RunContext:
        """Of a job; one that `resumes` goes on from its newest checkpoint."""
        return RunContext(
            job_id=attempt.job_id,
            **self._of(attempt, have),
            spec=attempt.spec,
            storage_path=str(self._settings.storage),
            resume_from=str(self._settings.checkpoints_dir(attempt.job_id)) if resumes else None,
            post_url=f"{self._settings.runs_url}/events",
        )

    def sweep_context(self, attempt: Attempt, have: Mapping[str, float]) -> SweepContext:
        """Of a sweep; its storage is that of all its attempts, so that a search goes on where it was."""
        return SweepContext(
            sweep_id=attempt.job_id,
            **self._of(attempt, have),
            spec=attempt.sweep_spec,
            storage_path=str(self._settings.sweep_dir(attempt.job_id)),
            post_url=self._settings.runs_url,
        )

    def _of(self, attempt: Attempt, have: Mapping[str, float]) -> dict[str, Any]:
        """What a context says of any attempt."""
        return {
            "attempt": attempt.n,
            "run_dir": str(self._settings.attempt_dir(attempt.job_id, attempt.n)),
            "resources_per_worker": self.per_worker(have),
            "use_gpu": self._use_gpu(have),
            "start_timeout_s": self._settings.start_timeout_s,
            "post_token": attempt.token,
        }

    def per_worker(self, have: Mapping[str, float]) -> dict[str, float]:
        """What Ray books for each worker."""
        default = {"CPU": 0.5, "GPU": 1.0} if self._use_gpu(have) else {"CPU": 0.5}
        return self._settings.resources_per_worker or default

    def environment(self) -> dict[str, str]:
        """The driver's environment. The poll is short because Ray Train paces every report by it."""
        return {
            "RAY_JOB_STOP_SIGNAL": "SIGTERM",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it costs a process; a lost worker is seen without it
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{self._settings.start_timeout_s:g}",
            "OMP_NUM_THREADS": "1",
            HOME_VARIABLE: str(self._settings.home),
            "HF_HUB_OFFLINE": "0" if self._settings.hub_downloads else "1",
            **({"MLFLOW_TRACKING_URI": uri} if (uri := self._settings.mlflow_tracking_uri) else {}),
            **package_env(),
        }

    def _use_gpu(self, have: Mapping[str, float]) -> bool:
        told = self._settings.use_gpu
        return have.get("GPU", 0.0) > 0 if told is None else told


def too_small(have: Mapping[str, float], per_worker: Mapping[str, float], workers: int) -> str | None:
    """Why a cluster that has so much in all cannot hold so many workers, or None; one that does not say can."""
    for name, amount in per_worker.items():
        need, there = amount * workers, have.get(name, 0.0)
        if have and need > there + 1e-9:
            return f"{workers} workers need {need:g} {name}, and the whole cluster has {there:g}; waits for more nodes."
    return None
