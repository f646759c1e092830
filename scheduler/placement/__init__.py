"""Placement: which worker owns which head and, with a static part, which heads are FULL.

instance    costs of rows (the heads of one block by worker) and of chains (teams in block order); the judge
chains      which chains a kind of placement may use, with a quick bound each
patterns    rows of a team: all of them, or those that a linear program asks for
relaxation  the linear program over rows: a bound over all rows, and the rows that matter
worth       how many FULL heads a block may have
model       CP-SAT over the rows of a chain: whole numbers
search      from chains to candidates
heads       which heads go to whom; few moves
memory      what a placement needs; the error when nothing fits
ideal       the step if work were divisible and wires free
"""

from scheduler.placement.heads import assign_heads
from scheduler.placement.ideal import ideal_us
from scheduler.placement.memory import counts_of, memory_bytes_of, rows_of
from scheduler.placement.model import PROVED_WITHIN, Limits
from scheduler.placement.search import Candidate, propose

__all__ = [
    "PROVED_WITHIN",
    "Candidate",
    "Limits",
    "assign_heads",
    "counts_of",
    "ideal_us",
    "memory_bytes_of",
    "propose",
    "rows_of",
]
