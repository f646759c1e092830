"""The states of a job and the moves between them.

    validating → queued → planning ⇄ starting → running → finalizing → succeeded
        └── (a run outside) ──────────►┘
                   │          └───────┴────────────┴──────────┴──► failed
                   │                               ├─► recovering ─► planning, starting, running; queued
                   └──► cancelled ◄── cancelling ◄─┴─► pausing ─► paused ─► queued

`planning` and `starting` follow each other in either order: a driver plans once its workers have measured
themselves, and may plan again after a restart. A run that the service has not ordered never waits: it is starting when
it is first heard of. A job is recovering while its driver brings its group up again, or for
the moment in which an attempt is lost and it is put into the queue for the next. Only succeeded, failed and cancelled
are final, and final is frozen: a retry of what failed or was cancelled is not a move of the run that ended but the
beginning of a new attempt.
"""

from __future__ import annotations

import enum

from scheduler.errors import SystemFault

JOB, SWEEP = "job", "sweep"  # the kinds of what has these states; a sweep's trials are jobs
SWEEP_PREFIX = "sweep_"  # of the ids of sweeps


class JobState(enum.StrEnum):
    """Where a job is on its way."""

    VALIDATING = "validating"
    QUEUED = "queued"
    PLANNING = "planning"
    STARTING = "starting"
    RUNNING = "running"
    FINALIZING = "finalizing"
    RECOVERING = "recovering"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return not TRANSITIONS[self]


_S = JobState
_WAY_OUT = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLING, _S.RECOVERING})
_WORK = frozenset({_S.PLANNING, _S.STARTING, _S.RUNNING, _S.FINALIZING})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.STARTING, _S.FAILED}),
    _S.QUEUED: frozenset({_S.PLANNING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.PLANNING: _WAY_OUT | {_S.STARTING, _S.RUNNING, _S.FINALIZING, _S.PAUSING},
    _S.STARTING: _WAY_OUT | {_S.PLANNING, _S.RUNNING, _S.FINALIZING, _S.PAUSING},
    _S.RUNNING: _WAY_OUT | {_S.FINALIZING, _S.PAUSING},
    _S.FINALIZING: _WAY_OUT,
    _S.RECOVERING: _WORK | {_S.QUEUED, _S.PAUSING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLING},
    # A run that had begun to finish when the pause reached it does finish.
    _S.PAUSING: frozenset({_S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLING}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    # A run that ended by itself before the stop reached it did end that way.
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.SUCCEEDED, _S.FAILED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

FINAL = frozenset(state for state, moves in TRANSITIONS.items() if not moves)
PHASES = _WORK | {_S.RECOVERING}  # what a driver may announce
RETRIED = frozenset({_S.FAILED, _S.CANCELLED})  # what a new attempt may be made of
PAUSABLE = frozenset({_S.PLANNING, _S.STARTING, _S.RUNNING, _S.RECOVERING})
HOLDING = frozenset(_S) - FINAL - {_S.VALIDATING, _S.QUEUED, _S.PAUSED}  # those that have, or had, an attempt open


class IllegalTransitionError(SystemFault):
    """A move that the table does not have."""


def may_move(old: JobState, new: JobState) -> bool:
    """Whether the table has the move."""
    return new in TRANSITIONS[old]


def check_move(old: JobState, new: JobState) -> None:
    """Raise IllegalTransitionError unless the table has the move, or it is a retry."""
    if not may_move(old, new) and not (old in RETRIED and new is JobState.QUEUED):
        raise IllegalTransitionError(f"a job cannot move from {old} to {new}", code="illegal_transition")
