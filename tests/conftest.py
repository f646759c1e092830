"""The suite on two cores: files go to two processes, but all that start a Ray of their own to one of them."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A machine that is busy is slow, and no test here is about how fast one example is.
settings.register_profile("d2ft", deadline=None)
settings.load_profile("d2ft")

# These time what they start, or start several processes: side by side they would slow each other down.
_HEAVY = (
    "tests/e2e/",
    "tests/chaos/",
    "tests/scheduler/test_actor.py",
    "tests/service/test_outages.py",
    "tests/ui/test_journey.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("heavy" if file.startswith(_HEAVY) else file))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A report crosses from one process to the other as UTF-8, and what a test logged need not be that."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report
