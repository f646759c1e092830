"""The table of moves, walked at random."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.lifecycle import FINAL, RETRIED, TRANSITIONS, IllegalTransitionError, JobState, check_move, may_move

states = st.sampled_from(list(JobState))


def test_only_the_three_ends_are_final() -> None:
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == FINAL


def test_every_state_has_a_row_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(JobState)
    reached = {JobState.VALIDATING}
    while more := {new for old in reached for new in TRANSITIONS[old]} - reached:
        reached |= more
    assert reached == set(JobState)


def test_an_end_can_be_reached_from_everywhere() -> None:
    for state in JobState:
        seen, todo = {state}, [state]
        while todo:
            for new in TRANSITIONS[todo.pop()] - seen:
                seen.add(new)
                todo.append(new)
        assert seen & FINAL


@given(states, states)
def test_a_move_that_the_table_lacks_is_refused(old: JobState, new: JobState) -> None:
    is_retry = old in RETRIED and new is JobState.QUEUED
    if may_move(old, new) or is_retry:
        check_move(old, new)
    else:
        with pytest.raises(IllegalTransitionError):
            check_move(old, new)


@given(states)
def test_final_is_frozen(new: JobState) -> None:
    assert not any(may_move(end, new) for end in FINAL)
