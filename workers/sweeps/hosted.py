"""Children that are jobs of the service, asked for over HTTP with the token of the sweep's own attempt.

    POST {base}/trials              a job for this key and setting; the same key gives the same job again
    GET  {base}/trials              all of this sweep
    POST {base}/trials/{key}/cancel

A service that is away for a while is asked again for as long as the sweep lives: its jobs go on without it. Only an
answer that says no is final.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.errors import SystemFault, UserError
from workers.contract import JobSpec
from workers.poster import OWNED_NO_MORE, REQUEST_S, opener
from workers.sweeps.children import Child

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0
BUSY = frozenset({408, 425, 429})  # not now, as any status from 500 on
_LOG = logging.getLogger(__name__)


class Hosted:
    """`base_url` is the service's `…/v1/runs`."""

    def __init__(self, base_url: str, token: str | None) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._http = opener()

    def start(self, key: str, setting: Mapping[str, Any], spec: JobSpec, baseline: str | None = None) -> Child:
        told = spec.model_dump(mode="json", exclude_defaults=True)
        body = {"key": key, "setting": dict(setting), "spec": told, "baseline": baseline}
        return Child.from_dict(self._ask("POST", "trials", body))

    def look(self, key: str) -> Child:
        for child in self.all():
            if child.key == key:
                return child
        raise SystemFault(f"The service does not know the trial '{key}' any more.", code="trial_lost")

    def cancel(self, key: str) -> None:
        if any(child.key == key and not child.is_over for child in self.all()):
            self._ask("POST", f"trials/{key}/cancel", {})

    def all(self) -> Sequence[Child]:
        return [Child.from_dict(told) for told in self._ask("GET", "trials")["data"]]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer, whenever it comes. Raises UserError for what is refused, SystemFault if nothing is ours here."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return self._once(method, path, body)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in BUSY and error.code < 500:
                        raise _refused(error) from None
                why = f"status {error.code}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
            if wait_s == FIRST_WAIT_S:
                _LOG.warning("the service cannot be asked for trials, trying again: %s", why)
            time.sleep(wait_s)
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base_url}/{path}", data, self._headers, method=method)
        with self._http.open(request, timeout=REQUEST_S) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
        return answer


def _refused(error: urllib.error.HTTPError) -> UserError | SystemFault:
    """What the service says of a request that it does not take (RFC 9457)."""
    try:
        told = json.loads(error.read())
        said = str(told.get("detail") or told.get("title") or "")
        code, param = told.get("code"), told.get("param")
    except (OSError, ValueError, AttributeError):
        said, code, param = "", None, None
    if error.code in OWNED_NO_MORE:
        return SystemFault(f"This attempt does not own its sweep any more: {said or error.code}", code="superseded")
    return UserError(said or f"The service answers {error.code}.", code=code or "trial_refused", param=param)
