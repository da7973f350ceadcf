"""AdamW in one pass in C++ (csrc/optim.cpp); definition in ops/adamw_step.py."""

from __future__ import annotations

import math

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import TYPES, address, check


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
    check("adamw_step", param, exp_avg, exp_avg_sq)
    check("adamw_step", grad)
    updated = [param, exp_avg, exp_avg_sq, copy_out]
    flat = [None if tensor is None else tensor.contiguous() for tensor in updated]
    p, m, v, copy = flat
    grad = grad.contiguous()
    native.extension().adamw_step(
        address(p), grad.data_ptr(), TYPES[grad.dtype], address(m), address(v), address(copy),
        0 if copy_out is None else check("adamw_step", copy_out), param.numel(), grad_scale,
        1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step), eps,
    )  # fmt: skip
    for tensor, result in zip(updated, flat, strict=True):
        if tensor is not None and result is not None and result is not tensor:
            tensor.copy_(result)  # it had gaps
