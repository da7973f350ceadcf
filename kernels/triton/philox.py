"""Counter-based dropout in Triton: the bits of ops/philox.py, made again wherever they are needed.

Philox4x32-10 with key (seed low, seed high) and counter (column // 4, row low, row high, 0): one
call gives the words of four neighbouring columns, so a tile costs a quarter of its elements in
calls, each about 80 integer instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimpot.kernels.ops.philox import threshold

EVERY = 2**32
"""A limit above every word: nothing is dropped."""


def limit(p: float) -> int:
    """Words under this are kept; at p = 0 that is every word, as in ops/philox.py: dropped."""
    return threshold(p) if p else EVERY


@triton.jit
def keep_mask(seed, limit, row, first_column, COLUMNS: tl.constexpr):
    """int8 [rows, COLUMNS], −1 where kept, else 0: columns first_column … (a multiple of 4).

    seed, limit: int64; row: int64 [rows], counted from the start of the whole input. Bytes and no
    booleans: AMD keeps each boolean in a pair of scalar registers, of which it has 50.
    """
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    column = group.to(tl.uint32)[None, :] + low * 0
    high = (row >> 32).to(tl.uint32)[:, None] + column * 0
    w0, w1, w2, w3 = tl.philox(seed, column, low + column * 0, high, column * 0)
    even = tl.join(_under(w0, limit), _under(w2, limit))
    odd = tl.join(_under(w1, limit), _under(w3, limit))
    return tl.reshape(tl.join(even, odd), (row.shape[0], COLUMNS))


@triton.jit
def _under(word, limit):
    return ((word.to(tl.int64) - limit) >> 32).to(tl.int8)


@triton.jit
def kept(values, mask):
    """values where the mask is −1, else 0 (also for NaN)."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True) & mask.to(tl.int16)
    else:
        bits = values.to(tl.int32, bitcast=True) & mask.to(tl.int32)
    return bits.to(values.dtype, bitcast=True)
