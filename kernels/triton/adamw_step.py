"""One step of AdamW in one pass, in Triton; formula and order of roundings in ops/adamw_step.py.

Compiled without fma, with IEEE division and square root, so that each operation rounds by itself
and m and v are the definition's to the bit. Reads p, m, v and the gradient, writes p, m, v and the
copy: 30 bytes per parameter, 28 with a 16-bit gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch

BLOCK = 1024


@triton.jit
def adamw_kernel(
    P, G, M, V, COPY, count, grad_scale, keep, beta1, rest1, beta2, rest2, rate, root2, eps,
    HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keep = 1 − lr·weight_decay; rest = 1 − beta; rate = lr/(1 − beta1ᵗ); root2 = √(1 − beta2ᵗ)"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(G + at, mask=mask, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(M + at, mask=mask, other=0.0) * beta1 + g * rest1
    v = tl.load(V + at, mask=mask, other=0.0) * beta2 + g * rest2 * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps
    p = tl.load(P + at, mask=mask, other=0.0) * keep - tl.div_rn(m * rate, denominator)
    tl.store(M + at, m, mask=mask)
    tl.store(V + at, v, mask=mask)
    tl.store(P + at, p, mask=mask)
    if HAS_COPY:
        tl.store(COPY + at, p.to(COPY.dtype.element_ty), mask=mask)


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
    check("adamw_step", param, grad, exp_avg, exp_avg_sq, copy_out)
    written = [t for t in (param, exp_avg, exp_avg_sq, copy_out) if t is not None]
    dense = [t.contiguous() for t in written]
    launch(
        adamw_kernel,
        (triton.cdiv(param.numel(), BLOCK),),
        dense[0], grad.contiguous(), dense[1], dense[2], dense[-1], param.numel(),
        grad_scale, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps,
        HAS_COPY=copy_out is not None, BLOCK=BLOCK, threads=128, enable_fp_fusion=False,
    )  # fmt: skip
    for tensor, result in zip(written, dense, strict=True):
        if result is not tensor:
            tensor.copy_(result)


def proof_cases() -> list[Case]:
    def arguments(make: Maker, n: Sizes, copy: bool) -> dict[str, object]:
        single = torch.float32
        return {
            "param": make.normal(n["N"], dtype=single),
            "grad": make.normal(n["N"], scale=0.01),
            "exp_avg": make.normal(n["N"], scale=0.01, dtype=single),
            "exp_avg_sq": make.normal(n["N"], scale=0.01, dtype=single).square(),
            "copy_out": make.empty(n["N"]) if copy else None,
            "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3,
            "grad_scale": 0.5,
        }  # fmt: skip

    states = ("param", "exp_avg", "exp_avg_sq")
    large, small = {"N": 1 << 26}, {"N": 1 << 14}
    return [
        Case(
            "adamw_step", "forward", lambda make, n: arguments(make, n, True), large, small,
            budget=lambda n, size: n["N"] * (24 + 2 * size), wide_loads=True,
            in_place=(*states, "copy_out"), dtypes=("bf16", "fp16"),
        ),
        Case(
            "adamw_step", "forward", lambda make, n: arguments(make, n, False), large, small,
            budget=lambda n, size: n["N"] * (24 + size), wide_loads=True, in_place=states,
            variant="no copy", dtypes=("fp32",),
        ),
    ]  # fmt: skip
