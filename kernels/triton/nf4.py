"""4-bit weights to their type in one pass, in Triton; definition in ops/nf4.py.

A program takes 128 blocks of 64 items, a thread one of them: two loads of 16 bytes and whatever the
block has one of. An item's code is chosen by its four bits, which costs 15 selections and no load.
Compiled without fma, so that each operation rounds by itself and the bits are the definition's.
Reads half a byte an item and the absmax of each block, writes the item.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimpot.kernels.ops.nf4 import BLOCK, NESTED_BLOCK, dynamic_map
from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch

BLOCKS = 128
"""Of a program; they have one nested absmax in common."""
assert NESTED_BLOCK % BLOCKS == 0


@triton.jit
def _code(level):
    """CODE[level], level 0 … 15."""
    a, b, c = (level & 1) != 0, (level & 2) != 0, (level & 4) != 0
    x0 = tl.where(a, -0.6961928009986877, -1.0)
    x1 = tl.where(a, -0.39491748809814453, -0.5250730514526367)
    x2 = tl.where(a, -0.18477343022823334, -0.28444138169288635)
    x3 = tl.where(a, 0.0, -0.09105003625154495)
    low = tl.where(c, tl.where(b, x3, x2), tl.where(b, x1, x0))
    x4 = tl.where(a, 0.16093020141124725, 0.07958029955625534)
    x5 = tl.where(a, 0.33791524171829224, 0.24611230194568634)
    x6 = tl.where(a, 0.5626170039176941, 0.44070982933044434)
    x7 = tl.where(a, 1.0, 0.7229568362236023)
    high = tl.where(c, tl.where(b, x7, x6), tl.where(b, x5, x4))
    return tl.where(level >= 8, high, low)


@triton.jit
def nf4_dequantise(
    PACKED, ABSMAX, NESTED, MAP, OUT, offset, bytes, count, blocks,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = BLOCK // 4  # bytes of half a block
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = block < blocks
    if DOUBLE:
        level = tl.load(ABSMAX + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(MAP + level) * tl.load(NESTED + first // NESTED_BLOCK) + offset
    else:
        scale = tl.load(ABSMAX + block, mask=inside, other=0.0)
    for half in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        at = block[:, None] * (2 * QUARTER) + half * QUARTER + tl.arange(0, QUARTER)[None, :]
        byte = tl.load(PACKED + at, mask=at < bytes, other=0)
        both = tl.join(_code(byte >> 4), _code(byte & 15))
        x = tl.reshape(both, (BLOCKS, 2 * QUARTER)) * scale[:, None]
        item = block[:, None] * BLOCK + half * 2 * QUARTER + tl.arange(0, 2 * QUARTER)[None, :]
        tl.store(OUT + item, x.to(OUT.dtype.element_ty), mask=item < count)


def forward(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: float,
    out: torch.Tensor,
) -> None:
    check("nf4", out, packed)
    double = absmax.dtype == torch.uint8
    launch(
        nf4_dequantise,
        (triton.cdiv(absmax.numel(), BLOCKS),),
        packed, absmax, nested_absmax if double else absmax, nested_map if double else absmax, out,
        offset, packed.numel(), out.numel(), absmax.numel(),
        DOUBLE=double, BLOCKS=BLOCKS, BLOCK=BLOCK, NESTED_BLOCK=NESTED_BLOCK, threads=BLOCKS,
        enable_fp_fusion=False,
    )  # fmt: skip


def proof_cases() -> list[Case]:
    def arguments(make: Maker, n: Sizes, double: bool) -> dict[str, object]:
        items = n["N"] * n["K"]
        blocks = items // BLOCK
        single = torch.float32
        absmax, nested, table = make.normal(blocks, dtype=single).abs_(), (0,), torch.empty(0)
        if double:
            absmax = make.integers(0, 256, blocks, dtype=torch.uint8)
            nested, table = (-(-blocks // NESTED_BLOCK),), dynamic_map()
        return {
            "packed": make.integers(0, 256, items // 2, dtype=torch.uint8),
            "absmax": absmax,
            "nested_absmax": make.normal(*nested, dtype=single).abs_(),
            "nested_map": make.values(table.tolist(), single),
            "offset": 1.5 if double else 0.0,
            "out": make.empty(items),
        }

    def budget(n: Sizes, size: int, double: bool) -> float:
        items = n["N"] * n["K"]
        blocks = items / BLOCK
        scales = blocks + 4 * blocks / NESTED_BLOCK + 1024 if double else 4 * blocks
        return items * (0.5 + size) + scales

    def case(double: bool) -> Case:
        return Case(
            "nf4", "forward", lambda make, n: arguments(make, n, double),
            large={"N": 14336, "K": 4096}, small={"N": 64, "K": 512},
            budget=lambda n, size: budget(n, size, double), wide_loads=True, in_place=("out",),
            variant="" if double else "single",
        )  # fmt: skip

    return [case(True), case(False)]
