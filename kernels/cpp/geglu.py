"""GeGLU in C++: y = gelu_tanh(gate)·up; formulas in ops/glu.py, definition in ops/geglu.py."""

from __future__ import annotations

import torch

from trimpot.kernels.cpp import glu


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu.forward("geglu", True, gate, up)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return glu.backward("geglu", True, dy, gate, up)
