"""Causal attention over packed documents, with grouped heads, a sliding window and a soft cap.

Of each document by itself, for a query head n and its key head g = n // (N / G):

    S = scale·Q Kᵀ, with a soft cap c: S ← c·tanh(S/c)
    LSE = log Σ_j e^S,  P = e^(S − LSE),  O = P V     over j ≤ i, and i − j < window if there is one
    Δ = rowsum(dO ⊙ O),  dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − Δ), with a soft cap ⊙ (1 − (S/c)²)
    dQ = scale·dS K,  dK = scale·dSᵀ Q;  dK and dV are summed over the heads of a group

(Dao 2023, "FlashAttention-2"; soft cap: Gemma 2.) A window of w is transformers' sliding_window:
a query sees the last w keys, its own among them; 0 is none, as is a soft cap of 0.

Shapes: q [T, N, D], k and v [T, G, D], token by token, views welcome; N a multiple of G;
cu_seqlens [documents + 1], int32 or int64: document d is cu_seqlens[d] … cu_seqlens[d + 1] − 1,
and may be empty. o [T, N, D] in q's dtype, lse [N, T] float32. Tokens after the last document get
o = 0, lse = 0 and no gradient. Arithmetic is float32 inside for bf16 and fp16; lse is for looking
at and carries no gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import as_given, in_working_type, opmath, promoted
from trimpot.kernels.vendor.flash import gpu_facts


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (o, lse). `scale` is D^−½ by default. Raises KernelError where shapes do not go together
    or cu_seqlens is no list of documents within q."""
    _check(q, k, v, cu_seqlens, window, softcap)
    q, k, v = promoted(*(in_working_type(x) for x in (q, k, v)))
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    o, lse = _op(q, k, v, cu_seqlens, scale, window, float(softcap), backend)
    return o, lse.detach()


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    softcap: float,
) -> None:
    shapes = f"varlen_attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise KernelError(f"{shapes}; [T, N, D] and twice [T, G, D] are wanted")
    if not q.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise KernelError(f"{shapes}; D ≥ 1 and heads of q that divide over those of k are wanted")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise KernelError(
            f"varlen_attention: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "[documents + 1] of int32 or int64 is wanted"
        )
    if window < 0 or softcap < 0:
        raise KernelError(
            f"varlen_attention: window is {window}, softcap {softcap}; 0 (none) or more is wanted"
        )


def boundaries(cu_seqlens: torch.Tensor, tokens: int) -> list[int]:
    """cu_seqlens as a list. Raises KernelError unless it rises from 0 to `tokens` at most."""
    cuts = [int(at) for at in cu_seqlens.tolist()]
    if not cuts or cuts[0] or cuts != sorted(cuts) or cuts[-1] > tokens:
        shown = f"{cuts[:8]}{' …' if len(cuts) > 8 else ''}"
        raise KernelError(
            f"varlen_attention: cu_seqlens is {shown}; it must start with 0, never fall and end "
            f"at {tokens} or before"
        )
    return cuts


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """o by softmax, differentiable by torch itself."""
    q, k, v = (x.to(opmath(x.dtype)) for x in (q, k, v))
    parts, end = [], 0
    for first, last in _documents(cu_seqlens, q.shape[0]):
        s, _, _ = _scores(q[first:last], k[first:last], scale, window, softcap)
        parts.append((s.softmax(-1) @ _per_head(v[first:last], q.shape[1])).transpose(0, 1))
        end = last
    return torch.cat([*parts, torch.zeros_like(q[end:])])


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
    dtype, tokens, heads = opmath(q.dtype), q.shape[0], q.shape[1]
    o = q.new_zeros(q.shape)
    lse = q.new_zeros(heads, tokens, dtype=dtype)
    for first, last in _documents(cu_seqlens, tokens):
        own = slice(first, last)
        s, _, _ = _scores(q[own].to(dtype), k[own].to(dtype), scale, window, softcap)
        lse[:, own] = s.logsumexp(-1)
        p = (s - lse[:, own, None]).exp()
        o[own] = (p @ _per_head(v[own].to(dtype), heads)).transpose(0, 1).to(o.dtype)
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
    """→ (dq, dk, dv)"""
    dtype, heads = opmath(q.dtype), q.shape[1]
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for first, last in _documents(cu_seqlens, q.shape[0]):
        own = slice(first, last)
        q_D, k_D, v_D, o_D, do_D = (x[own].to(dtype) for x in (q, k, v, o, do))
        s, slope, k_NTD = _scores(q_D, k_D, scale, window, softcap)
        p = (s - lse[:, own, None]).exp()
        do_NTD, delta = do_D.transpose(0, 1), (do_D * o_D).sum(-1).T
        ds = p * (do_NTD @ _per_head(v_D, heads).mT - delta[..., None]) * (scale * slope)
        dq[own] = (ds @ k_NTD).transpose(0, 1).to(dq.dtype)
        dk[own] = _summed(ds.mT @ q_D.transpose(0, 1), k.shape[1]).to(dk.dtype)
        dv[own] = _summed(p.mT @ do_NTD, k.shape[1]).to(dv.dtype)
    return dq, dk, dv


def _documents(cu_seqlens: torch.Tensor, tokens: int) -> Iterator[tuple[int, int]]:
    cuts = boundaries(cu_seqlens, tokens)
    return ((a, b) for a, b in itertools.pairwise(cuts) if a < b)


def _per_head(x_TGD: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values as every query head sees them: [N, T, D]."""
    return x_TGD.transpose(0, 1).repeat_interleave(heads // x_TGD.shape[1], 0)


def _summed(x_NTD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Over the heads of each group → [T, G, D]."""
    return x_NTD.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)


def _scores(
    q_TND: torch.Tensor, k_TGD: torch.Tensor, scale: float, window: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor]:
    """→ (S [N, T, T], −inf where nothing is seen; the soft cap's slope; keys [N, T, D])"""
    k_NTD = _per_head(k_TGD, q_TND.shape[1])
    s, slope = scale * (q_TND.transpose(0, 1) @ k_NTD.mT), 1.0
    if softcap:
        t = (s / softcap).tanh()
        s, slope = softcap * t, 1 - t * t
    i = torch.arange(s.shape[-1], device=s.device)
    age = i[:, None] - i
    unseen = age < 0 if not window else (age < 0) | (age >= window)
    return s.masked_fill(unseen, -math.inf), slope, k_NTD


@torch.library.custom_op("trimpot::varlen_attention", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = _implementation(backend, q, softcap)
    with as_given(q.device):
        return chosen.forward(q, k, v, cu_seqlens, scale, window, softcap)


@_op.register_fake
def _(q, k, v, cu_seqlens, scale, window, softcap, backend):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=opmath(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("trimpot::varlen_attention_backward", mutates_args=())
def _backward_op(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = _implementation(backend, q, softcap)
    with as_given(q.device):
        return chosen.backward(do, q, k, v, o, lse, cu_seqlens, scale, window, softcap)


@_backward_op.register_fake
def _(do, q, k, v, o, lse, cu_seqlens, scale, window, softcap, backend):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _implementation(backend: str, q: torch.Tensor, softcap: float):
    facts = {"head_dim": q.shape[2], "softcap": softcap, **gpu_facts(q.device)}
    return implementation("varlen_attention", resolve("varlen_attention", backend, q, **facts))


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.settings = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
    ctx.set_materialize_grads(False)  # of lse, which has none


def _autograd_backward(ctx, do, _dlse):
    if do is None:
        return (None,) * 8
    dq, dk, dv = _backward_op(do, *ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, None, None, None, None, None


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
