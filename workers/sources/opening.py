"""An address to its source. What a kind needs is loaded when it is first asked for: a folder costs no pyarrow."""

from __future__ import annotations

from importlib import import_module

from workers.sources.address import Address
from workers.sources.source import Source

_OPENERS = {  # the function that lists a kind, by the file that has it
    "folder": "open_folder",
    "parquet": "open_parquet",
    "webdataset": "open_webdataset",
}


def open_source(address: Address) -> Source:
    """List a dataset. Raises UserError (dataset), by kind."""
    module = import_module(f"workers.sources.{address.kind}")
    source: Source = getattr(module, _OPENERS[address.kind])(address)
    return source
