"""Gated linear units y = act(gate)·up, for swiglu.py and geglu.py (Shazeer 2020, "GLU variants
improve transformer").

Both activations are act(g) = g·σ(v(g)): SiLU with v = g, GELU's tanh form with
v = 2·√(2/π)·(g + 0.044715·g³), since (1 + tanh u)/2 = σ(2u), which also keeps the digits that
1 + tanh loses for negative g. So act′ = σ + g·σ·(1 − σ)·v′ and

    dup = dy·g·σ,  dgate = dy·up·σ·(1 + g·(1 − σ)·v′)

gate, up, y: any shape, the same; arithmetic is float32 inside for bf16 and fp16.
"""

from __future__ import annotations

import math

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.opmath import opmath, promoted

GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def checked(op: str, gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    """gate and up in one type. Raises KernelError unless they are of one shape."""
    if gate.shape != up.shape:
        raise KernelError(
            f"{op}: gate is {tuple(gate.shape)}, up {tuple(up.shape)}; one shape is wanted"
        )
    return promoted(gate, up)


def forward(gelu: bool, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    g, u = _wide(gate), _wide(up)
    return (g * torch.sigmoid(_argument(gelu, g)) * u).to(gate.dtype)


def backward(
    gelu: bool, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dy, g, u = _wide(dy), _wide(gate), _wide(up)
    v = _argument(gelu, g)
    sigma, rest = torch.sigmoid(v), torch.sigmoid(-v)  # 1 − σ would lose the digits of a small rest
    dup = dy * (g * sigma)
    dgate = dy * u * (sigma * (1 + g * rest * _slope(gelu, g)))
    return dgate.to(gate.dtype), dup.to(up.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(opmath(x.dtype))


def _argument(gelu: bool, g: torch.Tensor) -> torch.Tensor:
    """v(g)"""
    return GELU_SCALE * g * (1 + GELU_CUBIC * g * g) if gelu else g


def _slope(gelu: bool, g: torch.Tensor) -> torch.Tensor | float:
    """v′(g)"""
    return GELU_SCALE * (1 + 3 * GELU_CUBIC * g * g) if gelu else 1.0
