"""Residual add and RMS norm in one pass (Zhang and Sennrich 2019, "Root mean square layer
normalization"), between any two blocks of a transformer.

    s = x + residual,  rstd = (mean_H s² + eps)^−½,  ŝ = s·rstd,  y = ŝ·(offset + weight)

    g = dy·(offset + weight):  dx = ds + rstd·(g − ŝ·mean_H(g·ŝ)),  dw = Σ_M dy·ŝ

dx is the gradient of x and of the residual. Shapes: x, residual, s, y [..., H]; weight [H]; rstd
[...]. s is rounded to the type of x before it is normed, so backward, which is given s, sees the
same. All else is float32 inside for bf16 and fp16. offset: 0 for Llama, 1 for Gemma, whose
weights are stored less one.
"""

from __future__ import annotations

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import opmath, promoted


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (y, s) in the type of x (of x and residual, the wider); s is x itself without a residual.

    Raises KernelError where shapes do not go together.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        rest = "" if residual is None else f", residual {tuple(residual.shape)}"
        raise KernelError(
            f"add_rms_norm: x is {tuple(x.shape)}{rest}, weight {tuple(weight.shape)}; "
            "[..., H], the same, and [H] are wanted"
        )
    if residual is not None:
        x, residual = promoted(x, residual)
    y, s, _ = _op(x, residual, weight, eps, offset, backend)
    return y, x if residual is None else s


def reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) by the formula, differentiable by torch itself."""
    s = x if residual is None else x + residual
    wide = s.to(opmath(s.dtype))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * (offset + weight.to(wide.dtype))).to(s.dtype), s


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (y, s, rstd); s is empty without a residual."""
    s = x if residual is None else x + residual
    wide = s.to(opmath(s.dtype))
    rstd = inverse_rms(wide, eps)
    y = (wide * rstd.unsqueeze(-1) * (offset + weight.to(wide.dtype))).to(s.dtype)
    return y, x.new_empty(0) if residual is None else s, rstd


def backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (dx, dw); dw is empty where it is not needed. s is x where there was no residual."""
    dx, dw = norm_backward(dy, s, weight, rstd, offset, need_dw)
    if ds is not None:
        dx += ds
    return dx.to(s.dtype), dw


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(mean x² + eps)^−½ over the last dimension."""
    return (x.square().mean(-1) + eps).rsqrt()


def norm_backward(
    dy: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx in the type of rstd, without ds; dw or empty) of a norm over the last dimension."""
    dy, normed = dy.to(rstd.dtype), s.to(rstd.dtype) * rstd.unsqueeze(-1)
    g = dy * (offset + weight.to(rstd.dtype))
    dx = rstd.unsqueeze(-1) * (g - normed * (g * normed).mean(-1, keepdim=True))
    if not need_dw:
        return dx, weight.new_empty(0)
    return dx, (dy * normed).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)


@torch.library.custom_op("trimpot::add_rms_norm", mutates_args=())
def _op(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = implementation("add_rms_norm", resolve("add_rms_norm", backend, x))
    return chosen.forward(x, residual, weight, eps, offset)


@_op.register_fake
def _(x, residual, weight, eps, offset, backend):
    s = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), s, x.new_empty(x.shape[:-1], dtype=opmath(x.dtype))


@torch.library.custom_op("trimpot::add_rms_norm_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = implementation("add_rms_norm", resolve("add_rms_norm", backend, dy))
    return chosen.backward(dy, ds, s, weight, rstd, offset, need_dw)


@_backward_op.register_fake
def _(dy, ds, s, weight, rstd, offset, need_dw, backend):
    return s.new_empty(s.shape), weight.new_empty(weight.shape if need_dw else 0)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, offset, backend = inputs
    _, s, rstd = output
    ctx.save_for_backward(x if residual is None else s, weight, rstd)
    ctx.has_residual, ctx.offset, ctx.backend = residual is not None, offset, backend
    ctx.set_materialize_grads(False)  # a last norm's s has no gradient: no zeros are read for it


def _autograd_backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    need_dw = ctx.needs_input_grad[2]
    if dy is None:  # y was not used: the residual stream passes
        dx, dw = ds, weight.new_zeros(weight.shape) if need_dw else None
    else:
        ds = ds if ctx.has_residual else None
        dx, dw = _backward_op(dy, ds, s, weight, rstd, ctx.offset, need_dw, ctx.backend)
    return dx, dx if ctx.has_residual else None, dw if need_dw else None, None, None, None


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
