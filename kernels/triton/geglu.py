"""GeGLU in Triton, y = gelu_tanh(gate)·up: kernels in glu.py, definition in ops/geglu.py."""

from __future__ import annotations

import torch

from trimpot.kernels.proof.cases import Case
from trimpot.kernels.triton import glu


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu.forward("geglu", True, gate, up)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return glu.backward("geglu", True, dy, gate, up)


def proof_cases() -> list[Case]:
    return glu.cases_of("geglu")
