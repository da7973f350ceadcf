"""Attention over packed documents in Triton; definition in ops/varlen_attention.py."""

from __future__ import annotations

import torch
import triton

from trimpot.kernels.dispatch import WIDEST_HEAD
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.varlen_attention import boundaries
from trimpot.kernels.triton.attention_kernels import (
    attention_dkdv,
    attention_dq,
    attention_forward,
)
from trimpot.kernels.triton.launch import check, launch

OP = "varlen_attention"
def tiles(kernel):
    return dict(QUERIES=64, KEYS=64, STAGES=2, threads=128)



def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(q, k, v, cu_seqlens, scale, window, softcap)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    sign = (scale > 0) - (scale < 0)
    call.launch(
        attention_forward, "QUERIES", q.shape[1],
        [call.q, call.k, call.v, o, lse], abs(scale) or 1.0, [float(sign)],
        [call.q, call.k, call.v, o],
    )  # fmt: skip
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
    call = _Call(q, k, v, cu_seqlens, scale, window, softcap)
    check(OP, do, o, lse)
    do, o, lse = _by_row(do), _by_row(o), lse.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call.launch(
        attention_dq, "QUERIES", q.shape[1],
        [call.q, call.k, call.v, o, do, lse, delta, dq], scale, [],
        [call.q, call.k, call.v, o, do, dq],
    )  # fmt: skip
    call.launch(
        attention_dkdv, "KEYS", k.shape[1],
        [call.q, call.k, call.v, do, lse, delta, dk, dv], scale, [],
        [call.q, call.k, call.v, do, dk],
    )  # fmt: skip
    return dq, dk, dv


def _by_row(x):
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


class _Call:
    def __init__(self, q, k, v, cu_seqlens, scale, window, softcap) -> None:
        check(OP, q, k, v)
        if q.shape[2] > WIDEST_HEAD:
            raise KernelError(
                f"varlen_attention: heads are {q.shape[2]} wide; backend triton takes up to "
                f"{WIDEST_HEAD}; use torch"
            )
        if cu_seqlens.device.type == "cpu":
            boundaries(cu_seqlens, q.shape[0])
        self.q, self.k, self.v = (_by_row(x) for x in (q, k, v))
        self.cuts = cu_seqlens.to(q.device, non_blocking=True).contiguous()
        self.documents = cu_seqlens.shape[0] - 1
        self.window, self.softcap = window, softcap
        self.width = q.shape[2]
        self.columns = max(triton.next_power_of_2(self.width), 16)

    def launch(self, kernel, rows, heads, tensors, scale, more, strided) -> None:
        tokens = self.q.shape[0]
        tile = tiles(kernel.__name__)
        slots = tokens // tile[rows] + self.documents + 1
        steps = [stride for x in strided for stride in x.stride()[:2]]
        launch(
            kernel, (slots * heads,),
            *tensors, self.cuts, self.documents, tokens, self.q.shape[1],
            self.q.shape[1] // self.k.shape[1], scale, self.softcap or 1.0, self.window, *more,
            *steps,
            WINDOWED=self.window > 0, CAPPED=self.softcap > 0, WIDTH=self.width,
            COLUMNS=self.columns, enable_fp_fusion=self.q.element_size() == 2, **tile,
        )  # fmt: skip
