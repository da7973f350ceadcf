"""One step of AdamW (Loshchilov and Hutter 2019) on one tensor, with all that stands around it: the
gradient's unscaling and clipping before, the copy in the model's type after.

    g = grad·grad_scale
    p ← p·(1 − lr·weight_decay)
    m ← β₁·m + (1 − β₁)·g
    v ← β₂·v + ((1 − β₂)·g)·g
    p ← p − (lr/(1 − β₁ᵗ)·m) / (√v/√(1 − β₂ᵗ) + eps)
    copy_out ← p

Scalars are computed in double and rounded to float32 once. Each multiplication, addition, division
and root rounds by itself, in the order that stands here: backends agree bit for bit in m and v.
Traffic: p, m and v are read and written, the gradient is read, the copy written: 24 + 4 + 2 = 30
bytes per parameter, 28 with a gradient in bf16. torch's fused AdamW, clip and cast take 47.
"""

from __future__ import annotations

import math

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.implementation import implementation, resolve

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (torch.bfloat16, torch.float16)


def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy_out: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """In place: param, exp_avg (m), exp_avg_sq (v), float32; and copy_out, bf16 or fp16.

    grad: float32, bf16 or fp16. step: t, from 1 on. grad_scale: what grad is multiplied by, the
    clip factor over the loss scale. Raises KernelError for other types, shapes or steps.
    """
    states = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in states.items():
        _check(name, tensor, param, (torch.float32,))
    _check("grad", grad, param, GRADIENTS)
    if copy_out is not None:
        _check("copy_out", copy_out, param, COPIES)
    if step < 1:
        raise KernelError(f"adamw_step: step is {step}; the first is 1")
    scalars = lr, beta1, beta2, eps, weight_decay, step, grad_scale
    _op(param, grad, exp_avg, exp_avg_sq, copy_out, *scalars, backend)


def _check(
    name: str, tensor: torch.Tensor, param: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != param.shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(
            f"adamw_step: {name} is {tuple(tensor.shape)} {tensor.dtype}; {tuple(param.shape)} "
            f"{wanted} is wanted"
        )


def reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(param, exp_avg, exp_avg_sq) after the step, by the formula, in the type of param."""
    g = grad.to(param.dtype) * grad_scale
    m = exp_avg * beta1 + g * (1 - beta1)
    v = exp_avg_sq * beta2 + g * (1 - beta2) * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    p = param * (1 - lr * weight_decay) - m * (lr / (1 - beta1**step)) / denominator
    return p, m, v


def forward(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy_out: torch.Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    g = grad.to(torch.float32) * grad_scale
    # Products by themselves: add_ with alpha and addcmul_ may round once where we round twice.
    exp_avg.mul_(beta1).add_(g * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_((g * (1 - beta2)).mul_(g))
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    update = (exp_avg * (lr / (1 - beta1**step))).div_(denominator)
    param.mul_(1 - lr * weight_decay).sub_(update)
    if copy_out is not None:
        copy_out.copy_(param)


@torch.library.custom_op(
    "trimpot::adamw_step", mutates_args=("param", "exp_avg", "exp_avg_sq", "copy_out")
)
def _op(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy_out: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    backend: str,
) -> None:
    implementation("adamw_step", resolve("adamw_step", backend, param)).forward(
        param, grad, exp_avg, exp_avg_sq, copy_out,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
        grad_scale=grad_scale,
    )  # fmt: skip


@_op.register_fake
def _(param, grad, exp_avg, exp_avg_sq, copy_out, lr, beta1, beta2, eps, weight_decay, step,
      grad_scale, backend):  # fmt: skip
    return None
