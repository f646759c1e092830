"""An address to its source. What a kind needs is loaded when it is first asked for: a folder costs no pyarrow."""

from __future__ import annotations

from workers.sources.address import Address
from workers.sources.folder import open_folder
from workers.sources.source import Source


def open_source(address: Address) -> Source:
    """List a dataset. Raises UserError (dataset), by kind."""
    return open_folder(address.path)
