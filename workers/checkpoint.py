"""Checkpoints of a whole group between two steps: written together, read by any number of workers.

    every worker ── its heads, its trunk, AdamW's state ──► rank003.safetensors ─┐
    rank 0 ── what all know alike ──► group.safetensors, plan.json ──────────────┤
                                                     manifest ► rename ► listed ◄┘

`save` does this while all wait for it, `keeper` while training goes on.

A worker writes what it speaks for (`Shard.spoken_for`), under the names that `migration` uses as well: b03.h1.qkv_w and
timm's names, with |exp_avg, |exp_avg_sq and |step behind them. So a reader finds a head by its name, wherever it was,
and may have another placement. Which checkpoint is read is agreed on: the workers share the files out, and one that any
of them finds damaged is damaged for all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scheduler.errors import SystemFault, UserError
from scheduler.failpoints import hit, passing
from workers.disk import sync
from workers.gather import gather_json
from workers.manifest import (
    GROUP_FILE,
    PLAN_FILE,
    File,
    Manifest,
    describe,
    names,
    rank_file,
    read_manifest,
    verify,
    write_manifest,
)
from workers.optimiser import Adam, State
from workers.partition import Cut
from workers.shard import Shard, join
from workers.transport import Transport

T = TypeVar("T")


@dataclass(frozen=True)
class Vault:
    """Where an attempt leaves its checkpoints, and where it looks for one to go on from.

    `group` counts the groups of workers that the attempt has had.
    """

    directory: Path
    job_id: str = "job"
    attempt: int = 1
    resume_from: Path | None = None
    group: int = 0

    def draft(self, name: str) -> Path:
        """Where a checkpoint is written before it has its name; no other group's."""
        return self.directory.absolute() / f"{name}.tmp-a{self.attempt}.{self.group}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk: `bytes` of the whole folder, `sha256` of its manifest, `files` named there.

    `accuracy` of the model then, where it was measured.
    """

    step: int
    name: str
    path: str
    bytes: int
    sha256: str
    files: int
    accuracy: float | None = None


Group = Mapping[str, Mapping[str, Tensor]]  # what all workers know alike, in parts


def save(
    vault: Vault, manifest: Manifest, shard: Shard, adam: Adam, transport: Transport, group: Group, plan: Any
) -> Saved:
    """Write a checkpoint of this moment, which must be between two steps; collective, the same answer everywhere.

    `manifest` comes without files; of `group` and `plan` rank 0's is kept. If any worker cannot write, all raise
    SystemFault "checkpoint_failed", and nothing is left.
    """
    draft, leads = vault.draft(manifest.name), transport.rank == 0

    def together(work: Callable[[], T]) -> list[T]:
        return _together(transport, shard.device, draft, work)

    try:
        together(lambda: begin(draft) if leads else None)
        written = together(
            lambda: [asdict(f) for f in write_part(draft, transport.rank, part_of(shard, adam), group, plan)]
        )
        files = [File(**file) for of_rank in written for file in of_rank]
        told, *_ = together(lambda: asdict(finish(draft, manifest, files)) if leads else {})
    except BaseException:
        if leads:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return Saved(**told)


def begin(draft: Path) -> None:
    """An empty folder that all workers see; what this group left there before is gone."""
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)


def part_of(shard: Shard, adam: Adam) -> dict[str, Tensor]:
    """What a worker writes: the tensors themselves, no copies."""
    tensors: dict[str, Tensor] = {}
    for name, param in shard.spoken_for().items():
        tensors[name] = param
        tensors |= {f"{name}|{entry}": value for entry, value in adam.state_of(name).items()}
    return tensors


def write_part(draft: Path, rank: int, part: Mapping[str, Tensor], group: Group, plan: Any) -> list[File]:
    """Write a worker's file, and rank 0's others, each safe on the disk when this returns."""
    with passing("checkpoint.begin"):
        files = [_write(draft / rank_file(rank), part)]
    if rank == 0:
        alike = {f"{name}.{key}": tensor for name, tensors in group.items() for key, tensor in tensors.items()}
        files.append(_write(draft / GROUP_FILE, alike))
        (draft / PLAN_FILE).write_text(json.dumps(plan))
        sync(draft / PLAN_FILE)
        files.append(describe(draft / PLAN_FILE))
    hit("checkpoint.written")
    return files


def finish(draft: Path, manifest: Manifest, files: Sequence[File]) -> Saved:
    """Complete the draft and give it its name; an older folder of that name, damaged or of another past, goes."""
    target = draft.with_name(manifest.name)
    with passing("checkpoint.manifest"):
        told = write_manifest(draft, replace(manifest, files=tuple(files)))
        sync(draft)
    aside = target.with_name(f"{draft.name}.old")
    with passing("checkpoint.rename"):
        if target.exists():
            target.rename(aside)
        draft.rename(target)
    try:
        sync(target.parent)
    except OSError:
        target.rename(draft)  # not listed unless it is there for good
        raise
    shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    return Saved(manifest.step, manifest.name, str(target), size, told.sha256, len(files), manifest.accuracy)


def drop_drafts(vault: Vault) -> None:
    """Earlier groups are over: what they did not finish only takes room."""
    for path in vault.directory.glob("step-*.tmp-a*"):
        found = re.fullmatch(r"(\d+)\.(\d+)(\.old)?", path.name.partition(".tmp-a")[2])
        if found and (int(found[1]), int(found[2])) < (vault.attempt, vault.group):
            shutil.rmtree(path, ignore_errors=True)


class Checkpoint:
    """A checkpoint that was found whole."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def load_weights(self, state: Mapping[str, Tensor], cut: Cut) -> None:
        """Write the whole model's weights into a plain timm state dict, in place."""
        found, wanted = 0, sum(tensor.numel() for tensor in state.values())
        try:
            for name, tensor in self._tensors(lambda name: "|" not in name):
                join({name: tensor}, state, cut)
                found += tensor.numel()
        except (KeyError, RuntimeError) as error:
            raise _mismatch(f"its weights do not fit the model: {error}") from error
        if found != wanted:
            raise _mismatch(f"it has {found} of the model's {wanted} weights")

    def optimiser_state(self, params: Iterable[str], device: torch.device | str) -> State:
        """AdamW's state of the named parameters, of those that have one."""
        wanted, state = set(params), State()
        for name, tensor in self._tensors(lambda name: "|" in name and name.partition("|")[0] in wanted):
            param, _, entry = name.partition("|")
            state.setdefault(param, {})[entry] = tensor.to(device)
        return state

    def group(self, part: str) -> dict[str, Tensor]:
        """A part of what was known alike by all workers."""
        with safe_open(self.folder / GROUP_FILE, "pt") as file:
            found = [name for name in file.keys() if name.startswith(f"{part}.")]  # noqa: SIM118 - no mapping
            return {name.removeprefix(f"{part}."): file.get_tensor(name) for name in found}

    @property
    def plan(self) -> dict[str, Any]:
        """{"plan", "profiles", "told"} that were in use, as dicts; of an older checkpoint without the last."""
        found: dict[str, Any] = json.loads((self.folder / PLAN_FILE).read_bytes())
        return found

    def _tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        for part in self.manifest.files:
            if part.name.startswith("rank"):
                with safe_open(self.folder / part.name, "pt") as file:
                    for name in filter(wanted, file.keys()):
                        yield name, file.get_tensor(name)


def newest_whole(
    directory: Path, transport: Transport, emit: Callable[..., None], device: torch.device | str = "cpu"
) -> Checkpoint | None:
    """The newest checkpoint that is as it was written, the same on every worker; collective. Damaged ones are told."""
    for name in gather_json(transport, names(directory), device)[0]:
        mine = _judge(directory / name, transport.rank, transport.size)
        verdicts = gather_json(transport, mine, device)
        faults = [fault for fault, _ in verdicts if fault]
        if not faults and len({digest for _, digest in verdicts}) > 1:
            faults = ["the workers do not see the same files"]
        if not faults:
            return Checkpoint(directory / name, read_manifest(directory / name)[0])
        emit("checkpoint.damaged", f"{name} is damaged: {faults[0]}", level="warning", name=name, why=faults[0])
    return None


def check_same_job(manifest: Manifest, spec_fingerprint: str, num_train: int) -> None:
    """Raises UserError "checkpoint_mismatch" if the checkpoint is of a job that trains something else."""
    if manifest.fingerprint != spec_fingerprint:
        raise _mismatch("it was made by a job with another spec")
    if manifest.num_train != num_train:
        raise _mismatch(f"it was trained on {manifest.num_train} images, and the dataset has {num_train} now")


def _together(transport: Transport, device: torch.device, draft: Path, work: Callable[[], T]) -> list[T]:
    """What `work` gave on every worker, in rank order, as JSON carries it; where it failed on one, all raise."""
    value, why = None, ""
    try:
        value = work()
    except (OSError, SafetensorError, SystemFault) as error:
        why = f"worker {transport.rank}: {error}"
    everyone = gather_json(transport, [value, why], device)
    if whys := [why for _, why in everyone if why]:
        raise SystemFault(
            f"The checkpoint {draft} cannot be written; {whys[0]}.",
            code="checkpoint_failed",
            remedy="There must be room, and every worker must be able to write there.",
        )
    return [value for value, _ in everyone]


def _write(path: Path, tensors: Mapping[str, Tensor]) -> File:
    safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    return describe(path)


def _judge(folder: Path, rank: int, size: int) -> tuple[str, str]:
    """(what is wrong with the files that fall to this worker, SHA-256 of the manifest)."""
    try:
        return "", verify(folder, rank, size)[1]
    except (OSError, ValueError) as error:
        return str(error), ""


def _mismatch(why: str) -> UserError:
    return UserError(
        f"The checkpoint cannot be gone on from: {why}.",
        code="checkpoint_mismatch",
        remedy="Resume it with the spec that it was made with, or start a new job.",
    )
