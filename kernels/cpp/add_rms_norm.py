"""Residual add and RMS norm in C++ (csrc/norm.cpp); definition in ops/add_rms_norm.py."""

from __future__ import annotations

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import address, as_float, as_rows, block_count, check, empty


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = check("add_rms_norm", x, residual)
    x_MH = as_rows(x)
    residual_MH = None if residual is None else as_rows(residual)
    wide = as_float(weight)
    y = empty(x.shape, x.dtype)
    s = empty((0,) if residual is None else x.shape, x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    native.extension().norm_forward(
        kind, x_MH.data_ptr(), x_MH.stride(0), address(residual_MH),
        0 if residual_MH is None else residual_MH.stride(0), wide.data_ptr(), y.data_ptr(),
        s.data_ptr(), rstd.data_ptr(), *x_MH.shape, eps, offset,
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
    kind = check("add_rms_norm", s, dy, ds)
    dy_MH, s_MH = as_rows(dy), as_rows(s)
    ds_MH = None if ds is None else as_rows(ds)
    rows, columns = s_MH.shape
    wide, rstd = as_float(weight), rstd.contiguous()
    dx = empty(s.shape, s.dtype)
    # One row more than there are blocks: the address is never null where dw is wanted.
    blocks = block_count(rows) if need_dw else rows
    partials = torch.empty((blocks + 1, columns)) if need_dw else None
    dw = torch.empty(columns if need_dw else 0)
    native.extension().norm_backward(
        kind, dy_MH.data_ptr(), dy_MH.stride(0), address(ds_MH),
        0 if ds_MH is None else ds_MH.stride(0), s_MH.data_ptr(), s_MH.stride(0), wide.data_ptr(),
        rstd.data_ptr(), dx.data_ptr(), address(partials), dw.data_ptr(), blocks, rows, columns,
        offset,
    )  # fmt: skip
    return dx, dw.to(weight.dtype)
