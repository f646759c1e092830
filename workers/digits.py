"""scikit-learn's 1,797 hand-written digits, read from its file: importing it takes every worker a second.

Which of them are for training is a list of our own (`bundled/digits_split.json`), about 80 of each digit, as
scikit-learn's stratified split drew them.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scheduler.errors import SystemFault

SPLIT = Path(__file__).parent / "bundled" / "digits_split.json"
SIDE = 8


def load_digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(pixels from 0 to 16 as B, 8, 8, labels as B)."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise SystemFault("scikit-learn, which brings the digits, is not installed.", code="digits_missing")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64)


def split_digits(count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(training, test): places of the digits among all `count`, in the order in which they were drawn."""
    drawn = json.loads(SPLIT.read_text())
    train, test = np.array(drawn["train"], dtype=np.int64), np.array(drawn["test"], dtype=np.int64)
    assert len(train) + len(test) == count
    return train, test
