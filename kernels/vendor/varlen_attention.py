"""Attention over packed documents by FlashAttention, which torch carries; definition in
ops/varlen_attention.py (Dao 2023; Shah et al. 2024, "FlashAttention-3").

bf16 and fp16 on NVIDIA's GPUs from sm_80 on, heads of a multiple of 8 up to 256, no soft cap: what
`dispatch.py` asks. The host reads no value of cu_seqlens, which would wait for all that was
launched: the longest document is said to be as long as all, and blocks past a document's end do
nothing. So a wrong list is told of where it is on the CPU only: on a GPU, FlashAttention reads and
writes where it points. Both directions run in torch's deterministic mode, since dQ is otherwise
summed in the order in which blocks happen to end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import deterministic

from trimpot.kernels.dispatch import WIDEST_HEAD
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.varlen_attention import boundaries

OP = "varlen_attention"
DTYPES = (torch.bfloat16, torch.float16)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (o, lse)"""
    _check(q, k, v, cu_seqlens, softcap)
    if not _documents(q, cu_seqlens):
        return q.new_zeros(q.shape), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    cuts = _cuts(q, cu_seqlens)
    with _in_one_order():
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            *map(_by_row, (q, k, v)), *_shared(q, cuts), return_debug_mask=False,
            **_seen(scale, window),
        )  # fmt: skip
    after = _after(cuts, q.shape[0])
    return o.masked_fill_(after[:, None, None], 0), lse.masked_fill_(after, 0)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (dq, dk, dv)"""
    _check(q, k, v, cu_seqlens, softcap)
    if not _documents(q, cu_seqlens):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    cuts = _cuts(q, cu_seqlens)
    nothing_drawn = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout
    with _in_one_order():
        grads = torch.ops.aten._flash_attention_backward(
            *map(_by_row, (do, q, k, v, o)), lse.contiguous(), *_shared(q, cuts),
            nothing_drawn, nothing_drawn[:0], **_seen(scale, window),
        )  # fmt: skip
    after = _after(cuts, q.shape[0])[:, None, None]
    dq, dk, dv = (grad.masked_fill_(after, 0) for grad in grads)
    return dq, dk, dv


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, softcap: float
) -> None:
    if cu_seqlens.device.type == "cpu":
        boundaries(cu_seqlens, q.shape[0])
    width = q.shape[2]
    if any(x.dtype not in DTYPES for x in (q, k, v)) or width % 8 or width > WIDEST_HEAD or softcap:
        raise KernelError(
            f"{OP}: q is {q.dtype}, heads are {width} wide, the soft cap is {softcap:g}; backend "
            f"vendor takes bf16 and fp16, multiples of 8 up to {WIDEST_HEAD} and no soft cap; use "
            "auto"
        )


def _documents(q: torch.Tensor, cu_seqlens: torch.Tensor) -> int:
    return cu_seqlens.shape[0] - 1 if q.shape[0] else 0


def _cuts(q: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return cu_seqlens.to(q.device, torch.int32, non_blocking=True).contiguous()


def _by_row(x_TND: torch.Tensor) -> torch.Tensor:
    """With D side by side."""
    return x_TND if x_TND.stride(2) == 1 else x_TND.contiguous()


def _shared(q: torch.Tensor, cuts: torch.Tensor) -> tuple[Any, ...]:
    """Documents of queries and of keys, the longest of each, dropout, causality."""
    return cuts, cuts, q.shape[0], q.shape[0], 0.0, True


def _seen(scale: float, window: int) -> dict[str, Any]:
    """`window` counts a query's own key, torch's number those before it; -1 is all."""
    sides = {"window_size_left": window - 1 if window else -1}
    return {"scale": scale, "window_size_right": 0 if window else -1, **sides}


def _after(cuts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which tokens are in no document: FlashAttention writes nothing there."""
    return torch.arange(tokens, device=cuts.device) >= cuts[-1]


@contextlib.contextmanager
def _in_one_order() -> Iterator[None]:
    """torch's deterministic mode, without filling new tensors, which would cost a pass each."""
    was = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    modes: Any = deterministic  # its attribute is a property of the module, which no checker sees
    fills = modes.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    modes.fill_uninitialized_memory = False
    try:
        yield
    finally:
        modes.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(was, warn_only=warns)
