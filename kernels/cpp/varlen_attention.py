"""Attention over packed documents in C++ (csrc/attention.cpp); definition in
ops/varlen_attention.py.

Blocks of scores are made, used and forgotten: there is no mask and nothing of size T². Results are
the same bits on any number of threads, whatever the other documents hold.
"""

from __future__ import annotations

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import check
from trimpot.kernels.dispatch import WIDEST_HEAD
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.varlen_attention import boundaries


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    kind, cuts = _checked(cu_seqlens, q, k, v)
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    o[cuts[-1] :] = 0
    lse[:, cuts[-1] :] = 0
    sides, kept = _tokens(q, k, v)
    settings = (kind, _sizes(q, k), cuts, scale, window, softcap)
    native.extension().attention_forward(*settings, *sides, o.data_ptr(), lse.data_ptr())
    del kept
    return o, lse


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
    kind, cuts = _checked(cu_seqlens, q, k, v, o, do)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for grad in grads:
        grad[cuts[-1] :] = 0
    sides, kept = _tokens(q, k, v, o, do)
    lse = lse.contiguous()
    settings = (kind, _sizes(q, k), cuts, scale, window, softcap)
    native.extension().attention_backward(
        *settings, *sides, lse.data_ptr(), *(grad.data_ptr() for grad in grads)
    )
    del kept
    dq, dk, dv = grads
    return dq, dk, dv


def _checked(cu_seqlens: torch.Tensor, q: torch.Tensor, *others: torch.Tensor):
    if q.shape[2] > WIDEST_HEAD:
        raise KernelError(
            f"varlen_attention: heads are {q.shape[2]} wide; backend cpp takes up to "
            f"{WIDEST_HEAD}; use torch"
        )
    return check("varlen_attention", q, *others), boundaries(cu_seqlens, q.shape[0])


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2]


def _tokens(*tensors: torch.Tensor) -> tuple[list[tuple[int, int, int]], list[torch.Tensor]]:
    """(address and strides of [T, heads, D] with D side by side, what they belong to)."""
    kept = [x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous() for x in tensors]
    return [(x.data_ptr(), x.stride(0), x.stride(1)) for x in kept], kept
