"""Checkpoints that were damaged, and disks that run full while one is written.

    python -m tests.chaos.damage

A directory holds two checkpoints; the newer one is damaged in every way there is, and two workers look for one to go on
from. What they find must be the older, or nothing: a newer one that is found is a silent load. Then checkpoints are
written to a file system with room for a part of one only; whatever is listed afterwards must verify. Last, what four
workers have saved is read by one, two and three, under placements of their own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scheduler.domain import Placement
from scheduler.errors import SystemFault
from tests.bench.report import publish, target
from tests.workers.engine import costs_for, on_threads, tiny_vit
from tests.workers.test_checkpoint import GROUP, PLAN, found_in, manifest_of, saved_at, trained
from tests.workers.test_forward import Images
from workers.checkpoint import Vault, newest_whole, save
from workers.executor import Executor
from workers.forward import ForwardPasses
from workers.manifest import names, verify
from workers.partition import cut_of
from workers.shard import Shard
from workers.transport import Transport

FLIPS, CUTS, DISKS = 60, 20, 24
OLDER, NEWER = 7, 42
EQUAL = 1e-12  # of losses in float64, whose sums have another order
Row = dict[str, Any]


def main() -> None:
    rows, targets = rows_and_targets()
    publish("chaos_damage", rows, targets, f"{FLIPS} flips, {CUTS} cuts")


def rows_and_targets(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Everything, a row for each kind of damage."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="d2ft-damage-") as home:
        whole = Path(home) / "whole"
        for step in (OLDER, NEWER):
            saved_at(whole, step)
        files = sorted(path.name for path in (whole / f"step-{NEWER:08d}").iterdir())
        kinds: dict[str, list[Callable[[Path], None]]] = {
            "bit flipped": [_flip(rng, files) for _ in range(FLIPS)],
            "cut short": [_cut(rng, files) for _ in range(CUTS)],
            "deleted": [_delete(name) for name in files],
            "two exchanged": [_exchange(a, b) for a, b in itertools.combinations(files, 2)],
            "of another checkpoint": [_foreign(name) for name in files],
        }
        rows = [_tried(whole, Path(home) / "hurt", kind, acts) for kind, acts in kinds.items()]
        restored = _restored(Path(home) / "four")
        rows.append(_full_disks(Path(home), sum(p.stat().st_size for p in (whole / f"step-{NEWER:08d}").iterdir())))
    return [*rows, *restored], [
        target("saved by 4, read by 1, 2, 3: tests that differ", sum(not row["equal"] for row in restored), "==", 0),
        target("damaged checkpoints that load silently", sum(row["silent"] for row in rows), "==", 0),
        target("older checkpoints lost by it", sum(row["lost"] for row in rows), "==", 0),
        target("listed checkpoints that do not verify after a full disk", rows[-1]["silent"], "==", 0),
    ]


def _tried(whole: Path, hurt: Path, kind: str, acts: list[Callable[[Path], None]]) -> Row:
    silent = lost = 0
    for act in acts:
        shutil.copytree(whole, hurt)
        act(hurt / f"step-{NEWER:08d}")
        found, _ = found_in(hurt, size=2)
        silent += found is not None and found.manifest.step == NEWER
        lost += found is None
        shutil.rmtree(hurt)
    return {"damage": kind, "tried": len(acts), "silent": silent, "lost": lost}


def _restored(directory: Path) -> list[Row]:
    """Accuracy and loss on test images, before and after a checkpoint went to fewer workers."""
    model, rng = tiny_vit(), np.random.default_rng(0)
    data, grid = Images(model, 40), (len(model.blocks), model.blocks[0].attn.num_heads)

    def tested(shard: Shard, transport: Transport) -> tuple[float, float]:
        costs = costs_for(model, transport.size, 2, 2)
        return ForwardPasses(Executor(shard, transport), shard.placement, costs).evaluate(data)

    def saved(rank: int, transport: Transport) -> tuple[float, float]:
        shard, adam = trained(model, rank, 4, owners)
        save(Vault(directory, "job", 1), manifest_of(NEWER), shard, adam, transport, GROUP, PLAN)
        return tested(shard, transport)

    def read(rank: int, transport: Transport) -> tuple[float, float]:
        found = newest_whole(directory, transport, lambda *_, **__: None)
        assert found is not None
        blank = copy.deepcopy(model)
        found.load_weights(blank.state_dict(), cut_of(blank))
        return tested(Shard(blank, Placement.make(owners, transport.size), rank), transport)

    owners, rows = rng.integers(0, 4, grid), []
    accuracy, loss = on_threads(4, saved)[0]
    for size in (1, 2, 3):
        owners = rng.integers(0, size, grid)
        again, loss_again = on_threads(size, read)[0]
        equal = again == accuracy and abs(loss_again - loss) < EQUAL
        rows.append({"saved by": 4, "read by": size, "accuracy": again, "loss": loss_again, "equal": equal})
    return rows


def _full_disks(home: Path, size: int) -> Row:
    """Disks with room for the older checkpoint and for more and more of the newer."""
    tried = silent = lost = 0
    for part in range(1, DISKS + 1):
        with _small_disk(home / "disk", size + 64_000 + part * (size + 200_000) // DISKS) as disk:
            if disk is None:
                break
            tried += 1
            saved_at(disk / "vault", OLDER)
            with contextlib.suppress(SystemFault):
                saved_at(disk / "vault", NEWER)
            listed = names(disk / "vault")
            lost += f"step-{OLDER:08d}" not in listed
            silent += sum(not _verifies(disk / "vault" / name) for name in listed)
    return {
        "damage": "disk full" if tried else "disk full (no right to mount)",
        "tried": tried,
        "silent": silent,
        "lost": lost,
    }


def _verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _small_disk(path: Path, size: int) -> Iterator[Path | None]:
    """A file system of so many bytes; None where this user may not mount one."""
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, check=False
    )
    try:
        yield path if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(path)], check=True)


def _flip(rng: random.Random, files: list[str]) -> Callable[[Path], None]:
    name, where, bit = rng.choice(files), rng.random(), rng.randrange(8)

    def act(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        (folder / name).write_bytes(content)

    return act


def _cut(rng: random.Random, files: list[str]) -> Callable[[Path], None]:
    name, where = rng.choice(files), rng.random()

    def act(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(where * len(content))])

    return act


def _delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _exchange(a: str, b: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / a).rename(folder / "aside")
        (folder / b).rename(folder / a)
        (folder / "aside").rename(folder / b)

    return act


def _foreign(name: str) -> Callable[[Path], None]:
    """The file of the same name out of the older checkpoint; of files that are the same there, one byte more."""

    def act(folder: Path) -> None:
        theirs = (folder.parent / f"step-{OLDER:08d}" / name).read_bytes()
        same = theirs == (folder / name).read_bytes()
        (folder / name).write_bytes(theirs + b"\n" if same else theirs)

    return act


if __name__ == "__main__":
    main()
