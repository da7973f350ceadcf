"""64-bit content hashes of documents: XXH64 of their tokens' little-endian bytes.

Not cryptographic. Among n different documents two share a hash with probability about n²/2⁶⁵:
3e-8 for a million.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimpot.kernels import native
from trimpot.kernels.dispatch import AUTO, choose
from trimpot.kernels.errors import KernelError

Hashes = NDArray[np.uint64]

PRIME_1, PRIME_2, PRIME_3, PRIME_4, PRIME_5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
STRIPE = 8  # tokens that the four accumulators take at a time: 32 bytes


def hash_documents(
    tokens: ArrayLike, offsets: ArrayLike, seed: int = 0, backend: str = AUTO
) -> Hashes:
    """hashes[i] = XXH64(bytes of tokens[offsets[i]:offsets[i + 1]], seed) → uint64 [d]

    tokens: int32 [n]. offsets: integers [d + 1], rising, within 0 … n; a document may be empty.
    Arrays that are not contiguous and aligned are copied first. Raises KernelError for all else.
    """
    tokens_n, offsets_d1 = _check(tokens, offsets, seed)
    choice = choose("content_hash", backend)
    if choice.backend == "native":
        hashes = np.empty(len(offsets_d1) - 1, np.uint64)
        native.hash_documents(tokens_n, offsets_d1, seed, hashes)
        return hashes
    return _hash_in_step(tokens_n, offsets_d1, seed)


def _check(
    tokens: ArrayLike, offsets: ArrayLike, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    tokens_n, offsets_d1 = np.asarray(tokens), np.asarray(offsets)
    if tokens_n.ndim != 1 or offsets_d1.ndim != 1:
        shapes = f"{tokens_n.shape} and {offsets_d1.shape}"
        raise KernelError(f"tokens and offsets have shapes {shapes}; one dimension is wanted")
    if tokens_n.dtype != np.int32:
        raise KernelError(f"tokens are {tokens_n.dtype}; int32 is wanted: tokens.astype('int32')")
    if not offsets_d1.size:
        raise KernelError("offsets are empty; for no document at all, [0] is wanted")
    if offsets_d1.dtype.kind not in "iu":
        raise KernelError(f"offsets are {offsets_d1.dtype}; integers are wanted")
    if not 0 <= seed < 2**64:
        raise KernelError(f"the seed is {seed}; 0 … 2**64 - 1 is wanted")
    first, last = int(offsets_d1[0]), int(offsets_d1[-1])
    if len(falls := np.flatnonzero(offsets_d1[1:] < offsets_d1[:-1])):
        at = int(falls[0])
        pair = f"{offsets_d1[at]} to {offsets_d1[at + 1]}"
        raise KernelError(f"offsets fall at document {at}, from {pair}; rising ones are wanted")
    if first < 0 or last > tokens_n.size:
        raise KernelError(
            f"offsets run from {first} to {last}; there are {tokens_n.size} tokens, so 0 … "
            f"{tokens_n.size} is wanted"
        )
    return np.require(tokens_n, None, ["C", "A"]), np.require(offsets_d1, np.int64, ["C", "A"])


def _hash_in_step(tokens: NDArray[np.int32], offsets: NDArray[np.int64], seed: int) -> Hashes:
    """XXH64 by its specification, version 0.2.0, all documents in step with one another.

    The specification's step for single bytes is left out: a token has four.
    """
    # Two zeros behind, so that a masked-out look-up always finds something.
    words = np.append(tokens, np.zeros(2, np.int32)).astype("<i4").view("<u4").astype(np.uint64)
    start, count = offsets[:-1], np.diff(offsets)
    stripes = count // STRIPE
    seed_d = np.full(len(count), seed, np.uint64)

    hashes = seed_d + PRIME_5
    if long := int(stripes.max(initial=0)):
        whole = _stripes(words, start, stripes, long, seed_d)
        hashes = np.where(stripes > 0, whole, hashes)
    hashes += count.astype(np.uint64) * np.uint64(4)

    at, left = start + stripes * STRIPE, count % STRIPE
    for pair in range(STRIPE // 2 - 1):
        two = left >= 2 * (pair + 1)
        lane = _lane(words, np.where(two, at + 2 * pair, 0))
        mixed = _rotate(hashes ^ _round(np.zeros_like(lane), lane), 27) * PRIME_1 + PRIME_4
        hashes = np.where(two, mixed, hashes)
    one = words[np.where(left % 2 == 1, at + left - 1, 0)]
    mixed = _rotate(hashes ^ one * PRIME_1, 23) * PRIME_2 + PRIME_3
    return _avalanche(np.where(left % 2 == 1, mixed, hashes))


def _stripes(
    words: Hashes, start: NDArray[np.int64], stripes: NDArray[np.int64], longest: int, seed: Hashes
) -> Hashes:
    """Accumulate all whole stripes and converge. Meaningless for documents without one."""
    acc = [seed + PRIME_1 + PRIME_2, seed + PRIME_2, seed.copy(), seed - PRIME_1]
    by_length = np.argsort(-stripes, kind="stable")
    rising = -stripes[by_length]
    for s in range(longest):
        # In order of falling length, the documents that have a stripe s stand in front.
        docs = by_length[: int(np.searchsorted(rising, -s))]
        for i in range(4):
            acc[i][docs] = _round(acc[i][docs], _lane(words, start[docs] + s * STRIPE + 2 * i))
    hashes = sum((_rotate(a, r) for a, r in zip(acc, (1, 7, 12, 18), strict=True)), seed * 0)
    for a in acc:
        hashes = (hashes ^ _round(np.zeros_like(a), a)) * PRIME_1 + PRIME_4
    return hashes


def _lane(words: Hashes, at: NDArray[np.int64]) -> Hashes:
    """The 64 bits of two tokens; the first is the low half."""
    return words[at] | words[at + 1] << np.uint64(32)


def _rotate(x: Hashes, by: int) -> Hashes:
    return x << np.uint64(by) | x >> np.uint64(64 - by)


def _round(acc: Hashes, lane: Hashes) -> Hashes:
    return _rotate(acc + lane * PRIME_2, 31) * PRIME_1


def _avalanche(h: Hashes) -> Hashes:
    h = (h ^ h >> np.uint64(33)) * PRIME_2
    h = (h ^ h >> np.uint64(29)) * PRIME_3
    return h ^ h >> np.uint64(32)
