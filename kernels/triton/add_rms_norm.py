"""Residual add and RMS norm in one pass, in Triton; definition in ops/add_rms_norm.py.

    s = x + residual;  y = s · rstd · (offset + weight),  rstd = (mean_H s² + eps)^−½

    ŝ = s·rstd, g = dy·(offset + weight):  dx = ds + rstd·(g − ŝ·mean_H(g·ŝ)),  dw = Σ_M dy·ŝ

s is rounded to the working dtype before it is normed: backward sees the same s. Arithmetic is
float32. A program holds whole rows, so each element is read once: forward reads x, residual, weight
and writes y, s, rstd; backward reads dy, ds, s, weight, rstd and writes dx. dw, only where it is
wanted, comes as one partial sum a program, added up in a second pass in fixed order; a program
takes at least 32 rows then, so that the partials stay below 3 % of the traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimpot.kernels.errors import BackendError
from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch, processors
from trimpot.kernels.triton.layout import as_rows, sum_rows, threads_for

TILE = 4096
"""Elements that a program holds at once, if a row is not longer."""
LONGEST_ROW = 65536
ROWS_PER_PARTIAL = 32


@triton.jit
def add_rms_norm_forward(
    X, RESIDUAL, WEIGHT, Y, S, RSTD, x_stride, residual_stride, rows, columns, eps, offset,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    s = tl.load(X + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    s = s.to(tl.float32)
    at = row[:, None] * columns + column[None, :]
    if HAS_RESIDUAL:
        residual = row[:, None] * residual_stride + column[None, :]
        s += tl.load(RESIDUAL + residual, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(S.dtype.element_ty)
        tl.store(S + at, rounded, mask=mask)
        s = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / columns + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    weight = tl.load(WEIGHT + column, mask=column < columns, other=0.0).to(tl.float32) + offset
    y = s * rstd[:, None] * weight[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_backward(
    DY, DS, S, WEIGHT, RSTD, DX, PARTIALS, dy_stride, ds_stride, s_stride, rows, columns,
    rows_per_program, offset,
    HAS_DS: tl.constexpr, NEED_DW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, rows_per_program, ROWS):
        row = program * rows_per_program + step + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
        s = tl.load(S + row[:, None] * s_stride + column[None, :], mask=mask, other=0.0)
        dy, normed = dy.to(tl.float32), s.to(tl.float32) * rstd
        g = dy * weight[None, :]
        mean = tl.sum(g * normed, 1) / columns
        dx = rstd * (g - normed * mean[:, None])
        if HAS_DS:
            ds = tl.load(DS + row[:, None] * ds_stride + column[None, :], mask=mask, other=0.0)
            dx += ds.to(tl.float32)
        at = row[:, None] * columns + column[None, :]
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += tl.sum(dy * normed, 0)
    if NEED_DW:
        tl.store(PARTIALS + program * columns + column, dw, mask=inside)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check("add_rms_norm", x, residual, weight)
    rows, columns, tile = _tile(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    x_MH = as_rows(x)
    residual_MH = x_MH if residual is None else as_rows(residual)
    launch(
        add_rms_norm_forward,
        (triton.cdiv(rows, tile["ROWS"]),),
        x_MH, residual_MH, weight.contiguous(), y, s, rstd,
        x_MH.stride(0), residual_MH.stride(0), rows, columns, eps, offset,
        HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return y, s, rstd


def backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check("add_rms_norm", dy, ds, s, weight, rstd)
    rows, columns, tile = _tile(s)
    per_program = tile["ROWS"]
    if need_dw:
        wanted = max(triton.cdiv(rows, 2 * processors(s.device)), ROWS_PER_PARTIAL)
        per_program = triton.cdiv(wanted, per_program) * per_program
    programs = triton.cdiv(rows, per_program)
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    partials = torch.empty(
        (programs if need_dw else 0, columns), dtype=torch.float32, device=s.device
    )
    dy_MH, s_MH = as_rows(dy), as_rows(s)
    ds_MH = dy_MH if ds is None else as_rows(ds)
    launch(
        add_rms_norm_backward,
        (programs,),
        dy_MH, ds_MH, s_MH, weight.contiguous(), rstd.contiguous(), dx, partials,
        dy_MH.stride(0), ds_MH.stride(0), s_MH.stride(0), rows, columns, per_program, offset,
        HAS_DS=ds is not None, NEED_DW=need_dw, **tile,
    )  # fmt: skip
    return dx, sum_rows(partials, weight.dtype) if need_dw else weight.new_empty(0)


def _tile(x: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows and columns of x, and the tile that a program holds."""
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    if block > LONGEST_ROW:
        raise BackendError(
            f"add_rms_norm: triton takes rows of up to {LONGEST_ROW} elements, not {columns}; "
            "use backend torch"
        )
    rows_at_once = max(TILE // block, 1)
    tile = {"ROWS": rows_at_once, "COLUMNS": block, "threads": threads_for(rows_at_once * block)}
    return x.numel() // columns, columns, tile


def proof_cases() -> list[Case]:
    large, small = {"M": 8192, "H": 4096}, {"M": 128, "H": 2048}

    def forwards(make: Maker, n: Sizes) -> dict[str, object]:
        x, residual = make.normal(n["M"], n["H"]), make.normal(n["M"], n["H"])
        weight = make.normal(n["H"])
        return {"x": x, "residual": residual, "weight": weight, "eps": 1e-6, "offset": 0.0}

    def alone(make: Maker, n: Sizes) -> dict[str, object]:
        return forwards(make, n) | {"residual": None, "offset": 1.0}

    def backwards(make: Maker, n: Sizes, need_dw: bool) -> dict[str, object]:
        dy, ds, s = (make.normal(n["M"], n["H"]) for _ in range(3))
        rstd = (s.float().square().mean(-1) + 1e-6).rsqrt()
        given = {"dy": dy, "ds": ds, "s": s, "weight": make.normal(n["H"]), "rstd": rstd}
        return {**given, "offset": 0.0, "need_dw": need_dw}

    def rows(n: Sizes, size: int, count: int) -> int:
        """`count` tensors M×H, the weight, and rstd."""
        return (count * n["M"] * n["H"] + n["H"]) * size + 4 * n["M"]

    return [
        Case(
            "add_rms_norm", "forward", forwards, large, small,
            budget=lambda n, size: rows(n, size, 4), wide_loads=True,
        ),
        Case(
            "add_rms_norm", "forward", alone, large, small,
            budget=lambda n, size: rows(n, size, 2), wide_loads=True, variant="no residual",
        ),
        Case(
            "add_rms_norm", "backward", lambda make, n: backwards(make, n, True), large, small,
            budget=lambda n, size: rows(n, size, 4) + n["H"] * size, wide_loads=True,
        ),
        Case(
            "add_rms_norm", "backward", lambda make, n: backwards(make, n, False), large, small,
            budget=lambda n, size: rows(n, size, 4), wide_loads=True, variant="frozen",
        ),
    ]  # fmt: skip
