"""Output layer and cross-entropy in one, without the logits of all tokens.

M tokens, V vocabulary, H hidden. With w_t a token's weight (1 if none are given), ε the label
smoothing (Szegedy et al. 2016) and ζ the z-loss (Chowdhery et al. 2022, "PaLM", §5):

    z = h Wᵀ, with a soft cap z = c·tanh(h Wᵀ/c);  lse = log Σ_V exp z
    ℓ = lse − (1 − ε) z_y − ε mean_V z
    loss = Σ_t w_t (ℓ_t + ζ lse_t²)

    dz = w_t (softmax(z) (1 + 2 ζ lse) − (1 − ε) 1_y − ε/V) · (1 − (z/c)²)
    dh = dz W,  dW = dzᵀ h

Tokens whose label is ignore_index count nothing: zero loss, zero gradient, whatever their h. The
gradients are made in forward, chunk by chunk, for an upstream gradient of 1, and scaled in
backward: a frozen output layer keeps M × H from forward to backward where torch keeps M × V.
"""

from __future__ import annotations

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import logits
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import as_given, in_working_type, opmath

OP = "linear_cross_entropy"


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """→ the sum over tokens, a scalar, float32 (float64 for float64).

    h [..., H], weight [V, H], labels [...] int64, token_weights [...]. softcap: 0 is none. No
    gradient goes to token_weights. Raises KernelError where shapes or settings do not fit.
    """
    logits.check(OP, h, weight, labels)
    if token_weights is not None and token_weights.shape != labels.shape:
        raise KernelError(
            f"{OP}: token_weights are {tuple(token_weights.shape)}, labels {tuple(labels.shape)}; "
            "one weight per label is wanted"
        )
    if not 0 <= label_smoothing <= 1 or softcap < 0:
        raise KernelError(
            f"{OP}: label_smoothing is {label_smoothing}, softcap {softcap}; 0 … 1 and 0 or more "
            "are wanted"
        )
    h_MH = in_working_type(h).reshape(-1, h.shape[-1])
    grad = torch.is_grad_enabled()
    loss, _, _ = _op(
        h_MH,
        weight,
        labels.reshape(-1),
        None if token_weights is None else token_weights.detach().reshape(-1),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        grad and h.requires_grad,
        grad and weight.requires_grad,
        backend,
    )
    return loss


def reference(
    h_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_M: torch.Tensor,
    token_weights_M: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The loss by the formula, differentiable by torch itself."""
    z = (h_MH @ weight_VH.T).to(opmath(h_MH.dtype))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    counts = labels_M != ignore_index
    at_label = z.gather(1, labels_M.where(counts, 0)[:, None]).squeeze(1)
    lse = z.logsumexp(1)
    each = lse - (1 - label_smoothing) * at_label - label_smoothing * z.mean(1) + z_loss * lse**2
    if token_weights_M is not None:
        each = each * token_weights_M
    return each.where(counts, 0).sum()


def forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dh: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (loss, dh [M, H] or empty, dW [V, H] or empty)."""
    wide, (V, _) = opmath(h.dtype), weight.shape
    rows = logits.trained(labels, ignore_index)
    dh = h.new_zeros(h.shape if need_dh else 0)
    dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=wide)
    matrix = weight.to(h.dtype)
    losses = [h.new_zeros(1, dtype=wide)]
    for cut in logits.chunks(labels.shape[0] if rows is None else rows.shape[0], V, h.device):
        at = cut if rows is None else rows[cut]
        each = None if token_weights is None else token_weights[at].to(wide)
        z = logits.logits(h[at], matrix, softcap)
        loss, dz = _softmax(
            z, labels[at], each, ignore_index, label_smoothing, z_loss, softcap, need_dh or need_dw
        )
        losses.append(loss)
        if dz is None:
            continue
        dz = dz.to(h.dtype)
        if need_dh:
            dh[at] = dz @ matrix
        if need_dw:
            part = h[at]
            if rows is None:
                part = logits.counted(part, labels[at], ignore_index)
            dw += dz.T @ part
    return torch.cat(losses).sum(), dh, dw.to(weight.dtype)


def _softmax(
    z: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dz: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(w (ℓ + ζ lse²) [C], dz [C, V] before the soft cap) of logits [C, V]."""
    counts = labels != ignore_index
    index = labels.where(counts, 0)[:, None]
    # Not exp(z − lse): beside logits of some size a small −log p has no digits left.
    logp, lse = z.log_softmax(1), z.logsumexp(1) if z_loss else None
    loss = (label_smoothing - 1) * logp.gather(1, index).squeeze(1)
    if label_smoothing:
        loss -= label_smoothing * logp.mean(1)
    if lse is not None:
        loss += z_loss * lse.square()
    scale = counts.to(z.dtype) if token_weights is None else token_weights.where(counts, 0)
    loss = (loss * scale).where(counts, 0)
    if not need_dz:
        return loss, None
    dz = logp.exp_()
    if lse is not None:
        dz.mul_((1 + 2 * z_loss * lse)[:, None])
    if label_smoothing:
        dz.sub_(label_smoothing / z.shape[1])
    dz.scatter_add_(1, index, dz.new_full(index.shape, label_smoothing - 1))
    dz.mul_(scale[:, None])
    if softcap:
        logits.through_softcap(dz, z, softcap)
    return loss, dz.masked_fill_(~counts[:, None], 0)


@torch.library.custom_op(f"trimpot::{OP}", mutates_args=())
def _op(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_dh: bool,
    need_dw: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = implementation(OP, resolve(OP, backend, h))
    with as_given(h.device):
        return chosen.forward(
            h, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap,
            need_dh, need_dw,
        )  # fmt: skip


@_op.register_fake
def _(
    h, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, need_dh,
    need_dw, backend,
):  # fmt: skip
    loss = h.new_empty((), dtype=opmath(h.dtype))
    dh, dw = h.new_empty(h.shape if need_dh else 0), weight.shape if need_dw else 0
    return loss, dh, weight.new_empty(dw)


def _setup_context(ctx, inputs, output):
    _, dh, dw = output
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dh, dw)
    ctx.needs = inputs[8:10]


def _autograd_backward(ctx, g, *_):
    dh, dw = ctx.saved_tensors
    need_dh, need_dw = ctx.needs
    none = [None] * 9
    if g is None:
        return None, None, *none
    return g * dh if need_dh else None, g * dw if need_dw else None, *none


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
