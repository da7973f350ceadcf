"""Log-probabilities of given tokens, without the logits of all tokens: for DPO, KTO and GRPO.

M tokens, V vocabulary, H hidden; T temperature, c soft cap:

    z = h Wᵀ, or c·tanh(h Wᵀ/c);  u = z/T;  lse = log Σ_V exp u;  logp = u_y − lse

    dz = g (1_y − softmax(u)) / T · (1 − (z/c)²);  dh = dz W,  dW = dzᵀ h

Tokens whose label is ignore_index have logp 0 and no gradient. Backward makes the logits again from
h and W, which are live anyway, and the M values of lse. dh for g = 1 could be made in forward as
linear_cross_entropy does, since g scales rows; but those rewards weigh tokens only after all
log-probabilities are known, half of the calls (the reference's, the old policy's) want no gradient,
and dW would have to be made anew all the same: M × H memory is saved for a third matrix product.
"""

from __future__ import annotations

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import logits
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import as_given, in_working_type, opmath

OP = "token_logprobs"


def token_logprobs(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """→ logp [...], float32 (float64 for float64), of h [..., H], weight [V, H], labels [...].

    softcap: 0 is none. Raises KernelError where shapes or settings do not fit.
    """
    logits.check(OP, h, weight, labels)
    if temperature <= 0 or softcap < 0:
        raise KernelError(
            f"{OP}: temperature is {temperature}, softcap {softcap}; more than 0 and 0 or more "
            "are wanted"
        )
    h_MH = in_working_type(h).reshape(-1, h.shape[-1])
    logp, _ = _op(h_MH, weight, labels.reshape(-1), ignore_index, softcap, temperature, backend)
    return logp.view(labels.shape)


def reference(
    h_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_M: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """logp [M] by the formula, differentiable by torch itself."""
    z = (h_MH @ weight_VH.T).to(opmath(h_MH.dtype))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    counts = labels_M != ignore_index
    logp = (z / temperature).log_softmax(1).gather(1, labels_M.where(counts, 0)[:, None])
    return logp.squeeze(1).where(counts, 0)


def forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (logp [M], lse [M]), both 0 at ignored tokens."""
    wide, V = opmath(h.dtype), weight.shape[0]
    logp, lse = (h.new_zeros(labels.shape, dtype=wide) for _ in range(2))
    rows, matrix = logits.trained(labels, ignore_index), weight.to(h.dtype)
    for cut in logits.chunks(labels.shape[0] if rows is None else rows.shape[0], V, h.device):
        at = cut if rows is None else rows[cut]
        u = logits.logits(h[at], matrix, softcap).div_(temperature)
        counts = labels[at] != ignore_index
        index = labels[at].where(counts, 0)[:, None]
        at_label = u.gather(1, index).squeeze(1)
        mine = u.log_softmax(1).gather(1, index).squeeze(1)
        logp[at] = mine.where(counts, 0)
        lse[at] = (at_label - mine).where(counts, 0)
    return logp, lse


def backward(
    g: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    need_dh: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (dh [M, H] or empty, dW [V, H] or empty)."""
    wide, V = opmath(h.dtype), weight.shape[0]
    rows, matrix = logits.trained(labels, ignore_index), weight.to(h.dtype)
    dh = h.new_zeros(h.shape if need_dh else 0)
    dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=wide)
    for cut in logits.chunks(labels.shape[0] if rows is None else rows.shape[0], V, h.device):
        at = cut if rows is None else rows[cut]
        counts = labels[at] != ignore_index
        z = logits.logits(h[at], matrix, softcap)
        scale = g[at].to(wide).where(counts, 0).div_(temperature)[:, None]
        # Not exp(u − lse), which has lost what lse has in common with the largest logit.
        dz = (z / temperature).softmax(1).mul_(-scale)
        dz.scatter_add_(1, labels[at].where(counts, 0)[:, None], scale)
        if softcap:
            logits.through_softcap(dz, z, softcap)
        dz = dz.masked_fill_(~counts[:, None], 0).to(h.dtype)
        if need_dh:
            dh[at] = dz @ matrix
        if need_dw:
            part = h[at]
            if rows is None:
                part = logits.counted(part, labels[at], ignore_index)
            dw += dz.T @ part
    return dh, dw.to(weight.dtype)


@torch.library.custom_op(f"trimpot::{OP}", mutates_args=())
def _op(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = implementation(OP, resolve(OP, backend, h))
    with as_given(h.device):
        return chosen.forward(h, weight, labels, ignore_index, softcap, temperature)


@_op.register_fake
def _(h, weight, labels, ignore_index, softcap, temperature, backend):
    wide = opmath(h.dtype)
    return h.new_empty(labels.shape, dtype=wide), h.new_empty(labels.shape, dtype=wide)


@torch.library.custom_op(f"trimpot::{OP}_backward", mutates_args=())
def _backward_op(
    g: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
    need_dh: bool,
    need_dw: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = implementation(OP, resolve(OP, backend, h))
    with as_given(h.device):
        return chosen.backward(
            g, h, weight, labels, lse, ignore_index, softcap, temperature, need_dh, need_dw
        )


@_backward_op.register_fake
def _(
    g, h, weight, labels, lse, ignore_index, softcap, temperature, need_dh, need_dw, backend
):  # fmt: skip
    return h.new_empty(h.shape if need_dh else 0), weight.new_empty(weight.shape if need_dw else 0)


def _setup_context(ctx, inputs, output):
    h, weight, labels, *ctx.settings = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, labels, lse)


def _autograd_backward(ctx, g, _):
    none = [None] * 5
    if g is None:
        return None, None, *none
    h, weight, labels, lse = ctx.saved_tensors
    ignore_index, softcap, temperature, backend = ctx.settings
    need_dh, need_dw = ctx.needs_input_grad[:2]
    dh, dw = _backward_op(
        g, h, weight, labels, lse, ignore_index, softcap, temperature, need_dh, need_dw, backend
    )
    return dh if need_dh else None, dw if need_dw else None, *none


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
