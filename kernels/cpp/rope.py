"""Rotary embedding in C++ (csrc/rope.cpp), with q/k norm; definition in ops/rope.py."""

from __future__ import annotations

from typing import Any

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import TYPES, address, as_float, block_count, check, empty
from trimpot.kernels.errors import KernelError


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kind, tokens = check("rope", q, k), q.shape[0] * q.shape[1]
    outs, sides, rstds, kept = [], [], [], []
    for x, weight in ((q, q_weight), (k, k_weight)):
        out = empty(x.shape, x.dtype)
        rstd = torch.empty(0 if weight is None else x.shape[:3])
        wide = None if weight is None else as_float(weight)
        side, x = _heads(x)
        kept += [x, wide]  # their addresses are used below
        weights = address(wide), rstd.data_ptr()
        sides.append((x.shape[2], side, out.data_ptr(), *weights, (0, 0, 0, 0), 0, 0))
        outs.append(out)
        rstds.append(rstd)
    _run(False, kind, cos, sin, q, tokens, eps, offset, sides)
    return *outs, *rstds


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kind, tokens = check("rope", dq, dk, q, k), dq.shape[0] * dq.shape[1]
    normed = need_dw and not (q_weight is None and k_weight is None)
    blocks = block_count(tokens) if normed else tokens
    outs, sides, dws, kept = [], [], [], []
    for dy, x, weight, rstd in ((dq, q, q_weight, q_rstd), (dk, k, k_weight, k_rstd)):
        out = empty(dy.shape, dy.dtype)
        side, dy = _heads(dy)
        saved, x = ((0, 0, 0, 0), None) if weight is None or x is None else _heads(x)
        wide = None if weight is None else as_float(weight)
        rstd = rstd.contiguous()
        summed = need_dw and weight is not None
        # One row more than there are blocks: the address is never null where dw is wanted.
        partials = torch.empty((blocks + 1, dy.shape[3])) if summed else None
        dw = torch.empty(dy.shape[3] if summed else 0)
        kept += [dy, x, wide, rstd, partials]  # their addresses are used below
        weights = address(wide), rstd.data_ptr()
        sums = address(partials), dw.data_ptr()
        sides.append((dy.shape[2], side, out.data_ptr(), *weights, saved, *sums))
        outs.append(out)
        dws.append(dw)
    _run(True, kind, cos, sin, dq, blocks, 0.0, offset, sides)
    types = (dq.dtype if weight is None else weight.dtype for weight in (q_weight, k_weight))
    return *outs, *(dw.to(dtype) for dw, dtype in zip(dws, types, strict=True))


def _heads(x: torch.Tensor) -> tuple[tuple[int, int, int, int], torch.Tensor]:
    """(address and strides, the tensor they belong to) of [B, T, H, D], D side by side."""
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)), x


def _run(
    back: bool,
    kind: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    like: torch.Tensor,
    blocks: int,
    eps: float,
    offset: float,
    sides: list[Any],
) -> None:
    """`like`: of shape [B, T, H, D]."""
    extension = native.extension()
    batch, length, _, width = like.shape
    if width > extension.rope_widest:
        raise KernelError(
            f"rope: heads of {width} dimensions; backend cpp takes up to {extension.rope_widest}; "
            "use torch"
        )
    cos, sin = (_table(t) for t in (cos, sin))
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    angles: list[int] = [TYPES[cos.dtype]]
    for table in (cos, sin):
        angles += [table.data_ptr(), table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)]
    sizes = (batch, length, width, cos.shape[2])
    extension.rope(back, kind, tuple(angles), sizes, blocks, eps, offset, *sides)


def _table(table: torch.Tensor) -> torch.Tensor:
    if table.device.type != "cpu":
        raise KernelError(f"rope: cos or sin is on {table.device}; backend cpp computes on the CPU")
    if table.dtype not in TYPES:
        table = table.float()
    return table if table.stride(2) == 1 or table.shape[2] <= 1 else table.contiguous()
