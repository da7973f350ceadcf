"""Rotary position embedding of q and k (Su et al. 2021, "RoFormer"), with an RMS norm per head
before it where a model has one (Qwen3, Gemma 3).

The first Dr of D dimensions are rotated, as halves x₁, x₂ of Dr/2 each; the rest passes:

    y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin

With a weight, x is x·rstd·(offset + w) first, rstd = (mean_D x² + eps)^−½. Backward rotates by
−angle and then goes back through the norm as in add_rms_norm.py.

Shapes: q [B, T, Hq, D], k [B, T, Hk, D]; cos, sin [B or 1, T, Dr/2], a row per token, so packed
documents give each token its own position (half of transformers' table, which repeats itself);
rstd [B, T, H]; weights [D]. Arithmetic is float32 inside for bf16 and fp16. cos and sin get no
gradient.
"""

from __future__ import annotations

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.add_rms_norm import inverse_rms, norm_backward
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import opmath, promoted


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (q, k), rotated, contiguous. Raises KernelError where shapes do not go together."""
    _check(q, k, cos, sin, q_weight, k_weight)
    q, k = promoted(q, k)
    q, k, _, _ = _op(q, k, cos, sin, q_weight, k_weight, eps, offset, backend)
    return q, k


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise KernelError(
            f"rope: q is {tuple(q.shape)}, k {tuple(k.shape)}; [B, T, Hq, D] and [B, T, Hk, D] "
            "are wanted"
        )
    batch, length, _, width = q.shape
    fits = cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == length
    if not fits or cos.shape != sin.shape or 2 * cos.shape[2] > width:
        raise KernelError(
            f"rope: cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; for q {tuple(q.shape)} "
            f"[{batch} or 1, {length}, up to {width // 2}] is wanted, half of transformers' table"
        )
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (width,):
            raise KernelError(f"rope: a norm's weight is {tuple(weight.shape)}; ({width},) fits")


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) by the formula, differentiable by torch itself."""
    q_out = _forward(q, cos, sin, q_weight, eps, offset)[0]
    return q_out, _forward(k, cos, sin, k_weight, eps, offset)[0]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (q, k, q_rstd, k_rstd); an rstd is empty where there is no norm."""
    q_out, q_rstd = _forward(q, cos, sin, q_weight, eps, offset)
    k_out, k_rstd = _forward(k, cos, sin, k_weight, eps, offset)
    return q_out, k_out, q_rstd, k_rstd


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (dq, dk, dq_weight, dk_weight) of the inputs; q and k are needed where there is a norm,
    a weight's gradient is empty where it is not needed or there is no weight."""
    dq_in, dq_weight = _backward(dq, q, cos, sin, q_weight, q_rstd, offset, need_dw)
    dk_in, dk_weight = _backward(dk, k, cos, sin, k_weight, k_rstd, offset, need_dw)
    return dq_in, dk_in, dq_weight, dk_weight


def _rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos.to(x_BTHD.dtype).unsqueeze(2), sin.to(x_BTHD.dtype).unsqueeze(2)
    x1, x2, rest = x_BTHD.split([half, half, x_BTHD.shape[-1] - 2 * half], -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


def _forward(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(opmath(x.dtype))
    rstd = wide.new_empty(0)
    if weight is not None:
        rstd = inverse_rms(wide, eps)
        wide = wide * rstd.unsqueeze(-1) * (offset + weight.to(wide.dtype))
    return _rotate(wide, cos, sin).to(x.dtype), rstd


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = _rotate(dy.to(opmath(dy.dtype)), cos, -sin)
    if weight is None or x is None:
        return dx.to(dy.dtype), dy.new_empty(0)
    dx, dw = norm_backward(dx, x, weight, rstd, offset, need_dw)
    return dx.to(dy.dtype), dw


@torch.library.custom_op("trimpot::rope", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = implementation("rope", resolve("rope", backend, q))
    return chosen.forward(q, k, cos, sin, q_weight, k_weight, eps, offset)


@_op.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps, offset, backend):
    dtype = opmath(q.dtype)
    q_rstd = q.new_empty(0 if q_weight is None else q.shape[:3], dtype=dtype)
    k_rstd = k.new_empty(0 if k_weight is None else k.shape[:3], dtype=dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), q_rstd, k_rstd


@torch.library.custom_op("trimpot::rope_backward", mutates_args=())
def _backward_op(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = implementation("rope", resolve("rope", backend, dq))
    return chosen.backward(
        dq, dk, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, offset, need_dw
    )


@_backward_op.register_fake
def _(dq, dk, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, offset, need_dw, backend):
    def like(weight, dy):
        empty = weight is None or not need_dw
        return dy.new_empty(0) if weight is None else weight.new_empty(0 if empty else weight.shape)

    dq_in, dk_in = dq.new_empty(dq.shape), dk.new_empty(dk.shape)
    return dq_in, dk_in, like(q_weight, dq), like(k_weight, dk)


def _setup_context(ctx, inputs, output):
    q, k, cos, sin, q_weight, k_weight, _, offset, backend = inputs
    _, _, q_rstd, k_rstd = output
    q, k = q if q_weight is not None else None, k if k_weight is not None else None
    ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd)
    ctx.offset, ctx.backend = offset, backend


def _autograd_backward(ctx, dq, dk, _dq_rstd, _dk_rstd):
    saved = ctx.saved_tensors
    need_q, need_k = ctx.needs_input_grad[4:6]
    dq, dk, dq_weight, dk_weight = _backward_op(
        dq, dk, *saved, ctx.offset, need_q or need_k, ctx.backend
    )
    weights = dq_weight if need_q else None, dk_weight if need_k else None
    return dq, dk, None, None, *weights, None, None, None


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
