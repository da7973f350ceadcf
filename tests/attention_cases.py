"""Packed documents for attention: what the tests of its backends share."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_checks as checks
import torch

from trimpot.kernels.ops.varlen_attention import varlen_attention

Given = list[torch.Tensor]
"""q, k, v, do."""


@dataclass(frozen=True)
class Packed:
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    window: int = 0
    softcap: float = 0.0
    rest: int = 0
    """Tokens after the last document."""
    scale: float | None = None

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)


def inputs(n: Packed, dtype: torch.dtype = torch.float64) -> Given:
    """Rounded to `dtype`; scores spread over a few units."""
    make = torch.Generator().manual_seed(sum(n.lengths) + n.width)
    tokens = sum(n.lengths) + n.rest

    def normal(heads: int, size: float = 1.0) -> torch.Tensor:
        shape = (tokens, heads, n.width)
        return (size * torch.randn(shape, generator=make, dtype=torch.float64)).to(dtype)

    return [normal(n.heads, 1.5), normal(n.kv_heads), normal(n.kv_heads), normal(n.heads)]


def run(backend: str, n: Packed, given: Given) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv"""
    lses: list[torch.Tensor] = []

    def function(q, k, v):
        o, lse = varlen_attention(q, k, v, n.cu_seqlens, n.scale, n.window, n.softcap, backend)
        lses.append(lse)
        return o

    o, *grads = checks.with_gradients(function, given[:3], given[3:])
    return [o, *lses, *grads]


def doubles(given: Given) -> Given:
    return [t.double() for t in given]


def by_token(results: list[torch.Tensor]) -> list[torch.Tensor]:
    o, lse, *grads = results
    return [o, lse.T, *grads]
