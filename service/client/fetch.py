"""Files: sent to be predicted; downloaded, hashed meanwhile, over broken connections, there whole or not at all."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import httpx2

from service.client import calls
from service.client.calls import Answer
from service.client.errors import corrupt
from service.client.flows import PASSING, Close, Deadline, Flow, Open, Patience, Read, Sleep, Work, ask, refusal
from service.schemas import PredictionList

_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")
_BEGIN = re.compile(r"bytes (\d+)-")


def predict(job_id: str, images: Sequence[Path | bytes], top: int, patience: Patience) -> Flow[PredictionList]:
    """What the model of a job says of images, as files or as their bytes."""
    named = yield Work(lambda: [_named(number, image) for number, image in enumerate(images)])
    return (yield from ask(calls.predict(job_id, named, top), patience))


def download(job_id: str, name: str, directory: Path, patience: Patience) -> Flow[Path]:
    """Fetch one artifact into a directory. Raises ApiCorruptError when it is not what the server has."""
    target = _inside(directory, name)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    yield Work(lambda: directory.mkdir(parents=True, exist_ok=True))
    try:
        with draft.open("wb") as file:
            yield from _fill(job_id, name, file, patience)
            yield Work(lambda: _settle(file))
        yield Work(lambda: draft.replace(target))
    finally:
        draft.unlink(missing_ok=True)
    return target


def _fill(job_id: str, name: str, file: BinaryIO, patience: Patience) -> Flow[None]:
    """All of the file, by as many connections as it takes as long as each brings something or none fails for long."""
    deadline = Deadline(job_id, None, patience)
    digest, etag, size = hashlib.sha256(), None, 0
    while True:
        try:
            answer: Answer = yield Open(calls.download(job_id, name, size, etag))
            if answer.status == 416 and size:
                answer = yield Open(calls.download(job_id, name, 0, None))
            if not answer.is_success:
                raise refusal(answer)
            if size and _begins(answer) != size:
                # Not the part that was asked for: the file is another by now, or parts are not known there.
                file.seek(0)
                file.truncate()
                digest, size = hashlib.sha256(), 0
            etag = answer.headers.get("etag")
            while (chunk := (yield Read())) is not None:
                yield Work(lambda piece=chunk: file.write(piece))  # type: ignore[misc]
                digest.update(chunk)
                size += len(chunk)
                deadline.heard()
        except (httpx2.RequestError, *PASSING) as lost:
            yield Close()
            yield Sleep(deadline.pause_s(lost))
            continue
        yield Close()
        told = _DIGEST.search(answer.headers.get("repr-digest", ""))
        if told and _decoded(told[1]) != digest.digest():
            raise corrupt(name)
        return


def _begins(answer: Answer) -> int | None:
    """Where the part that an answer holds begins; None where it holds the whole."""
    found = _BEGIN.match(answer.headers.get("content-range", ""))
    return int(found[1]) if answer.status == 206 and found else None


def _inside(directory: Path, name: str) -> Path:
    """Where the file goes: into this directory, whatever the server calls it."""
    last = Path(name).name
    if not last or last == ".." or "\0" in last:
        raise ValueError(f"{name!r} is no name for a file")
    return directory / last


def _named(number: int, image: Path | bytes) -> tuple[str, bytes]:
    return (f"image-{number}", image) if isinstance(image, bytes) else (image.name, image.read_bytes())


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
