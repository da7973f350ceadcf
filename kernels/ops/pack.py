"""Sequence packing: which documents share a row of `capacity` tokens.

First-fit decreasing: documents from the longest to the shortest, each into the lowest-numbered
bin that has room. It needs at most 11/9·OPT + 6/9 bins (Dósa 2007, "The tight bound of first fit
decreasing bin-packing algorithm").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimpot.kernels import native
from trimpot.kernels.dispatch import AUTO, choose
from trimpot.kernels.errors import KernelError


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """The definition: bin of each document. Of documents of one length, the first goes first.

    Quadratic; `pack` gives the same in O(n log n).
    """
    bins = [0] * len(lengths)
    room: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        chosen = next((b for b, left in enumerate(room) if left >= length), len(room))
        if chosen == len(room):
            room.append(capacity)
        room[chosen] -= length
        bins[document] = chosen
    return bins


def pack(lengths: ArrayLike, capacity: int, backend: str = AUTO) -> NDArray[np.int64]:
    """Bin of each document, numbered from 0 without gaps → int64, like `lengths`.

    lengths: one-dimensional integers, in tokens, each within 0 … capacity.
    Raises KernelError for a document that no bin can hold, and for anything else than that.
    """
    checked = _check(lengths, capacity)
    choice = choose("pack", backend)
    if choice.backend == "native":
        bins = np.empty_like(checked)
        native.pack(checked, capacity, bins)
        return bins
    return _pack_by_length(checked, capacity)


def _check(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise KernelError(f"lengths has shape {array.shape}; one dimension is wanted")
    if array.size and array.dtype.kind not in "iu":
        raise KernelError(f"lengths are {array.dtype}; integers are wanted")
    if not 1 <= capacity < 2**62:
        raise KernelError(f"the capacity is {capacity}; 1 token or more is wanted")
    if not array.size:
        return np.empty(0, np.int64)
    if (lowest := int(array.min())) < 0:
        raise KernelError(f"document {int(array.argmin())} has {lowest} tokens; 0 or more is right")
    if (highest := int(array.max())) > capacity:
        raise KernelError(
            f"document {int(array.argmax())} has {highest} tokens, a bin holds {capacity}; "
            "truncate or drop it, or raise the capacity"
        )
    return np.require(array, np.int64, ["C", "A"])


def _pack_by_length(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """First-fit decreasing, all documents of one length at a time.

    Equal documents fill each bin, from the lowest on, with as many as still go in: so many that
    one vector operation places them. Time is distinct lengths × bins.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    bins = np.zeros_like(lengths)
    room = np.full(len(lengths), capacity, np.int64)  # a bin that is not open yet has room for all
    opened = placed = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        if length == 0:
            break  # into bin 0, where they are
        reach = opened + -(-count // (capacity // length))  # enough if no open bin has room
        fits = np.minimum(room[:reach] // length, count)
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        room[:reach] -= taken * length
        bins[order[placed : placed + count]] = np.repeat(np.arange(reach), taken)
        opened = max(opened, int(np.flatnonzero(taken)[-1]) + 1)
        placed += count
    return bins


def least_bins(lengths: ArrayLike, capacity: int) -> int:
    """How many bins any packing needs, at least: what `pack` is measured by.

    Martello & Toth (1990), "Lower bounds and reduction procedures for the bin packing problem",
    L2: for each threshold K ≤ capacity/2, documents over capacity − K share a bin with none of K or
    more, those over half with one at most, and the rest of those of K or more must go into what
    the latter leave, or into bins of their own. Beside that, no k + 1 documents over
    capacity / (k + 1) share a bin. Errors as in `pack`.
    """
    ordered = np.sort(_check(lengths, capacity))
    if not ordered.size or not ordered[-1]:
        return int(ordered.size > 0)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    half = int(np.searchsorted(ordered, capacity // 2, "right"))  # the first of more than half
    thresholds = np.unique(np.concatenate([[0], ordered[:half]]))
    first = np.searchsorted(ordered, thresholds, "left")
    large = np.searchsorted(ordered, capacity - thresholds, "right")
    over_half = ordered.size - half
    room = (large - half) * capacity - (sums[large] - sums[half])
    over = np.maximum(0, sums[half] - sums[first] - room)
    together = np.arange(1, 16)
    longer = ordered.size - np.searchsorted(ordered, capacity // (together + 1), "right")
    return int(max(over_half + (-(-over // capacity)).max(), (-(-longer // together)).max()))
