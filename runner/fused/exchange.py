"""One row of tokens over several workers: all else in a layer is of one token and stays where that
lies; attention gets all tokens of a share of the heads instead (Jacobs et al. 2023, "DeepSpeed
Ulysses").

P workers, t tokens of each, T = P·t; N heads of q, G of k and v, n = N/P; D of each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Workers:
    """Those who share each row. This one has its slice number `rank`, and as such heads."""

    group: Any
    size: int
    rank: int


def to_heads(
    q_tND: torch.Tensor, k_tGD: torch.Tensor, v_tGD: torch.Tensor, workers: Workers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of own tokens → of own heads: [T, n, D], [T, g, D], [T, g, D], in one exchange.

    N is a multiple of P. Where G is none, each head of k and v goes to as many workers as have
    heads of q that look at it: g = lcm(G, P) / P, and lcm(G, P) divides N as both do.
    """
    copies = workers.size // math.gcd(workers.size, k_tGD.shape[1])
    if copies > 1:
        k_tGD, v_tGD = (x.repeat_interleave(copies, 1) for x in (k_tGD, v_tGD))
    # [t, P, n + 2g, D]: what goes to one worker lies together
    parts = [x.unflatten(1, (workers.size, -1)) for x in (q_tND, k_tGD, v_tGD)]
    joined: torch.Tensor = _Exchange.apply(torch.cat(parts, 2).flatten(1, 2), workers, True)  # pyright: ignore[reportAssignmentType]
    q, k, v = joined.split([part.shape[2] for part in parts], 1)
    return q, k, v


def to_tokens(o_TnD: torch.Tensor, workers: Workers) -> torch.Tensor:
    """Attention's output of own heads [T, n, D] → of own tokens [t, N, D]."""
    return _Exchange.apply(o_TnD, workers, False)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """Each of the two ways is the other one's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, workers: Workers, to_heads: bool) -> torch.Tensor:
        ctx.workers, ctx.to_heads = workers, to_heads
        return _exchanged(x, workers, to_heads)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(dy, ctx.workers, not ctx.to_heads), None, None


def _exchanged(x: torch.Tensor, workers: Workers, to_heads: bool) -> torch.Tensor:
    """[t, P·n, D] → [P·t, n, D], or back."""
    if to_heads:
        sent = x.unflatten(1, (workers.size, -1)).transpose(0, 1).contiguous()
    else:
        sent = x.unflatten(0, (workers.size, -1)).contiguous()
    got = torch.empty_like(sent)  # [P, t, n, D], by whom it came from
    dist.all_to_all_single(got, sent, group=workers.group)
    return got.flatten(0, 1) if to_heads else got.transpose(0, 1).flatten(1, 2)
