"""Step programs: what one worker does in one step, as a list of short instructions.

An instruction prints as one line and parses back equal; m2 is micro-batch 2, b03.attn a sub-layer, w1 a worker:

    embed m2 keep                              images → x; keep what `unembed` needs
    fwd b03.attn m2 full=1,4 only=5 bias       run three heads on x, output bias b included; keep activations of 1 and 4
    send part b03.attn m2 >w1                  ship this worker's partial sum to worker 1
    recv part b03.attn m2 <w1                  wait for worker 1's
    sum x b03.attn m2 of=0,1 lead              x += γ·Σ parts; keep the sum for γ's gradient
    send x b04.attn m2 >w0                     ship x, as sub-layer b04.attn will read it
    classify m2 grad                           loss, classifier gradients, and the gradient g at the last block's output
    bwd b03.attn m2 full=1,4 lead              γ·g through the kept heads; lead: gradients of γ and b too
    send gpart b03.attn m2 >w1                 ship this worker's part of the gradient
    sum g b03.attn m2 of=0,1                   g += Σ gparts
    send g b02.mlp m2 >w1                      ship g, as the backward of b02.mlp will read it
    unembed m2                                 g → gradients of the embedding
    free x m2                                  x of micro-batch 2 is read no more here
    send gradpart >w1 units=embed,b00          ship this worker's gradients of shared trunk parameters
    sum grads of=0,1 units=embed,b00           add them up in rank order
    send tally >w1                             gradient norm², loss, correct answers, loss of every image
    step                                       clip, then AdamW on every parameter that has a gradient

A skipped head (p_s) leaves no line: not running costs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

EMBED_UNIT = -1

COMPUTE_KINDS = ("embed", "fwd", "sum", "classify", "bwd", "unembed", "free", "step")
KINDS = (*COMPUTE_KINDS, "send", "recv")
CARGO = ("x", "part", "g", "gpart", "gradpart", "grads", "tally")
FLAGS = ("keep", "lead", "floor", "grad", "bias")

MessageKey = tuple[str, int, str, int, int, int]


class Instruction(NamedTuple):
    """One line. Fields that a kind does not use keep their defaults. (A tuple: a step may have 50,000 of them.)

    `cargo` what is sent, received, summed or freed · (`block`, `part`) the sub-layer, or block -1 with part "embed" or
    "classify" · `mb` the micro-batch · `peer` the other end · `full`, `only` heads run FULL, FORWARD · `of` ranks whose
    parts are added · `units` trunk units, -1 the embedding · `fill` skipped heads whose mean is added · `running` how
    many heads of the block run, when they are scaled up (0: not) · flags: keep, lead, floor (the gradient goes no
    lower), grad, bias (this part includes the output bias).
    """

    kind: str
    cargo: str = ""
    block: int = -1
    part: str = ""
    mb: int = -1
    peer: int = -1
    full: tuple[int, ...] = ()
    only: tuple[int, ...] = ()
    of: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    fill: tuple[int, ...] = ()
    running: int = 0
    keep: bool = False
    lead: bool = False
    floor: bool = False
    grad: bool = False
    bias: bool = False

    def __str__(self) -> str:
        words = [self.kind, self.cargo, self._place(), f"m{self.mb}" if self.mb >= 0 else "", self._peer()]
        words += [f"{key}={_join(getattr(self, key))}" for key in ("full", "only", "of") if getattr(self, key)]
        if self.units:
            words.append("units=" + ",".join("embed" if u == EMBED_UNIT else f"b{u:02d}" for u in self.units))
        if self.fill:
            words.append(f"fill={_join(self.fill)}")
        if self.running:
            words.append(f"running={self.running}")
        words += [flag for flag in FLAGS if getattr(self, flag)]
        return " ".join(filter(None, words))

    def key(self, worker: int) -> MessageKey:
        """Names the message that a send or recv of `worker` is about; unique within a step."""
        src, dst = (worker, self.peer) if self.kind == "send" else (self.peer, worker)
        if self.units:
            return (self.cargo, self.units[0], "units", len(self.units), src, dst)
        return (self.cargo, self.block, self.part, self.mb, src, dst)

    def _place(self) -> str:
        return f"b{self.block:02d}.{self.part}" if self.block >= 0 else self.part

    def _peer(self) -> str:
        if self.peer < 0:
            return ""
        return f">w{self.peer}" if self.kind == "send" else f"<w{self.peer}"


_PLACE = re.compile(r"b(\d+)\.(attn|mlp)")
_MICRO_BATCH = re.compile(r"m(\d+)")
_PEER = re.compile(r"[<>]w(\d+)")


def parse_instruction(line: str) -> Instruction:
    """Inverse of `str(instruction)`; raises ValueError on a word it does not know."""
    kind, *words = line.split()
    if kind not in KINDS:
        raise ValueError(f"unknown instruction '{kind}' in: {line}")
    fields: dict[str, object] = {}
    for word in words:
        fields.update(_parse_word(word, line))
    return Instruction(kind, **fields)  # type: ignore[arg-type]


def _parse_word(word: str, line: str) -> dict[str, object]:
    if word in CARGO:
        return {"cargo": word}
    if word in FLAGS:
        return {word: True}
    if word in ("embed", "classify"):
        return {"part": word}
    if match := _PLACE.fullmatch(word):
        return {"block": int(match[1]), "part": match[2]}
    if match := _MICRO_BATCH.fullmatch(word):
        return {"mb": int(match[1])}
    if match := _PEER.fullmatch(word):
        return {"peer": int(match[1])}
    name, _, value = word.partition("=")
    if name == "running":
        return {name: int(value)}
    if name == "units":
        return {name: tuple(EMBED_UNIT if u == "embed" else int(u[1:]) for u in value.split(","))}
    if name in ("full", "only", "of", "fill"):
        return {name: tuple(int(v) for v in value.split(","))}
    raise ValueError(f"unknown word '{word}' in: {line}")


@dataclass(frozen=True)
class Program:
    """One worker's instructions for one step."""

    worker: int
    num_workers: int
    num_micro_batches: int
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        header = f"program w{self.worker} of {self.num_workers} over m{self.num_micro_batches}"
        return "\n".join([header, *map(str, self.instructions)])

    @classmethod
    def parse(cls, text: str) -> Program:
        header, *lines = text.strip().splitlines()
        match = re.fullmatch(r"program w(\d+) of (\d+) over m(\d+)", header)
        if match is None:
            raise ValueError(f"not a program header: {header}")
        worker, num_workers, num_micro_batches = map(int, match.groups())
        return cls(worker, num_workers, num_micro_batches, tuple(map(parse_instruction, lines)))

    @cached_property
    def image_micro_batches(self) -> tuple[int, ...]:
        """The micro-batches whose images this worker reads."""
        return tuple(sorted({i.mb for i in self.instructions if i.kind == "embed"}))

    @cached_property
    def label_micro_batches(self) -> tuple[int, ...]:
        """The micro-batches whose labels this worker reads."""
        return tuple(sorted({i.mb for i in self.instructions if i.kind == "classify"}))

    def receives(self) -> list[Instruction]:
        return [i for i in self.instructions if i.kind == "recv"]

    def sends(self) -> list[Instruction]:
        return [i for i in self.instructions if i.kind == "send"]


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
