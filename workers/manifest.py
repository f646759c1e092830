"""What a checkpoint says of itself, and how a reader finds out that every byte of it is as it was written.

    step-00000042/
      rank000.safetensors …   a worker's part of the model and AdamW's state of it
      group.safetensors       what all workers know alike
      plan.json               the plan in use and the profiles that it rests on
      manifest.json           all else, with size and SHA-256 of each file above
      manifest.sha256         SHA-256 of the manifest, as `sha256sum -c` reads it

A folder has its name only once all of it is on the disk; until then it is called step-00000042.tmp-a3, by the attempt
that writes it. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workers.contract import JobSpec
from workers.disk import sha256_of, sync

FORMAT = 1
MANIFEST_FILE, DIGEST_FILE = "manifest.json", "manifest.sha256"
GROUP_FILE, PLAN_FILE = "group.safetensors", "plan.json"
_NAME = re.compile(r"step-(\d{8,})")
# Fields of a job that do not change what is trained: a paused one may go on with others.
OUTSIDE = (
    "name",
    "metadata",
    "priority",
    "queue_timeout_s",
    "workers",
    "min_workers",
    "worker_memory_bytes",
    "checkpoint",
    "export",
)


@dataclass(frozen=True)
class File:
    """A file of a checkpoint; `sha256` in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening its tensors.

    `step` of `total_steps` are done, as `adam_step` of the learning rate's schedule are. `window` is {number, begin,
    end} of the span that the step lies in; the rest of it is the next window. `held` are the heads that its plan held
    FULL, `owners` the worker of every head then, `ledger` the sums so far, `accuracy` of this moment where that was
    measured.
    """

    job_id: str
    fingerprint: str
    step: int
    total_steps: int
    adam_step: int
    workers: int
    seed: int
    num_train: int
    window: dict[str, int]
    owners: list[list[int]]
    held: list[str] | None
    ledger: dict[str, Any]
    accuracy: float | None = None
    files: tuple[File, ...] = ()
    format: int = FORMAT

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError for what is no manifest of this format."""
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']}, and this version reads {FORMAT}")
        files = tuple(File(**file) for file in fields.pop("files"))
        return cls(**fields, files=files)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def rank_file(rank: int) -> str:
    return f"rank{rank:03d}.safetensors"


def fingerprint(spec: JobSpec) -> str:
    """The same for specs that train alike; a learning rate that was not given counts as the one it stands for."""
    told = spec.model_dump(mode="json", exclude=set(OUTSIDE))
    told["optimiser"] = spec.filled_optimiser.model_dump(mode="json")
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def names(directory: Path) -> list[str]:
    """Checkpoints in a directory, the newest first, whole or not."""
    found = [entry.name for entry in directory.iterdir() if _NAME.fullmatch(entry.name)] if directory.is_dir() else []
    return sorted(found, key=lambda name: int(name.removeprefix("step-")), reverse=True)


def describe(path: Path) -> File:
    return File(path.name, path.stat().st_size, sha256_of(path))


def write_manifest(folder: Path, manifest: Manifest) -> File:
    """Write the manifest and its digest, on the disk when this returns; what the manifest file is."""
    content = manifest.to_json()
    told = File(MANIFEST_FILE, len(content), hashlib.sha256(content).hexdigest())
    for name, text in ((MANIFEST_FILE, content), (DIGEST_FILE, _digest_line(content))):
        (folder / name).write_bytes(text)
        sync(folder / name)
    return told


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint and its SHA-256; raises OSError, or ValueError with what is wrong."""
    content = (folder / MANIFEST_FILE).read_bytes()
    if (folder / DIGEST_FILE).read_bytes() != _digest_line(content):
        raise ValueError(f"{MANIFEST_FILE} is not what {DIGEST_FILE} says")
    try:
        manifest = Manifest.parse(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST_FILE} lacks something: {error!r}") from error
    if manifest.name != folder.name:
        raise ValueError(f"it is {manifest.name} by its manifest")
    return manifest, hashlib.sha256(content).hexdigest()


def verify(folder: Path, rank: int = 0, size: int = 1) -> tuple[Manifest, str]:
    """(manifest, its SHA-256) of a checkpoint whose files are as they were written; every `size`-th of them is read.

    Raises OSError, ValueError.
    """
    manifest, digest = read_manifest(folder)
    for file in manifest.files[rank::size]:
        check_file(folder, file)
    return manifest, digest


def check_file(folder: Path, file: File) -> None:
    """Raises OSError or ValueError unless the file is, byte for byte, what the manifest says."""
    path = folder / file.name
    if path.stat().st_size != file.bytes:
        raise ValueError(f"{file.name} has {path.stat().st_size} bytes of {file.bytes}")
    if describe(path) != file:
        raise ValueError(f"{file.name} has another SHA-256 than when it was written")


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode()
