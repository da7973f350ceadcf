"""Matrix products of the C++ extension: frozen weights in an integer pack, or fp32 as they are.

M rows, K = d_in, N = d_out. The method and its error bound stand in csrc/gemm.h. Measured against
float64 on Gaussian data, with and without outliers × 20: int16 1.5e-4 of the result's norm, where
bfloat16 operands give 2.9e-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trimpot.kernels import native
from trimpot.kernels.cpp import tensors
from trimpot.kernels.errors import KernelError
from trimpot.kernels.mapped import give_back_pages

TILE_ROWS = 14
PANEL = 32
GRADIENT_BLOCK = 256
PROBES = 64
"""Items of a weight that are looked at, to notice that it changed behind autograd's back …"""
NEAR = 1024
"""… among its first ones where its pages were given back: each brings 64 KiB of the file in."""
UNEVEN = 4.0
"""From where on a weight's scales serve no other matrix. An adapter's product with x·c divides by
c: its error grows by up to max c · √mean c⁻², and int16 has 5 times to spare under half of bf16's
(1.5e-4 of 8e-4). Random weights have 1.2; a column of W and of x that is × 20 has 20."""


@dataclass
class Pack:
    """One weight [N, K] as integers, for x Wᵀ and for dY W. 2 bytes an item."""

    handle: Any
    rows: int
    depth: int
    row_scale: torch.Tensor
    gradient_limit: torch.Tensor
    q: torch.Tensor

    @functools.cached_property
    def even(self) -> bool:
        """Whether `skinny_gradient` is as good as the product with W itself."""
        return _even(self.row_scale[: self.rows])


@dataclass
class Group:
    """Packs of weights that share their input, hence the scaling of its columns."""

    packs: list[Pack]
    column_scale: torch.Tensor
    limit: torch.Tensor
    block: int

    @functools.cached_property
    def even(self) -> bool:
        """Whether `skinny` is as good as the product with W itself."""
        return _even(self.column_scale)

    @property
    def bytes(self) -> int:
        return sum(pack.q.numel() * 2 for pack in self.packs)


def _even(scale: torch.Tensor) -> bool:
    """A zero, whose items are lost in x·c, is uneven too."""
    return bool(scale.max() * scale.double().pow(-2).mean().sqrt() < UNEVEN)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pack_weights(weights: Sequence[torch.Tensor]) -> Group | None:
    """Pack weights [N_j, K], float32 or bfloat16 → None where an item is not finite."""
    extension = native.extension()
    weights = [readable(weight) for weight in weights]
    depth = weights[0].shape[1]
    block = extension.gemm_block_length(depth)
    blocks = ceil_div(depth, block)
    column_scale, limit = torch.empty(depth), torch.empty(blocks)
    packs: list[Pack] = []
    for weight in weights:
        panels = ceil_div(weight.shape[0], PANEL)
        q = torch.empty(panels * blocks * block * PANEL, dtype=torch.int16)
        row_scale = torch.empty(panels * PANEL)
        gradient_limit = torch.empty(ceil_div(panels * PANEL, GRADIENT_BLOCK))
        parts = (q, row_scale, column_scale, limit, gradient_limit)
        handle = extension.Pack(
            weight.shape[0], depth, panels, block, blocks, *(part.data_ptr() for part in parts)
        )
        packs.append(Pack(handle, weight.shape[0], depth, row_scale, gradient_limit, q))
    operands = [operand(weight) for weight in weights]
    if not extension.gemm_pack([pack.handle for pack in packs], operands):
        return None
    return Group(packs, column_scale, limit, block)


@dataclass
class _Cached:
    state: tuple[Any, ...]
    group: Any = field(repr=False)
    away: bool
    """Whether pages of the weights have been given back to the file that they are mapped from."""


Make = Callable[[Sequence[torch.Tensor]], Any]
_cache: Any = WeakIdKeyDictionary()
"""{first weight of a group: _Cached}: a pack lives as long as the weight it was made from."""


def packed(weights: Sequence[torch.Tensor], make: Make = pack_weights) -> Any:
    """The pack of frozen weights, made once. Those that ZeRO-3 brings and takes are packed anew.

    Weights in a mapped file are read no more once they are packed: their pages go.
    """
    if any(hasattr(weight, "ds_id") for weight in weights):
        return make(weights)
    found: _Cached | None = _cache.get(weights[0])
    if found is None or found.state != _states(make, weights, found.away):
        group = make(weights)
        # Where none was packed, all will be read again.
        gone = [0 if group is None else give_back_pages(weight) for weight in weights]
        away = any(gone)
        found = _Cached(_states(make, weights, away), group, away)
        _cache[weights[0]] = found
    return found.group


def _states(make: Make, weights: Sequence[torch.Tensor], away: bool) -> tuple[Any, ...]:
    return (make, *(_state(weight, away) for weight in weights))


def _state(weight: torch.Tensor, away: bool) -> tuple[Any, ...]:
    """What changes when a weight does: its memory, its version, and some of its items.

    A write through `.data` moves neither address nor version.
    """
    version = -1 if weight.is_inference() else weight._version
    flat = weight.detach()
    if weight.is_contiguous() and weight.numel():
        flat = flat.view(-1)[: NEAR if away else None]
        flat = flat[:: max(1, flat.numel() // PROBES)]
    seen = float(flat.double().sum())
    return (weight.data_ptr(), version, tuple(weight.shape), weight.stride(), weight.dtype, seen)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """As the extension reads matrices: float32 or bfloat16, items of a row side by side."""
    if tensor.device.type != "cpu":
        raise KernelError(f"a tensor is on {tensor.device}; the cpp backend computes on the CPU")
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    if (tensor.shape[1] > 1 and tensor.stride(1) != 1) or tensor.stride(0) < tensor.shape[1]:
        tensor = tensor.contiguous()  # an expanded matrix has rows at distance 0
    return tensor.detach()


def single(tensor: torch.Tensor) -> torch.Tensor:
    """The same in float32."""
    return readable(tensor.float())


def operand(matrix: torch.Tensor) -> tuple[int, int, bool]:
    """(address, items from row to row, whether bfloat16) of a readable matrix."""
    return matrix.data_ptr(), matrix.stride(0), matrix.dtype == torch.bfloat16


@dataclass
class Rows:
    """A left operand as integers: x times the columns' scales, scaled row by row.

    Good until this thread quantises the next one: they may share their memory.
    """

    handle: Any
    limits: torch.Tensor
    memory: tuple[torch.Tensor, torch.Tensor]


_items, _scales = tensors.Scratch(), tensors.Scratch()


def quantise(x: torch.Tensor, factor: torch.Tensor, limits: torch.Tensor, block: int) -> Rows:
    """x [M, width] · factor [≥ width], in blocks of `block` whose norms keep to `limits`."""
    rows, width = x.shape
    padded, blocks = ceil_div(rows, TILE_ROWS) * TILE_ROWS, ceil_div(width, block)
    extension = native.extension()
    scales = blocks * padded
    memory = _items.take(scales * block, torch.int16), _scales.take(scales, torch.float32)
    handle = extension.Rows(rows, padded, block, blocks, *(part.data_ptr() for part in memory))
    address, stride, bf16 = operand(x)
    extension.gemm_quantise(
        address, stride, bf16, width, factor.data_ptr(), limits.data_ptr(), handle
    )
    return Rows(handle, limits, memory)


def quantise_input(x: torch.Tensor, group: Group) -> Rows:
    """x [M, K], for `forward` with any pack of the group."""
    return quantise(x, group.column_scale, group.limit, group.block)


def quantise_gradient(dy: torch.Tensor, pack: Pack) -> Rows:
    """dY [M, N], for `gradient` with this pack."""
    return quantise(dy, pack.row_scale, pack.gradient_limit, GRADIENT_BLOCK)


@dataclass
class Update:
    """A low-rank part of a result, added in fp32 while its tile is in registers.

    left [M, R]; right: of `forward` as `panels` makes it, of `gradient` [R, K].
    """

    left: torch.Tensor
    right: torch.Tensor

    def arguments(self) -> tuple[int, int, int, int]:
        return (
            self.left.data_ptr(),
            self.left.stride(0),
            self.right.data_ptr(),
            self.left.shape[1],
        )


NO_UPDATE = (0, 0, 0, 0)


def panels(b_NR: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · B [N, R] as [⌈N/32⌉, R, 32], zeros past N."""
    rows, rank = b_NR.shape
    count = ceil_div(rows, PANEL)
    padded = torch.zeros(count * PANEL, rank)
    torch.mul(b_NR, scale, out=padded[:rows])
    return padded.view(count, PANEL, rank).transpose(1, 2).contiguous()


def forward(
    x: Rows, pack: Pack, out: torch.Tensor, bias: torch.Tensor | None, update: Update | None
) -> None:
    """out [M, N] = x Wᵀ + bias + update."""
    native.extension().gemm_forward(
        x.handle,
        pack.handle,
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        *(update.arguments() if update else NO_UPDATE),
    )


def gradient(dy: Rows, pack: Pack, out: torch.Tensor, add: bool, update: Update | None) -> None:
    """out [M, K] (+)= dY W + update."""
    native.extension().gemm_gradient(
        dy.handle,
        pack.handle,
        out.data_ptr(),
        out.stride(0),
        add,
        *(update.arguments() if update else NO_UPDATE),
    )


def skinny(x: Rows, right_RK: torch.Tensor, group: Group, out: torch.Tensor) -> None:
    """out [M, R] = x Aᵀ of the x that was quantised, A [R, K] float32."""
    rank, depth = right_RK.shape
    _skinny(x, right_RK, 1, depth, group.column_scale, depth, rank, out, 1.0)


def skinny_gradient(
    dy: Rows, b_NR: torch.Tensor, pack: Pack, scale: float, out: torch.Tensor
) -> None:
    """out [M, R] = scale · dY B of the dY that was quantised, B [N, R] float32."""
    depth, rank = b_NR.shape
    _skinny(dy, b_NR, rank, 1, pack.row_scale, depth, rank, out, scale)


def _skinny(
    x: Rows,
    data: torch.Tensor,
    row: int,
    column: int,
    divisor: torch.Tensor,
    depth: int,
    rank: int,
    out: torch.Tensor,
    factor: float,
) -> None:
    native.extension().gemm_skinny(
        x.handle,
        x.limits.data_ptr(),
        data.data_ptr(),
        row,
        column,
        divisor.data_ptr(),
        depth,
        rank,
        out.data_ptr(),
        out.stride(0),
        factor,
    )


def forward_fp32(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    update: Update | None,
) -> None:
    """out [M, N] = x Wᵀ + bias + update; x float32, W float32 or bfloat16."""
    native.extension().gemm_forward_fp32(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        *operand(weight),
        *weight.shape,
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        *(update.arguments() if update else NO_UPDATE),
    )


def gradient_fp32(
    dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool, update: Update | None
) -> None:
    """out [M, K] (+)= dY W + update; dY float32, W float32 or bfloat16."""
    native.extension().gemm_gradient_fp32(
        dy.data_ptr(),
        dy.stride(0),
        dy.shape[0],
        *operand(weight),
        *weight.shape,
        out.data_ptr(),
        out.stride(0),
        add,
        *(update.arguments() if update else NO_UPDATE),
    )


def outer(a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """factor · aᵀ b → [p, n], of a [M, p] and b [M, n], both float32."""
    out = torch.empty(a.shape[1], b.shape[1])
    native.extension().gemm_outer(
        a.data_ptr(),
        a.stride(0),
        b.data_ptr(),
        b.stride(0),
        a.shape[0],
        a.shape[1],
        b.shape[1],
        out.data_ptr(),
        out.stride(0),
        factor,
    )
    return out


def dropped(x: torch.Tensor, first_row: int, seed: int, p: float) -> torch.Tensor:
    """D · x for rows [first_row, …) of the whole input; see kernels/ops/philox.py."""
    out = tensors.empty(x.shape)
    native.extension().dropout(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        first_row,
        seed % 2**64,
        min(2**32 - 1, round((1 - p) * 2**32)),
        1 / (1 - p),
        out.data_ptr(),
    )
    return out
