"""Jobs of tests are small, and what they learn of their device is a guess: the figures of real ones take seconds."""

from __future__ import annotations

import pytest

from workers import profiling


@pytest.fixture(autouse=True)
def quick_profile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is timed for two runs thrice; in the tests of the profile itself for as long as in any job."""
    if request.path.stem != "test_profiling":
        monkeypatch.setattr(profiling, "STRETCH_S", 0.0)
