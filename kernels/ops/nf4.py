"""Weights in 4 bits: NF4 with blockwise absmax and double quantisation (Dettmers et al. 2023,
"QLoRA", §3 and appendix E), in the layout of bitsandbytes.

A weight of n items, row by row, is cut into blocks of 64. With s_b = max |w| of block b:

    q = the i whose CODE[i] is nearest to w/s_b   (of two as near, the lower)
    byte j = q₂ⱼ·16 + q₂ⱼ₊₁,   ŵ = CODE[q]·s_b

Double quantisation holds s_b − offset, offset the mean of all s_b, in 8 bits: blocks of 256 with an
absmax of their own, and the nearest entry of a dynamic map (Dettmers et al. 2022, "8-bit
optimizers via block-wise quantization", §2.2):

    ŝ_b = MAP[c_b]·s′_{b/256} + offset

All arithmetic is float32, each operation rounds by itself, and ŵ is rounded to its type once, so
all backends give the same bits. A weight takes 0.5 + 1/64 + 4/16384 = 0.516 bytes an item, without
double quantisation 0.5625.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import opmath

BLOCK, NESTED_BLOCK = 64, 256
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [−1, 1], and 0 (QLoRA, appendix E)."""
ZERO = CODE.index(0.0)
SMALLEST = torch.finfo(torch.float32).tiny
"""Of an absmax: a block below has no reciprocal in float32, and is held as zeros."""
CHUNK = 1 << 20
"""Items that the definition takes at once, a multiple of BLOCK: it makes 20 bytes of each."""


@dataclass(frozen=True)
class Nf4:
    """A weight in 4 bits. n items, B = ⌈n/64⌉ blocks."""

    packed: torch.Tensor
    """uint8 [⌈n/2⌉]"""
    absmax: torch.Tensor
    """float32 [B]; doubly quantised uint8 [B]."""
    nested_absmax: torch.Tensor
    """float32 [⌈B/256⌉], empty without double quantisation, as is `nested_map`."""
    nested_map: torch.Tensor
    """float32 [256]"""
    offset: float
    shape: tuple[int, ...]

    @property
    def double_quant(self) -> bool:
        return self.absmax.dtype == torch.uint8


def quantise(weight: torch.Tensor, double_quant: bool = True, backend: str = "auto") -> Nf4:
    """A float32, bf16 or fp16 weight of any shape in 4 bits, on its device.

    Raises KernelError for other types, and where an item is not finite.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"nf4: the weight is {weight.dtype}; float32, bf16 or fp16 is wanted")
    if not bool(torch.isfinite(weight).all()):
        raise KernelError("nf4: the weight holds items that are not finite")
    if backend == "auto":  # Triton reads this format and does not write it
        backend = resolve("nf4", backend, weight) if weight.device.type == "cpu" else "torch"
    packed, absmax = implementation("nf4", backend).quantise_flat(weight.detach().reshape(-1))
    shape, none = tuple(weight.shape), absmax.new_empty(0)
    if not double_quant:
        return Nf4(packed, absmax, none, none, 0.0, shape)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    levels, nested_absmax = _quantise_absmax(absmax - offset)
    nested_map = dynamic_map().to(absmax.device)
    return Nf4(packed, levels, nested_absmax, nested_map, offset.item(), shape)


def dequantise(weight: Nf4, dtype: torch.dtype, backend: str = "auto") -> torch.Tensor:
    """→ ŵ in `dtype`, of the weight's shape. Raises KernelError where parts do not go together."""
    check(weight)
    return _op(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_map,
        weight.offset,
        list(weight.shape),
        dtype,
        backend,
    )


def check(weight: Nf4) -> None:
    """Raises KernelError where sizes or types of the parts do not go together."""
    items = math.prod(weight.shape)
    blocks = -(-items // BLOCK)
    nested = (-(-blocks // NESTED_BLOCK), 256) if weight.double_quant else (0, 0)
    wanted = (-(-items // 2), blocks, *nested)
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_map)
    sizes = tuple(part.numel() for part in parts)
    types = (
        weight.packed.dtype == torch.uint8
        and weight.absmax.dtype in (torch.uint8, torch.float32)
        and weight.nested_absmax.dtype == weight.nested_map.dtype == torch.float32
    )
    if sizes != wanted or not types or not all(part.is_contiguous() for part in parts):
        raise KernelError(
            f"nf4: packed, absmax, nested absmax and map of a weight {weight.shape} have {sizes} "
            f"items of {', '.join(str(part.dtype) for part in parts)}; {wanted} of uint8, uint8 "
            "or float32, float32, float32, without gaps, are wanted"
        )


@functools.cache
def dynamic_map() -> torch.Tensor:
    """MAP, ascending, float32 [256]: 0, 1, and ±10^(i−6) times the centres of 2ⁱ equal parts of
    [0.1, 1], i from 0 to 6."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        values += [sign * v for sign in (1, -1) for v in (10.0 ** (i - 6) * centres).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def middles(levels: torch.Tensor) -> torch.Tensor:
    """Between neighbours: what is above the i-th is nearer to levels[i + 1]."""
    return (levels[1:] + levels[:-1]) / 2


@functools.cache
def thresholds() -> torch.Tensor:
    """Of CODE, float32 [15]."""
    return middles(torch.tensor(CODE, dtype=torch.float32))


def _quantise_absmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 256 to (entries of MAP, absmax)."""
    levels = middles(dynamic_map()).to(x.device)
    return _nearest(x, NESTED_BLOCK, levels)


def _nearest(
    x: torch.Tensor, block: int, between: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (uint8: how many of `between` are below x/absmax; absmax float32 of each block)."""
    count = x.numel()
    blocks = -(-count // block)
    rows = torch.nn.functional.pad(x.float(), (0, blocks * block - count)).view(blocks, block)
    absmax = rows.abs().amax(1) if blocks else rows.new_empty(0)
    inverse = torch.where(absmax >= SMALLEST, 1 / absmax, torch.zeros_like(absmax))
    scaled = (rows * inverse[:, None]).flatten()[:count]
    return torch.bucketize(scaled, between, out_int32=True).to(torch.uint8), absmax


def quantise_flat(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat weight [n] → (packed uint8 [⌈n/2⌉], absmax float32 [⌈n/64⌉])."""
    between = thresholds().to(weight.device)
    parts = [_nearest(part, BLOCK, between) for part in weight.split(CHUNK)]
    packed = [_pack(codes) for codes, _ in parts]
    return torch.cat(packed), torch.cat([absmax for _, absmax in parts])


def _pack(codes: torch.Tensor) -> torch.Tensor:
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=ZERO)
    return even[::2] << 4 | even[1::2]


def forward(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: float,
    out: torch.Tensor,
) -> None:
    """out [n] = ŵ; in float64 for an `out` of that."""
    wide = opmath(out.dtype)
    scale = absmax.to(wide)
    if absmax.dtype == torch.uint8:
        of_block = nested_absmax.to(wide).repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        # offset as the float32 that it is
        scale = nested_map.to(wide)[absmax.long()] * of_block + torch.tensor(offset).to(scale)
    code = torch.tensor(CODE, dtype=wide, device=out.device)
    for first in range(0, out.numel(), CHUNK):
        part = out[first : first + CHUNK]
        bytes_ = packed[first // 2 : (first + CHUNK) // 2]
        levels = torch.stack((bytes_ >> 4, bytes_ & 15), 1).flatten()[: part.numel()]
        blocks = scale[first // BLOCK : (first + CHUNK) // BLOCK]
        part.copy_(code[levels.long()] * blocks.repeat_interleave(BLOCK)[: part.numel()])


@torch.library.custom_op("trimpot::nf4", mutates_args=())
def _op(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: float,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    out = torch.empty(math.prod(shape), dtype=dtype, device=packed.device)
    chosen = implementation("nf4", resolve("nf4", backend, out))
    chosen.forward(packed, absmax, nested_absmax, nested_map, offset, out)
    return out.view(list(shape))


@_op.register_fake
def _(packed, absmax, nested_absmax, nested_map, offset, shape, dtype, backend):
    return packed.new_empty(list(shape), dtype=dtype)
