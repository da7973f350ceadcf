"""The sum of two tensors in the pool: of a layer's input and its last block's output."""

from __future__ import annotations

from typing import Any

import torch

from trimpot.kernels.cpp.tensors import empty
from trimpot.kernels.heap import pooled


def added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, the same bits as torch's."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device.type == b.device.type == "cpu"
    if not alike or not pooled() or torch.compiler.is_compiling():
        return a + b
    return _Sum.apply(a, b)  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.add(a, b, out=empty(a.shape, a.dtype))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, dy
