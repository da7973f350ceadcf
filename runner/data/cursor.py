"""The global sample cursor: which samples step s trains, whatever the number of workers.

Sample k of a run is a function of (data, seed, k) alone. A step takes the next `batch_size` of
them; how they fall onto workers and accumulation steps changes nothing but the order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cursor:
    """The order of `samples` samples over all epochs."""

    samples: int
    seed: int

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Indices of samples start … start + count − 1 of the run → int64 [count]."""
        taken: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, offset = divmod(start, self.samples)
            part = self._epoch(epoch)[offset : offset + count]
            taken.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        # Philox is counter-based: epoch e costs the same however many came before it.
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return generator.permutation(self.samples)


def deal(
    indices: NDArray[np.int64], lengths: NDArray[np.int64], micro_batch_size: int
) -> NDArray[np.int64]:
    """Split a step's samples into micro-batches of like length → int64 [n_micro, micro_batch_size].

    Sorted by length, ties by place in the run: a micro-batch is padded to its longest sample, and
    at the same accumulation step all workers have about as much to do. Micro-batch j goes to
    worker j mod world_size, or to that group of workers that share rows, so the same micro-batches
    exist at every world size, whether or not they divide by it.
    """
    order = np.lexsort((np.arange(len(indices)), -lengths[indices]))
    return indices[order].reshape(-1, micro_batch_size)


def steps_in(samples: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` epochs, at least one. Epochs join without a short batch."""
    return max(1, round(samples * epochs / batch_size))
