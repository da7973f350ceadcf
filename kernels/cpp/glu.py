"""Gated linear units in C++ (csrc/glu.cpp), for swiglu.py and geglu.py; formulas in ops/glu.py."""

from __future__ import annotations

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import as_rows, check, empty


def forward(op: str, gelu: bool, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    kind = check(op, gate, up)
    gate_MN, up_MN = _rows(gate, up)
    y = empty(gate.shape, gate.dtype)
    native.extension().glu_forward(
        kind, gelu, gate_MN.data_ptr(), gate_MN.stride(0), up_MN.data_ptr(), up_MN.stride(0),
        y.data_ptr(), *gate_MN.shape,
    )  # fmt: skip
    return y


def backward(
    op: str, gelu: bool, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = check(op, gate, up, dy)
    dy_MN, gate_MN, up_MN = _rows(dy, gate, up)
    dgate, dup = empty(gate.shape, gate.dtype), empty(up.shape, up.dtype)
    native.extension().glu_backward(
        kind, gelu, dy_MN.data_ptr(), dy_MN.stride(0), gate_MN.data_ptr(), gate_MN.stride(0),
        up_MN.data_ptr(), up_MN.stride(0), dgate.data_ptr(), dup.data_ptr(), *gate_MN.shape,
    )  # fmt: skip
    return dgate, dup


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As rows, and as a single one where there are no gaps: no vector is cut short then."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.reshape(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]
