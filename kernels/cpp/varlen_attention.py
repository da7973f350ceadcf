"""Attention over packed documents in C++; definition in ops/varlen_attention.py.

Products are in fp32 (csrc/attention.cpp), or in pairs of bfloat16 on AMX tiles (bf16x3,
csrc/attention_amx.cpp). Blocks of scores are made, used and forgotten: there is no mask and nothing
of size T². Results are the same bits on any number of threads, whatever the other documents hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import check, empty
from trimpot.kernels.dispatch import WIDEST_HEAD
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops.varlen_attention import boundaries


@dataclass(frozen=True)
class VarlenAttention:
    """`arithmetic` of the products: fp32 | bf16x3, or auto for bf16x3 of bf16 tensors where there
    are tiles, else fp32. fp16's lse would err by more than fp32 products let it."""

    arithmetic: str = "auto"

    def _tiles(self, dtype: torch.dtype) -> bool:
        there = native.extension().gemm_fast_split()
        if self.arithmetic not in ("auto", "fp32", "bf16x3"):
            raise BackendError(
                f"varlen_attention: its arithmetic is {self.arithmetic!r}; auto, fp32 or bf16x3 is "
                "wanted"
            )
        if self.arithmetic == "bf16x3" and not there:
            raise BackendError(
                "varlen_attention: bf16x3 wants AMX tiles of bfloat16; this processor has none: "
                "take fp32 or auto"
            )
        return self.arithmetic == "bf16x3" or (
            self.arithmetic == "auto" and there and dtype == torch.bfloat16
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind, cuts = _checked(cu_seqlens, q, k, v)
        o = empty(q.shape, q.dtype)
        lse = torch.empty(q.shape[1], q.shape[0])
        o[cuts[-1] :] = 0
        lse[:, cuts[-1] :] = 0
        sides, kept = _tokens(q, k, v)
        settings = (self._tiles(q.dtype), kind, _sizes(q, k), cuts, scale, window, softcap)
        native.extension().attention_forward(*settings, *sides, o.data_ptr(), lse.data_ptr())
        del kept
        return o, lse

    def backward(
        self,
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
        grads = [empty(x.shape, x.dtype) for x in (q, k, v)]
        for grad in grads:
            grad[cuts[-1] :] = 0
        sides, kept = _tokens(q, k, v, o, do)
        lse = lse.contiguous()
        settings = (self._tiles(q.dtype), kind, _sizes(q, k), cuts, scale, window, softcap)
        native.extension().attention_backward(
            *settings, *sides, lse.data_ptr(), *(grad.data_ptr() for grad in grads)
        )
        del kept
        dq, dk, dv = grads
        return dq, dk, dv


variant = VarlenAttention
"""`variant("bf16x3")`: the same functions with that arithmetic."""
_default = VarlenAttention()
forward, backward = _default.forward, _default.backward


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
