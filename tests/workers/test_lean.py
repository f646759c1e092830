"""A worker's process starts without torch's compiler, and one that wants it has it."""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = """
import sys
from workers import early, lean
early.load()
assert "torch._dynamo" not in sys.modules, "loaded at the start"
import torch
from workers.model import build_model
from workers.contract import JobSpec
model = build_model(JobSpec(), num_classes=10)
adam = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.zeros(1, 1, 28, 28)).sum().backward()
lean.update(adam)
adam.zero_grad()
assert "torch._dynamo" not in sys.modules, "loaded by the work"
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2] and "torch._dynamo" in sys.modules
early.load()
"""


def test_no_compiler_at_the_start_and_a_real_one_for_who_compiles() -> None:
    env = {**os.environ, "D2FT_LOAD_EARLY": "workers.rank"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
