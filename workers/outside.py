"""A run that no service has ordered: what it finds in its directory, and how a service comes to list it.

Where the environment has D2FT_URL and D2FT_API_KEY, the driver asks that service for a job that stands for the run, and
gets a token for its events. Training does not depend on it: a service that is away is said and done without. Only a key
that is refused ends the run before it has begun, since somebody meant it to be listed.

The key goes to that one address and nowhere else: it is taken out of the environment before anything is started, and
is in no file, log or message. The standard library alone speaks to the service.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from scheduler.errors import D2ftError, UserError
from workers import control
from workers.command import IN_RAY_JOB
from workers.contract import JobSpec, RunContext
from workers.events import EVENTS_FILE, read_events
from workers.manifest import fingerprint, names, read_manifest
from workers.poster import opener

URL, KEY, RAY = "D2FT_URL", "D2FT_API_KEY", "RAY_ADDRESS"
RUNS = "/v1/runs"
LOCK_FILE = "run.lock"
TIMEOUT_S = 10.0
TRIES = 2
REFUSED = frozenset({401, 403})
Say = Callable[[str], None]
_LOG = logging.getLogger(__name__)


def plain_context(spec: JobSpec, run_dir: Path) -> RunContext:
    """A run that no service has ordered: everything of it is in one directory."""
    storage = str(run_dir / "ray")
    return RunContext(job_id=run_dir.name, spec=spec, run_dir=str(run_dir), storage_path=storage, outside=True)


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """No other run begins in the directory during the block; the lock ends with the process, however that ends.

    Raises UserError (out) "run_dir_busy" where one is at work there. On a shared disk machines see each other's locks
    where it has them (NFS 4 does).
    """
    with (run_dir / LOCK_FILE).open("a") as lock:
        _take(lock, run_dir)
        yield


def _take(lock: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"Another run is at work in {run_dir}."
        remedy = "Wait for its end, or give this one a directory of its own with --out."
        raise UserError(message, code="run_dir_busy", param="out", remedy=remedy) from None
    except OSError as error:
        _LOG.warning("%s knows of no locks (%s): nothing keeps two runs in it apart", run_dir, error)


def begun_anew(context: RunContext, say: Say) -> RunContext:
    """The run with its directory to itself: what an earlier one has told there is set aside, and no wish of then holds.

    One that did not succeed left checkpoints: this run goes on from them, if it is to train alike.
    """
    run_dir = Path(context.run_dir)
    told = run_dir / EVENTS_FILE
    control.take_back(run_dir)
    if not told.exists():
        return context
    status = _outcome(told)
    number = next(n for n in range(1, 1_000_000) if not (run_dir / f"events-{n}.jsonl").exists())
    told.rename(run_dir / f"events-{number}.jsonl")
    left = None if status == "succeeded" else _left(context)
    if left is None:
        return context
    say(f"d2ft: goes on from the checkpoints of the run before in {run_dir}")
    return context.model_copy(update={"resume_from": str(left)})


def listed(context: RunContext, url: str | None, key: str | None, say: Say, environ: Mapping[str, str]) -> RunContext:
    """The run as a job of the service at `url`; as it is where no service is named, or it cannot be had.

    Raises UserError where the service refuses the key, or what is given is no address or no key.
    """
    if context.post_url is not None or not url or not key:
        return context
    url = _checked(url, key)
    places = ("submission_id", submission_id(environ)), ("run_dir", context.run_dir), ("ray_address", environ.get(RAY))
    where = {name: told for name, told in places if told}
    body = {"spec": context.spec.model_dump(mode="json"), "where": where}
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": str(uuid.uuid4())}
    try:
        answer = _asked(f"{url}{RUNS}", body, headers)
        found = {"job_id": str(answer["job_id"]), "attempt": int(answer["attempt"]), "post_token": str(answer["token"])}
    except urllib.error.HTTPError as error:
        with error:
            said = _said(error)
        if error.code in REFUSED:
            message = f"The service at {url} refuses the key of {KEY}: {said}"
            remedy = f"Give a key with the scope 'write', or unset {URL} to train without a list."
            raise UserError(message, code="key_refused", param=KEY, remedy=remedy) from None
        say(f"d2ft: {url} does not list this run, which goes on without: status {error.code}, {said}")
        return context
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        say(f"d2ft: {url} cannot be reached, so this run is not listed, and goes on without: {_words(error)}")
        return context
    say(f"d2ft: this run is job {found['job_id']} at {url}")
    return context.model_copy(update={**found, "post_url": f"{url}{RUNS}/events"})


def give_up(url: str, token: str, attempt: int, error: D2ftError) -> None:
    """Say for a run that will never speak that it has failed. Raises OSError, http.client.HTTPException."""
    told = error.to_dict()
    outcome = {"status": "failed", "error": told}
    event = {"seq": 1, "type": "outcome", "level": "error", "message": told["message"], "data": outcome}
    _asked(url, {"attempt": attempt, "events": [event]}, {"Authorization": f"Bearer {token}"})


def submission_id(environ: Mapping[str, str]) -> str | None:
    """What Ray calls the job whose entry point this process is."""
    try:
        found = json.loads(environ.get(IN_RAY_JOB, "null"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def shown_by_ray(environ: Mapping[str, str]) -> bool:
    """Whether the key came by way of the job's runtime environment, which Ray shows and gives to all workers."""
    return f'"{KEY}"' in environ.get(IN_RAY_JOB, "")


def _checked(url: str, key: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{URL} is '{url}', which is no address like http://host:7421", code="bad_url", param=URL)
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"What {KEY} holds is no key: it has other signs than a key has.", code="bad_key", param=KEY)
    return url.rstrip("/")


def _asked(url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """The answer to a POST, which is sent again once where none came."""
    content = json.dumps(body, separators=(",", ":")).encode()
    to_service = opener()
    for tried in range(1, TRIES + 1):
        request = urllib.request.Request(url, content, {**headers, "Content-Type": "application/json"}, method="POST")
        try:
            with to_service.open(request, timeout=TIMEOUT_S) as response:
                answer: dict[str, Any] = json.loads(response.read())
                return answer
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException):
            if tried == TRIES:
                raise
    raise AssertionError("unreachable")


def _said(error: urllib.error.HTTPError) -> str:
    """What a problem document says; it is another's text, and may be anything."""
    try:
        detail = json.loads(error.read(100_000))["detail"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        detail = error.reason
    return "".join(sign if sign.isprintable() else " " for sign in str(detail))[:500]


def _words(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


def _outcome(told: Path) -> str | None:
    """How the run of this event file ended, as it says."""
    status = None
    for _, event in read_events(told, 0):
        if event.get("type") == "outcome":
            status = (event.get("data") or {}).get("status")
    return status


def _left(context: RunContext) -> Path | None:
    """The newest directory of checkpoints under the run's own, if what they were taken of trains like this run."""
    vaults = Path(context.vault_dir).parent
    found = [vault for vault in vaults.iterdir() if names(vault)] if vaults.is_dir() else []
    for vault in sorted(found, key=os.path.getmtime, reverse=True):
        if _fingerprint(vault) == fingerprint(context.spec):
            return vault
    return None


def _fingerprint(vault: Path) -> str | None:
    """Of what the newest checkpoint that can be read was taken."""
    for name in names(vault):
        with suppress(OSError, ValueError):
            return read_manifest(vault / name)[0].fingerprint
    return None
