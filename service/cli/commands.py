"""All commands together. Each reads its flags, asks the client or the host, and says what came of it."""

from __future__ import annotations

from service.cli import access, data, doctor, jobs, machine, plans, records, sweeps, webhooks
from service.cli.frame import app

__all__ = ["access", "app", "data", "doctor", "jobs", "machine", "main", "plans", "records", "sweeps", "webhooks"]


def main() -> None:
    """Entry of the `d2ft` script."""
    app()
