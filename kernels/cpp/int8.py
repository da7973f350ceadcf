"""Matrix products in 8-bit integers, for who asks for them: `cpu_gemm: int8`.

The functions have the names and meanings of those in gemm.py; csrc/bytes.h has the method. Error
of the result's norm on Gaussian data: 1e-2, where bfloat16 has 2.9e-3; an outlier × 20 in a block
of a row takes most bits from the rest of it. Adapters stay fp32.

M rows, K = d_in, N = d_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, tensors
from trimpot.kernels.cpp.gemm import (
    NO_UPDATE,
    PANEL,
    TILE_ROWS,
    Update,
    ceil_div,
    operand,
    readable,
)


@dataclass
class Side:
    """One direction of a weight; 1 byte an item."""

    handle: Any
    block: int
    q: torch.Tensor
    scale: torch.Tensor


@dataclass
class Pack:
    """One weight [N, K]: for x Wᵀ, and for dY W."""

    forward: Side
    gradient: Side
    even = False
    """What is quantised keeps too few digits for adapters: they read the operand itself."""


@dataclass
class Group:
    """Packs of weights that share their input."""

    packs: list[Pack]
    even = False

    @property
    def bytes(self) -> int:
        return sum(side.q.numel() for p in self.packs for side in (p.forward, p.gradient))


def pack_weights(weights: Sequence[torch.Tensor]) -> Group | None:
    """Pack weights [N_j, K], float32 or bfloat16 → None where an item is not finite."""
    packs: list[Pack] = []
    for weight in map(readable, weights):
        forward, gradient = _side(weight, False), _side(weight, True)
        if forward is None or gradient is None:
            return None
        packs.append(Pack(forward, gradient))
    return Group(packs)


def _side(weight: torch.Tensor, transposed: bool) -> Side | None:
    rows, depth = weight.T.shape if transposed else weight.shape
    extension = native.extension()
    block = extension.gemm_block_length(depth)
    panels, blocks = ceil_div(rows, PANEL), ceil_div(depth, block)
    q = torch.empty(panels * blocks * block * PANEL, dtype=torch.uint8)
    scale = torch.empty(blocks * panels * PANEL)
    handle = extension.BytePack(rows, depth, panels, block, blocks, q.data_ptr(), scale.data_ptr())
    if not extension.byte_pack(handle, operand(weight), transposed):
        return None
    return Side(handle, block, q, scale)


@dataclass
class Rows:
    """A left operand. Good until this thread quantises the next one: they share their memory."""

    handle: Any
    memory: torch.Tensor


_scratch = tensors.Scratch()


def _rows(x: torch.Tensor, block: int) -> Rows:
    rows, width = x.shape
    padded, blocks = ceil_div(rows, TILE_ROWS) * TILE_ROWS, ceil_div(width, block)
    scales = blocks * padded
    wanted = scales * (block + 8)  # an item is a byte; a block has a float and an int besides
    memory = _scratch.take(wanted, torch.uint8)
    q = memory.data_ptr()
    scale = q + scales * block
    extension = native.extension()
    handle = extension.ByteRows(rows, padded, block, blocks, q, scale, scale + 4 * scales)
    address, stride, bf16 = operand(x)
    extension.byte_rows(address, stride, bf16, width, handle)
    return Rows(handle, memory)


def quantise_input(x: torch.Tensor, group: Group) -> Rows:
    """x [M, K], for `forward` with any pack of the group."""
    return _rows(x, group.packs[0].forward.block)


def quantise_gradient(dy: torch.Tensor, pack: Pack) -> Rows:
    """dY [M, N], for `gradient` with this pack."""
    return _rows(dy, pack.gradient.block)


def forward(
    x: Rows, pack: Pack, out: torch.Tensor, bias: torch.Tensor | None, update: Update | None
) -> None:
    """out [M, N] = x Wᵀ + bias + update."""
    _multiply(x, pack.forward, out, bias, False, update)


def gradient(dy: Rows, pack: Pack, out: torch.Tensor, add: bool, update: Update | None) -> None:
    """out [M, K] (+)= dY W + update."""
    if update:
        update = Update(update.left, gemm.panels(update.right.T, 1.0))
    _multiply(dy, pack.gradient, out, None, add, update)


def _multiply(
    x: Rows, side: Side, out: torch.Tensor, bias: torch.Tensor | None, add: bool,
    update: Update | None,
) -> None:  # fmt: skip
    native.extension().byte_multiply(
        x.handle,
        side.handle,
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        add,
        *(update.arguments() if update else NO_UPDATE),
    )
