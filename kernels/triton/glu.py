"""Gated linear units in one pass: y = act(gate)·up, for swiglu.py and geglu.py.

Both activations are act(g) = g·σ(v(g)): SiLU with v = g, GELU's tanh form with
v = 2·√(2/π)·(g + 0.044715·g³), since (1 + tanh u)/2 = σ(2u), which also keeps the digits that
1 + tanh loses for negative g. Then act′ = σ + g·σ·(1 − σ)·v′. All arithmetic is float32.

Traffic: forward reads 2 elements and writes 1, backward reads 3 and writes 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch
from trimpot.kernels.triton.layout import as_rows

BLOCK = 2048
"""Elements of a program: 16 a thread of 128, so that every load is 128 bits wide."""


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """The program's row and columns (int64); a row is cut into `blocks` blocks."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _sigmoid_argument(g, GELU: tl.constexpr):
    """v(g) and v′(g)."""
    if GELU:
        v = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        v = g
        slope = 1.0
    return v, slope


@triton.jit
def glu_forward(
    GATE, UP, Y, gate_stride, up_stride, columns, blocks, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column, mask = _place(columns, blocks, BLOCK)
    g = tl.load(GATE + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(UP + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    v, _ = _sigmoid_argument(g, GELU)
    y = g * tl.sigmoid(v) * u
    tl.store(Y + row * columns + column, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward(
    DY, GATE, UP, DGATE, DUP, dy_stride, gate_stride, up_stride, columns, blocks,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask = _place(columns, blocks, BLOCK)
    dy = tl.load(DY + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(GATE + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(UP + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    v, slope = _sigmoid_argument(g, GELU)
    sigma = tl.sigmoid(v)
    dup = dy * (g * sigma)
    dgate = dy * u * (sigma * (1.0 + g * (1.0 - sigma) * slope))
    at = row * columns + column
    tl.store(DUP + at, dup.to(DUP.dtype.element_ty), mask=mask)
    tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), mask=mask)


def forward(op: str, gelu: bool, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    check(op, gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate_MN, up_MN), grid, columns, blocks = _split(gate, up)
    launch(
        glu_forward, grid, gate_MN, up_MN, y, gate_MN.stride(0), up_MN.stride(0), columns, blocks,
        GELU=gelu, BLOCK=BLOCK, threads=128,
    )  # fmt: skip
    return y


def backward(
    op: str, gelu: bool, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    check(op, dy, gate, up)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    (dy_MN, gate_MN, up_MN), grid, columns, blocks = _split(dy, gate, up)
    launch(
        glu_backward, grid, dy_MN, gate_MN, up_MN, dgate, dup,
        dy_MN.stride(0), gate_MN.stride(0), up_MN.stride(0), columns, blocks,
        GELU=gelu, BLOCK=BLOCK, threads=128,
    )  # fmt: skip
    return dgate, dup


def _split(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...], int, int]:
    """The tensors as rows, the grid, the columns of a row and its blocks. Without gaps between
    the rows all is one row, and no block is cut short by a row's end."""
    if all(t.is_contiguous() for t in tensors):
        rows = [t.reshape(1, -1) for t in tensors]
    else:
        rows = [as_rows(t) for t in tensors]
    count, columns = rows[0].shape
    blocks = triton.cdiv(columns, BLOCK)
    return rows, (count * blocks,), columns, blocks


def cases_of(op: str) -> list[Case]:
    large, small = {"M": 8192, "N": 14336}, {"M": 8, "N": 3072}

    def operands(make: Maker, n: Sizes) -> dict[str, torch.Tensor]:
        return {name: make.normal(n["M"], n["N"]) for name in ("gate", "up")}

    def with_dy(make: Maker, n: Sizes) -> dict[str, torch.Tensor]:
        return {"dy": make.normal(n["M"], n["N"]), **operands(make, n)}

    return [
        Case(
            op, "forward", operands, large, small,
            budget=lambda n, size: 3 * n["M"] * n["N"] * size, wide_loads=True,
        ),
        Case(
            op, "backward", with_dy, large, small,
            budget=lambda n, size: 5 * n["M"] * n["N"] * size, wide_loads=True,
        ),
    ]  # fmt: skip
