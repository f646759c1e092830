"""What jobs have left as files: looked up in the recorded list, never made into a path by a user's word."""

from __future__ import annotations

from pathlib import Path

from scheduler.errors import UserError
from service.errors import ConflictError, InvalidRequestError, Issue, NotFoundError
from service.lifecycle import JobState
from service.settings import Settings
from service.store import Caller, Store
from service.store.records import StoredArtifact
from workers.contract import JobSpec
from workers.sources.address import check_inside

SCHEME = "job:"
WEIGHTS = "model.safetensors"


def artifact_file(
    store: Store, settings: Settings, job_id: str, name: str, *, owner: str | None
) -> tuple[StoredArtifact, Path]:
    """A recorded artifact and where it lies, which is in the job's directory. Raises NotFoundError."""
    store.outside.check_here(job_id, "files", owner=owner)
    artifact = store.records.artifact(job_id, name, owner=owner)
    path = _inside(settings, job_id, artifact)
    if not path.is_file():
        raise _gone(artifact.name)
    return artifact, path


def result_folder(store: Store, settings: Settings, job_id: str, *, owner: str | None) -> Path:
    """The result of a job that has succeeded. Raises NotFoundError, ConflictError for a job in another state."""
    status = store.jobs.get(job_id, owner=owner).status
    if status != JobState.SUCCEEDED:
        message = f"Job {job_id} is {status}: only one that has succeeded can be tried."
        raise ConflictError(message, code="not_succeeded", remedy=_remedy(status))
    return artifact_file(store, settings, job_id, WEIGHTS, owner=owner)[1].parent


def with_weights(spec: JobSpec, store: Store, settings: Settings, caller: Caller) -> JobSpec:
    """The job with the file in place of weights "job:ID": the result of one of the caller's own that has succeeded.

    Whether the file is still there is not looked at here. Raises InvalidRequestError about the field `weights`.
    """
    if spec.weights is None or not spec.weights.startswith(SCHEME):
        return spec
    job_id = spec.weights.removeprefix(SCHEME)
    try:
        status = store.jobs.get(job_id, owner=caller.user_id).status
        if status != JobState.SUCCEEDED:
            message = f"Job {job_id} is {status}, and only the result of one that has succeeded can be weights."
            raise _refused(f"{message} {_remedy(status)}", "weights_job_not_succeeded")
        store.outside.check_here(job_id, "files", owner=caller.user_id)
        path = _inside(settings, job_id, store.records.artifact(job_id, WEIGHTS, owner=caller.user_id))
    except NotFoundError as error:
        message = f"You have no job '{job_id[:60]}' with a result. Take the id of one of yours: GET /v1/jobs."
        if error.code == "lies_outside":
            message = f"{error.message} Copy the weights to a folder of this service, or take another job."
        elif error.code != "job_not_found":
            message = f"Job {job_id} left no {WEIGHTS}. Take another job, or a file."
        raise _refused(message, "weights_job_not_found") from None
    return spec.model_copy(update={"weights": str(path)})


def _inside(settings: Settings, job_id: str, artifact: StoredArtifact) -> Path:
    """The path, which a run has told: it has to lie where that job's runs write."""
    home = (settings.home / "jobs" / job_id).resolve()
    try:
        return check_inside(home / artifact.path, [home])
    except UserError:
        raise _gone(artifact.name) from None


def _gone(name: str) -> NotFoundError:
    return NotFoundError(f"The file of artifact '{name}' is gone.", code="artifact_gone", param="name")


def _refused(message: str, code: str) -> UserError:
    return InvalidRequestError([Issue("weights", message, code)])


def _remedy(status: str) -> str:
    if not JobState(status).is_final:
        return "Wait until it has ended."
    return "Retry it first: POST /v1/jobs/{id}/retry."
