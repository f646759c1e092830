"""timm and torch's optimisers without torch's compiler: no worker compiles, and loading it takes two seconds.

torchvision, timm and the optimisers only ask the compiler to leave functions of theirs alone, which a stand-in answers
as well. It is there while they load and when an optimiser is first made, since torch keeps the answers; whoever
compiles later gets the compiler itself. An optimiser's step asks anew every time, hence `update`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_COMPILER, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def load() -> None:
    """Load timm, and have torch's optimisers ready; nothing where the compiler is there already."""
    if _COMPILER in sys.modules:
        return
    with _stand_in():
        importlib.import_module("timm.models.vision_transformer")
        optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
        optimiser.zero_grad()
        optimiser.load_state_dict(optimiser.state_dict())


@torch.no_grad()
def update(optimiser: torch.optim.AdamW) -> None:
    """AdamW's own step, without what is wrapped around it for compiling and differentiating it."""
    inspect.unwrap(torch.optim.AdamW.step)(optimiser)


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    compiler, utils = ModuleType(_COMPILER), ModuleType(_UTILS)
    compiler.disable = _left_alone  # type: ignore[attr-defined]
    utils.is_compile_supported = lambda device_type: False  # type: ignore[attr-defined]
    sys.modules[_COMPILER], sys.modules[_UTILS] = compiler, utils
    try:
        yield
    finally:
        del sys.modules[_COMPILER], sys.modules[_UTILS]
        vars(torch).pop("_dynamo", None)


def _left_alone(fn: Any = None, *_: Any, **__: Any) -> Any:
    """What the compiler leaves alone is the function itself, as a call or as a decorator with arguments."""
    return _left_alone if fn is None else fn
