"""Matrix products on AMX tiles, of operands that are sums of two bfloat16 ("bf16x3").

The functions have the names and meanings of those in gemm.py; csrc/split.h has the method. Error
on Gaussian data, of the result's norm: 4e-6 for float32 operands, where int16 has 1.5e-4 and
bfloat16 2.9e-3. Operands that are bfloat16 are taken as they are: what is left is the rounding of
float32 sums.

M rows, K = d_in, N = d_out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, tensors
from trimpot.kernels.cpp.gemm import GRADIENT_BLOCK, PANEL, ceil_div, operand, readable

TILE_ROWS = 32
STEP = 32
"""Items of the contraction that one tile product takes."""
NOT_FINITE, EXACT = 0, 1


@dataclass
class Pack:
    """One weight [N, K], for x Wᵀ and for dY W: 4 bytes an item, 2 of what was bfloat16."""

    handle: Any
    rows: int
    depth: int
    high: torch.Tensor
    low: torch.Tensor | None
    even = True
    """Items are not scaled: any matrix may be multiplied with what was split for this one."""


@dataclass
class Group:
    """Packs of weights that share their input."""

    packs: list[Pack]
    block: int
    even = True

    @property
    def bytes(self) -> int:
        return sum(
            2 * (p.high.numel() + (p.low.numel() if p.low is not None else 0)) for p in self.packs
        )


def pack_weights(weights: Sequence[torch.Tensor]) -> Group | None:
    """Pack weights [N_j, K], float32 or bfloat16 → None where an item is not finite."""
    block = native.extension().gemm_block_length(weights[0].shape[1])
    packs: list[Pack] = []
    for weight in weights:
        # Half as much memory where the values are bfloat16's, as most checkpoints' are; for others
        # the packing is done twice, once for all.
        pack = _pack(readable(weight), block, low=False) or _pack(readable(weight), block, low=True)
        if pack is None:
            return None
        packs.append(pack)
    return Group(packs, block)


def _pack(weight: torch.Tensor, block: int, low: bool) -> Pack | None:
    """In blocks of `block` items along K; None too where a low part is needed and not asked for."""
    rows, depth = weight.shape
    count, blocks = ceil_div(rows, PANEL), ceil_div(depth, block)
    extension = native.extension()
    items = count * blocks * block * PANEL
    high = torch.empty(items, dtype=torch.bfloat16)
    rest = torch.empty(items, dtype=torch.bfloat16) if low else None

    def handle(of_low: torch.Tensor | None) -> Any:
        addresses = high.data_ptr(), 0 if of_low is None else of_low.data_ptr()
        return extension.SplitPack(rows, depth, count, block, blocks, *addresses)

    found = extension.split_pack(handle(rest), operand(weight))
    if found == NOT_FINITE or (found != EXACT and rest is None):
        return None
    kept = None if found == EXACT else rest
    return Pack(handle(kept), rows, depth, high, kept)


@dataclass
class Rows:
    """A left operand. Good until this thread splits the next one: they share their memory."""

    handle: Any
    memory: torch.Tensor


_scratch = tensors.Scratch()


def _split(x: torch.Tensor, block: int) -> Rows:
    rows, width = x.shape
    padded, blocks = ceil_div(rows, TILE_ROWS) * TILE_ROWS, ceil_div(width, block)
    items = blocks * padded * block
    address, stride, bf16 = operand(x)
    memory = _scratch.take(items if bf16 else 2 * items, torch.bfloat16)
    high = memory.data_ptr()
    extension = native.extension()
    handle = extension.SplitRows(rows, padded, block, blocks, high, 0 if bf16 else high + 2 * items)
    extension.split_rows(address, stride, bf16, width, handle)
    return Rows(handle, memory)


def quantise_input(x: torch.Tensor, group: Group) -> Rows:
    """x [M, K], for `forward` with any pack of the group."""
    return _split(x, group.block)


def quantise_gradient(dy: torch.Tensor, _: Pack) -> Rows:
    """dY [M, N], for `gradient`."""
    return _split(dy, GRADIENT_BLOCK)


forward: Any = gemm.forward
gradient: Any = gemm.gradient
"""The extension tells by the handles which arithmetic is meant."""


def skinny(x: Rows, right_RK: torch.Tensor, group: Group, out: torch.Tensor) -> None:
    """out [M, R] = x Aᵀ, A [R, K] float32."""
    _skinny(x, right_RK, group.block, out)


def skinny_gradient(dy: Rows, b_NR: torch.Tensor, _: Pack, scale: float, out: torch.Tensor) -> None:
    """out [M, R] = scale · dY B, B [N, R] float32."""
    _skinny(dy, b_NR.T * scale, GRADIENT_BLOCK, out)


def _skinny(x: Rows, right: torch.Tensor, block: int, out: torch.Tensor) -> None:
    pack = _pack(right.contiguous(), block, low=True)
    if pack is None:  # an adapter that is not finite
        out.fill_(float("nan"))
        return
    forward(x, pack, out, None, None)
