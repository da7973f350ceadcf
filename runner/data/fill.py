"""How full rows and micro-batches are: which share of what a model computes is real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimpot.kernels.ops.pack import least_bins
from trimpot.runner.data.compile import Compiled
from trimpot.runner.data.cursor import Cursor, deal
from trimpot.runner.types import Plan


@dataclass(frozen=True)
class Fill:
    """Of the training data of a run."""

    documents: int
    rows: int
    least_rows: int
    """No packing has fewer (a bound: it may be that none has as few)."""
    row_tokens: int
    """What a packed row can hold."""
    row_share: float
    """Real tokens in all rows over what they can hold."""
    computed_share: float
    """Real tokens of an epoch over those that the model computes: padding included."""


def fill_of(plan: Plan, data: Compiled, by_document: bool) -> Fill:
    """`by_document`: micro-batches are joined to one row, not padded to their longest one."""
    documents, capacity = np.diff(data.documents), plan.config.data.max_length
    packed = plan.config.data.packing
    return Fill(
        documents=len(documents),
        rows=len(data),
        least_rows=least_bins(documents, capacity) if packed else len(data),
        row_tokens=capacity,
        row_share=int(documents.sum()) / (len(data) * capacity),
        computed_share=_computed_share(plan, data.lengths, by_document),
    )


def _computed_share(plan: Plan, lengths: NDArray[np.int64], by_document: bool) -> float:
    """Over the micro-batches of the first epoch, as the loop will deal them."""
    size, count = plan.config.optim.batch_size, plan.micro_batch_size
    taken = Cursor(len(lengths), plan.config.seed).take(0, max(1, len(lengths) // size) * size)
    micros = np.concatenate([deal(step, lengths, count) for step in taken.reshape(-1, size)])
    real = lengths[micros]
    if by_document:
        split = plan.sequence_parallel_size
        computed = -(-real.sum(1) // split) * split
    else:
        computed = real.max(1) * count
    return float(real.sum() / computed.sum())
