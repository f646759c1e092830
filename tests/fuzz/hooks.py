"""What the fuzzer must leave alone: its own key and user, without which all that follows would be a 401; and numbers
meant to be wrong where an address has texts, since there 5 and "5" are written alike, and no server can tell.
"""

from __future__ import annotations

import os

import schemathesis


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    own = {os.environ.get("D2FT_FUZZ_KEY_ID"), os.environ.get("D2FT_FUZZ_USER_ID")}
    given = case.path_parameters if isinstance(case.path_parameters, dict) else {}
    return not own & {str(value) for value in given.values()} and not _only_looks_wrong(case)


def _only_looks_wrong(case: schemathesis.Case) -> bool:
    """Whether a filter by metadata has a number or a truth value for a text: `metadata[KEY]=5`."""
    asked = case.query.get("metadata") if isinstance(case.query, dict) else None
    return isinstance(asked, dict) and any(isinstance(value, int | float) for value in asked.values())
