"""Cases of the ops that stream: add + RMSNorm, RoPE, GLUs, AdamW. Bytes decide, not FLOPs.

M tokens, H hidden, I intermediate, D head width, P parameters.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from trimpot.kernels.bench import ours
from trimpot.kernels.bench.case import Case, Program, Source, Tensors, Variant, opmath
from trimpot.kernels.bench.shapes import Call
from trimpot.kernels.bench.work import STEP, Work, glu_work, norm_work, rope_work

Outs = tuple[torch.Tensor, ...]
THETA = 10_000.0


def norm_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    """x and the residual get gradients, the norm's weight is frozen as under LoRA."""
    source = Source(device, dtype)
    inputs: Tensors = {
        "x": source.normal(tokens, call.width),
        "residual": source.normal(tokens, call.width),
        "weight": source.normal(call.width, scale=0.1).add_(1),
    }
    work = norm_work(tokens, call.width, dtype.itemsize)
    return Case(call, dtype, inputs, ("x", "residual"), norm_torch, _ours(call.op), work)


def norm_torch(t: Tensors) -> Outs:
    """LlamaRMSNorm after the residual's addition."""
    s = t["x"] + t["residual"]
    wide = opmath(s)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ours.EPS)
    return t["weight"] * wide.to(s.dtype), s


def rope_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    source = Source(device, dtype)
    heads, kv, d = call.shape.heads, call.shape.kv_heads, call.width
    rates = THETA ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), rates)[None]
    inputs: Tensors = {
        "q": source.normal(1, tokens, heads, d),
        "k": source.normal(1, tokens, kv, d),
        "cos": angles.cos().to(device, dtype),
        "sin": angles.sin().to(device, dtype),
    }
    work = rope_work(tokens, heads + kv, d, dtype.itemsize)
    return Case(call, dtype, inputs, ("q", "k"), rope_torch, _ours(call.op), work)


def rope_torch(t: Tensors) -> Outs:
    """transformers' apply_rotary_pos_emb on [B, H, T, D] views, with its duplicated table."""
    cos, sin = (torch.cat([t[name]] * 2, dim=-1)[:, None] for name in ("cos", "sin"))

    def rotated(x_BTHD: torch.Tensor) -> torch.Tensor:
        x = x_BTHD.transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).transpose(1, 2)

    return rotated(t["q"]), rotated(t["k"])


def glu_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    source = Source(device, dtype)
    inputs: Tensors = {name: source.normal(tokens, call.width) for name in ("gate", "up")}
    work = glu_work(tokens, call.width, dtype.itemsize)
    form = {"swiglu": swiglu_torch, "geglu": geglu_torch}[call.op]
    return Case(call, dtype, inputs, ("gate", "up"), form, _ours(call.op), work)


def swiglu_torch(t: Tensors) -> Outs:
    return (functional.silu(t["gate"]) * t["up"],)


def geglu_torch(t: Tensors) -> Outs:
    return (functional.gelu(t["gate"], approximate="tanh") * t["up"],)


def adamw_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    """One layer's parameters, fp32 states; `dtype` is the gradient's. The copy is bf16.

    Clipping by the norm, the update, and the low-precision copy: what a step of mixed-precision
    training does with each parameter.
    """
    del tokens
    size = call.shape.layer_parameters
    wide, low = Source(device, torch.float32), Source(device, dtype)
    copy_dtype = torch.bfloat16 if dtype is torch.float32 else dtype
    inputs: Tensors = {
        "param": wide.normal(size, scale=0.02),
        "grad": low.normal(size, scale=0.01),
        "exp_avg": wide.normal(size, scale=0.001),
        "exp_avg_sq": wide.normal(size, scale=0.01).square_(),
        "copy_out": torch.zeros(size, dtype=copy_dtype, device=device),
        "step": 10,
    }
    # The norm reads the gradient once more.
    moved = size * (6 * 4 + 2 * dtype.itemsize + copy_dtype.itemsize)
    return Case(
        call,
        dtype,
        inputs,
        (),
        adamw_torch,
        _ours(call.op),
        {STEP: Work(16 * size, moved)},
        in_place=True,
        peers={"torch": Variant("torch", _FusedAdamW(), _FusedAdamW.prepare)},
    )


def adamw_torch(t: Tensors) -> Outs:
    """The definition, in the tensors' dtypes; clipping as torch's clip_grad_norm_ has it."""
    o = ours.ADAMW
    grad = t["grad"].to(t["param"].dtype)
    grad = grad * (ours.MAX_NORM / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
    param = t["param"] * (1 - o["lr"] * o["weight_decay"])
    first = o["beta1"] * t["exp_avg"] + (1 - o["beta1"]) * grad
    second = o["beta2"] * t["exp_avg_sq"] + (1 - o["beta2"]) * grad * grad
    spread = second.sqrt() / (1 - o["beta2"] ** t["step"]) ** 0.5 + o["eps"]
    param = param - o["lr"] / (1 - o["beta1"] ** t["step"]) * first / spread
    return param, first, second, param.to(t["copy_out"].dtype)


class _FusedAdamW:
    """torch.optim.AdamW(fused=True) with clip_grad_norm_ and the cast, as a loop would have it."""

    @staticmethod
    def prepare(t: Tensors) -> Tensors:
        o = ours.ADAMW
        param = t["param"].detach().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [param],
            lr=o["lr"],
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            weight_decay=o["weight_decay"],
            fused=True,
        )
        optimizer.state[param] = {
            "step": torch.tensor(float(t["step"] - 1), device=param.device),
            "exp_avg": t["exp_avg"],
            "exp_avg_sq": t["exp_avg_sq"],
        }
        return {**t, "param": param, "optimizer": optimizer}

    def __call__(self, t: Tensors) -> Outs:
        param = t["param"]
        # A master weight's gradient has the master's type: mixed-precision loops widen it.
        param.grad = t["grad"] if t["grad"].dtype == param.dtype else t["grad"].to(param.dtype)
        torch.nn.utils.clip_grad_norm_([param], ours.MAX_NORM)
        t["optimizer"].step()
        t["copy_out"].copy_(param.detach())
        return param.detach(), t["exp_avg"], t["exp_avg_sq"], t["copy_out"]


def _ours(op: str) -> functools.partial[Program]:
    return functools.partial(ours.program, op)
