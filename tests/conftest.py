"""The suite on two cores: files go to two processes, but all that start a Ray of their own to one of them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

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


class ByFile(LoadScopeScheduling):
    """A file goes to a process whole, and the heavy ones all to the same."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return "heavy" if file.startswith(_HEAVY) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # xdist's own groups, by a mark, go by a name of pytest's that pytest 9.2 has no more, and are silently none.
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A report crosses from one process to the other as UTF-8, and what a test logged need not be that."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report
