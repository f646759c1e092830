"""An address to its source. What a kind needs is loaded when it is first asked for: a folder costs no pyarrow."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from workers.sources.address import STORES, Address
from workers.sources.source import Source

KINDS = {  # the function that lists a kind, by the file that has it
    "folder": "open_folder",
    "parquet": "open_parquet",
    "webdataset": "open_webdataset",
    "torchvision": "open_torchvision",
    "hf": "open_hf",
}


def open_source(address: Address, progress: Callable[[], None] = lambda: None) -> Source:
    """List a dataset; one in an object store is copied to this machine before, and `progress` called meanwhile.

    Raises UserError (dataset), by kind; those of `remote.fetch`.
    """
    if address.store in STORES:
        address = import_module("workers.sources.remote").fetch(address, progress)
    return opener_of(address.kind)(address)


def opener_of(kind: str) -> Callable[[Address], Source]:
    """The function that lists a kind, with what it needs loaded."""
    opener: Callable[[Address], Source] = getattr(import_module(f"workers.sources.{kind}"), KINDS[kind])
    return opener
