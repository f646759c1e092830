"""Weights from Hugging Face's hub: `hf-hub:ORG/NAME@REVISION`, a commit's full hash, so that they cannot change.

Only `model.safetensors` is ever read. With HF_HUB_OFFLINE=1 it has to be in the machine's cache (HF_HOME) already;
HF_ENDPOINT names another hub, HF_TOKEN opens what is not public.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from scheduler.errors import SystemFault, UserError
from workers.contract import HUB

FILE = "model.safetensors"
GONE = (401, 403, 404)  # what the hub says of a repository that is not there, or not for everybody


def located(weights: str | Path) -> Path:
    """Where a file of weights lies; one of the hub's is downloaded unless it is in the cache.

    Raises UserError (weights) "hub_not_found", "hub_offline"; SystemFault "hub_unreachable".
    """
    if isinstance(weights, Path):
        return weights
    name, _, revision = weights.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(name, FILE, revision=revision))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise _offline(weights) from error
        raise _unreachable(error) from error
    except EntryNotFoundError as error:
        raise _not_found(weights) from error
    except HfHubHTTPError as error:
        if error.response.status_code in GONE:
            raise _not_found(weights) from error
        raise _unreachable(error) from error
    except (OSError, ValueError) as error:  # the network's, and the disk's
        raise _unreachable(error) from error


def _not_found(weights: str) -> UserError:
    return UserError(
        f"The hub has no {FILE} under {weights}, or does not show it to us.",
        code="hub_not_found",
        param="weights",
        remedy="Take the full hash of a commit that has one; for a repository that is not public, HF_TOKEN has to be "
        "set where the workers run.",
    )


def _offline(weights: str) -> UserError:
    return UserError(
        f"{weights} is not in the cache of this machine, and nothing may be downloaded (HF_HUB_OFFLINE).",
        code="hub_offline",
        param="weights",
        remedy="Have the operator put it there (`hf download`) or set D2FT_HUB_DOWNLOADS, or give the path of a file.",
    )


def _unreachable(error: Exception) -> SystemFault:
    return SystemFault(f"The weights could not be fetched from {constants.ENDPOINT}: {error}", code="hub_unreachable")
