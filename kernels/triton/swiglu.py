"""SwiGLU in Triton, y = gate·σ(gate)·up: kernels in glu.py, definition in ops/swiglu.py."""

from __future__ import annotations

import torch

from trimpot.kernels.proof.cases import Case
from trimpot.kernels.triton import glu


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu.forward("swiglu", False, gate, up)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return glu.backward("swiglu", False, dy, gate, up)


def proof_cases() -> list[Case]:
    return glu.cases_of("swiglu")
