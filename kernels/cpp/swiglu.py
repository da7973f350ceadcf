"""SwiGLU in C++: y = gate·σ(gate)·up; formulas in ops/glu.py, definition in ops/swiglu.py."""

from __future__ import annotations

import torch

from trimpot.kernels.cpp import glu


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu.forward("swiglu", False, gate, up)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return glu.backward("swiglu", False, dy, gate, up)
