"""What the service keeps under its home: not a user's by its path, even where `D2FT_HOME` is a root.

    home/jobs/ID, storage/checkpoints/ID    what runs of a job have left: for the owner of the job alone
    home/cache, home/logs, home/ray, home/storage        nobody's

Whose a job is, is known by its id, so a path into it counts like `weights: "job:ID"`. All else under home is as free as
under any root.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scheduler.errors import UserError
from service.errors import Issue, NotFoundError
from service.settings import Settings
from service.store import Caller, Store
from workers.contract import HUB, JobSpec
from workers.sources.address import parse_address

CODE = "kept_by_service"
REMEDY = "For the result of an own job give weights as 'job:ID'; other files belong under another directory."


@dataclass(frozen=True)
class Kept:
    """Judges the paths that one caller gives."""

    settings: Settings
    store: Store
    caller: Caller

    def check(self, spec: JobSpec) -> list[Issue]:
        """Weights and dataset of a job, whose names have been resolved."""
        issues = []
        if spec.weights is not None and not spec.weights.startswith(HUB) and self._holds(spec.weights):
            issues.append(Issue("weights", f"{_words(spec.weights)} {REMEDY}", CODE))
        if self._holds_dataset(spec.dataset):
            issues.append(Issue("dataset", f"{_words(spec.dataset)} {REMEDY}", CODE))
        return issues

    def check_dataset(self, uri: str) -> None:
        """Raise UserError about the field `uri` for one that is to be registered."""
        if self._holds_dataset(uri):
            raise UserError(_words(uri), code=CODE, param="uri", remedy=REMEDY)

    def _holds_dataset(self, uri: str) -> bool:
        try:
            address = parse_address(uri)
        except UserError:
            return False  # "digits", or one that others refuse
        return address.store is None and self._holds(address.path)

    def _holds(self, given: str) -> bool:
        try:
            path = Path(given).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            return False  # no path: others refuse it
        settings = self.settings
        for owned in (settings.home / "jobs", settings.storage / "checkpoints"):
            if path.is_relative_to(owned.resolve()):
                return not self._owns(path.relative_to(owned.resolve()).parts)
        kept = (settings.home / name for name in ("cache", "logs", "ray", "storage"))
        return any(path.is_relative_to(directory.resolve()) for directory in kept)

    def _owns(self, parts: tuple[str, ...]) -> bool:
        try:
            self.store.jobs.get(parts[0] if parts else "", owner=self.caller.user_id)
        except NotFoundError:
            return False
        return True


def _words(given: str) -> str:
    return f"'{given[:200]}' lies where the service keeps what jobs leave."
