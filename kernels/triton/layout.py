"""What the streaming kernels share: rows of a tensor, block sizes, and sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimpot.kernels.triton.launch import launch


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., N] → [M, N] whose last stride is 1: a view where there is one, else a copy."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.flatten(0, -2)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def threads_for(elements: int) -> int:
    """Threads of a program that holds that many elements: 16 a thread, which is two 128-bit loads
    of bf16; from 64 to 512."""
    return min(max(elements // 16, 64), 512)


@triton.jit
def _sum_rows(
    PARTIALS,
    OUT,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(PARTIALS + at, mask=mask, other=0.0), 0)
    tl.store(OUT + column, total.to(OUT.dtype.element_ty), mask=inside)


def sum_rows(partials_PN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ_p partials → [N] in `dtype`. The order depends on the shape alone: equal runs give equal
    bits, which atomics would not."""
    rows, columns = partials_PN.shape
    out = torch.empty(columns, dtype=dtype, device=partials_PN.device)
    block = 128
    launch(
        _sum_rows,
        (triton.cdiv(columns, block),),
        partials_PN, out, rows, columns,
        ROWS=16, COLUMNS=block, threads=128,
    )  # fmt: skip
    return out
