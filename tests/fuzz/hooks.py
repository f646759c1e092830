"""What the fuzzer must leave alone: its own key and user. Without them all that follows would be a 401."""

from __future__ import annotations

import os

import schemathesis


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    own = {os.environ.get("D2FT_FUZZ_KEY_ID"), os.environ.get("D2FT_FUZZ_USER_ID")}
    given = case.path_parameters if isinstance(case.path_parameters, dict) else {}
    return not own & {str(value) for value in given.values()}
