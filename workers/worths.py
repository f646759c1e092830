"""What each head is worth for each training image, for plans that choose per micro-batch (`hold: none`).

A table of [num_train, L, H], by the image's index in the dataset: the order of images may change, the table stays. It
lies at rank 0, in memory or, above 64 MB, as a nameless file of half precision in the run directory, which goes when
the process does. The scoring pass fills it, and the gates of training keep it fresh; an image that neither has seen is
worth the mean of those seen.

Every row has mean 1 over the heads, so that a micro-batch's worth, the mean of its images' rows, has too. Slopes of a
few heads are scaled to what these heads were worth together: that says how they compare to each other, and leaves the
others be.

Between workers (`GroupWorths`): each scores other images, or knows the slopes of its own heads, NaN elsewhere. These
arrays lie over one another without conflict, so rank 0 picks what is known. Per window W − 1 messages of 4 B × recorded
images × L·H go to rank 0 (12 × 12 heads, 13 recorded steps of 80 images: 0.6 MB), and W · (W − 1) of 4 B × T·L·H·M come
back (100 steps × 5: 0.3 MB), less than one step's residuals.

Axes: N images, L blocks, H heads, T steps, M micro-batches of a step, B images of a micro-batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from scheduler.errors import SystemFault
from scheduler.program import MessageKey
from scheduler.scores import FRESH, normalise, refresh, worth_of
from workers.gates import Recorded
from workers.order import IndexArray, MicroBatches
from workers.transport import Parcel, Transport, all_sum

IN_MEMORY_BYTES = 64_000_000

Floats = npt.NDArray[np.floating]
Slopes = npt.NDArray[np.float32]  # [N, L, H], NaN where unknown


class WorthTable:
    """The worth of every head for every training image, as far as it is known."""

    def __init__(
        self,
        num_train: int,
        grid: tuple[int, int],
        kind: str,
        directory: str | Path,
        limit_bytes: int = IN_MEMORY_BYTES,
    ) -> None:
        self.kind = kind
        shape = (num_train, *grid)
        self.in_memory = 4 * num_train * grid[0] * grid[1] <= limit_bytes
        self._rows_NLH: Floats = np.zeros(shape, dtype=np.float32) if self.in_memory else _mapped(shape, directory)
        self._known_N = np.zeros(num_train, dtype=bool)
        self._total_LH = np.zeros(grid)  # Σ of the known rows

    @property
    def num_known(self) -> int:
        return int(self._known_N.sum())

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """What an image that was never seen is worth."""
        return self._total_LH / self.num_known if self.num_known else np.ones_like(self._total_LH)

    def learn(self, indices_N: IndexArray, slopes_NLH: npt.ArrayLike) -> None:
        """Take in slopes ∂loss_i/∂gate of the images at `indices_N`, NaN where unknown; the last of an image counts."""
        worth_NLH = worth_of(slopes_NLH, self.kind)
        kept = np.isfinite(worth_NLH) & (worth_NLH.sum((1, 2), keepdims=True, where=np.isfinite(worth_NLH)) > 0)
        _, last = np.unique(indices_N[::-1], return_index=True)
        chosen = np.array([i for i in len(indices_N) - 1 - last if kept[i].any()], dtype=np.int64)
        if not len(chosen):
            return
        indices, fresh = indices_N[chosen], np.where(kept[chosen], worth_NLH[chosen], np.nan)
        known = self._known_N[indices][:, None, None]
        old = np.where(known, self._rows_NLH[indices], 0.0)
        new = refresh(np.where(known, old, self.mean), fresh, np.where(known, FRESH, 1.0))
        self._rows_NLH[indices] = normalise(new, (1, 2))
        self._total_LH += (self._rows_NLH[indices].astype(np.float64) - old).sum(0)
        self._known_N[indices] = True

    def coming(self, order: MicroBatches, first_step: int, num_steps: int) -> npt.NDArray[np.float32]:
        """Worth for every micro-batch of the coming steps, each with mean 1 over the heads."""
        mean_LH = self.mean
        steps = []
        for step in range(first_step, first_step + num_steps):
            indices_MB = np.stack(order.indices(step))
            known = self._known_N[indices_MB][..., None, None]
            rows_MBLH = np.where(known, self._rows_NLH[indices_MB], mean_LH)
            steps.append(np.moveaxis(rows_MBLH.mean(1), 0, -1))
        return normalise(np.stack(steps), (1, 2)).astype(np.float32)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps; the rows are not copied."""
        arrays = {"rows": self._rows_NLH, "known": self._known_N, "total": self._total_LH}
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state`, of whatever precision its rows are."""
        self._rows_NLH[:] = state["rows"].numpy()
        self._known_N[:] = state["known"].numpy()
        self._total_LH[:] = state["total"].numpy()


class GroupWorths:
    """The table as a group of workers uses it: every method is collective, and the table is rank 0's."""

    def __init__(
        self,
        transport: Transport,
        num_train: int,
        grid: tuple[int, int],
        kind: str,
        directory: str | Path,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transport, self.grid, self.device = transport, grid, device
        self.table = None if transport.rank else WorthTable(num_train, grid, kind, directory)

    def learn_scored(
        self, order: MicroBatches, batches: Sequence[Sequence[int]], mine: Sequence[npt.ArrayLike]
    ) -> None:
        """Slopes of the scoring pass: `batches[rank]` are the steps of `order`, of one micro-batch each, that a rank
        scored; `mine` the slopes [B, L, H] of this rank's."""
        steps = sorted(step for of_rank in batches for step in of_rank)
        size = order.micro_batch_size
        slopes_TBLH = np.full((len(steps), size, *self.grid), np.nan, dtype=np.float32)
        for step, slopes_BLH in zip(batches[self.transport.rank], mine, strict=True):
            slopes_TBLH[steps.index(step)] = slopes_BLH
        self._learn(order, steps, slopes_TBLH.reshape(-1, *self.grid))

    def learn_recorded(self, order: MicroBatches, recorded: Recorded) -> None:
        """Slopes that the gates recorded in a window of training under `order`."""
        self._learn(order, recorded.steps, recorded.slopes_SLH)

    def coming(self, order: MicroBatches, first_step: int, num_steps: int) -> npt.NDArray[np.float32]:
        """`WorthTable.coming`, the same on every worker."""
        worth_TLHM = np.zeros((num_steps, *self.grid, order.num_micro_batches), dtype=np.float32)
        if self.table is not None:
            worth_TLHM = self.table.coming(order, first_step, num_steps)
        return all_sum(self.transport, torch.from_numpy(worth_TLHM).to(self.device)).cpu().numpy()

    def _learn(self, order: MicroBatches, steps: Sequence[int], slopes_NLH: Slopes) -> None:
        if not steps:
            return
        merged = gather_slopes(self.transport, slopes_NLH, self.device)
        if self.table is not None and merged is not None:
            self.table.learn(np.concatenate([np.concatenate(order.indices(step)) for step in steps]), merged)


def gather_slopes(transport: Transport, slopes_NLH: Slopes, device: torch.device | str = "cpu") -> Slopes | None:
    """All workers' slopes of the same images laid over one another, at rank 0; None elsewhere. Collective."""
    mine = torch.from_numpy(slopes_NLH).to(device)
    if transport.rank:
        transport.open({})
        transport.send(0, _key(transport.rank), mine)
        transport.close()
        return None
    peers = range(1, transport.size)
    transport.open({src: [Parcel(_key(src), tuple(mine.shape), torch.float32)] for src in peers})
    merged = slopes_NLH.copy()
    for src in peers:
        theirs = transport.recv(src, _key(src)).cpu().numpy()
        merged = np.where(np.isnan(merged), theirs, merged)
    transport.close()
    return merged


def _mapped(shape: tuple[int, ...], directory: str | Path) -> Floats:
    """A table on disk, all zero; its space is taken now, as a full disk would kill the process at a later write."""
    num_bytes = 2 * int(np.prod(shape))
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.memmap(file, dtype=np.float16, mode="r+", shape=shape)  # type: ignore[arg-type]
    except OSError as error:
        raise SystemFault(
            f"The table of worths needs {num_bytes / 1e6:.0f} MB in {directory}: {error.strerror}.",
            code="no_space_for_worths",
            param="method.hold",
            remedy="Free the space, or hold the selection over a window.",
        ) from error


def _key(src: int) -> MessageKey:
    return ("slopes", 0, "", 0, src, 0)
