"""Cases of the ops that are GEMMs: LoRA linears, linear + cross-entropy, token log-probabilities.

M tokens, K = d_in, N = d_out (all siblings together), R = rank, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional

from trimpot.kernels.bench import ours
from trimpot.kernels.bench.case import Case, Outcome, Program, Source, Tensors, opmath
from trimpot.kernels.bench.shapes import RANK, Call
from trimpot.kernels.bench.work import (
    BACKWARD,
    BOTH,
    FORWARD,
    Work,
    cross_entropy_work,
    lora_work,
)

SCALE = 2.0
"""lora_alpha / rank with PEFT's usual alpha = 2 r."""
CHUNK = 256
"""Tokens at a time where logits are needed in float64."""


def lora_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    source = Source(device, dtype)
    k, outs = call.width, call.outs
    inputs: Tensors = {
        "x": source.normal(tokens, k),
        "weights": [source.weight(n, k) for n in outs],
        "a": [source.normal(RANK, k, scale=1 / math.sqrt(k)) for _ in outs],
        "b": [source.normal(n, RANK, scale=0.1) for n in outs],
        "scales": [SCALE for _ in outs],
    }
    leaves = ("x", *(f"{name}.{j}" for name in "ab" for j in range(len(outs))))
    return Case(
        call=call,
        dtype=dtype,
        inputs=inputs,
        leaves=leaves,
        torch_form=lora_torch,
        ours=functools.partial(ours.program, "lora_linear"),
        work=lora_work(tokens, k, sum(outs), len(outs), dtype.itemsize),
    )


def lora_torch(t: Tensors) -> tuple[torch.Tensor, ...]:
    """PEFT's formula: y = x Wᵀ + scale · (x Aᵀ) Bᵀ, one sibling after the other."""
    return tuple(
        functional.linear(t["x"], w) + functional.linear(functional.linear(t["x"], a), b) * scale
        for w, a, b, scale in zip(t["weights"], t["a"], t["b"], t["scales"], strict=True)
    )


def _head_inputs(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Tensors:
    """One token in 16 is not trained."""
    source = Source(device, dtype)
    labels = source.integers(call.shape.vocab, tokens)
    labels[::16] = ours.IGNORED
    return {
        "h": source.normal(tokens, call.width),
        "weight": source.weight(call.shape.vocab, call.width),
        "labels": labels,
    }


def cross_entropy_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    """The head is frozen. Ours has the gradient ready after forward, so the parts of a training
    step are not timed apart; "fwd" is that of an evaluation."""
    m, h, v, size = tokens, call.width, call.shape.vocab, dtype.itemsize
    return Case(
        call=call,
        dtype=dtype,
        inputs=_head_inputs(call, tokens, device, dtype),
        leaves=("h",),
        torch_form=cross_entropy_torch,
        ours=functools.partial(ours.program, "linear_cross_entropy"),
        work=cross_entropy_work(m, h, v, size),
        exact=functools.partial(_by_rows, cross_entropy_torch),
    )


def cross_entropy_torch(t: Tensors) -> tuple[torch.Tensor, ...]:
    """transformers' loss: logits in float32, summed over the trained tokens."""
    logits = opmath(functional.linear(t["h"], t["weight"]))
    loss = functional.cross_entropy(logits, t["labels"], ignore_index=ours.IGNORED, reduction="sum")
    return (loss,)


def logprobs_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    m, h, v, size = tokens, call.width, call.shape.vocab, dtype.itemsize
    once = Work(2 * m * h * v, size * (m * h + v * h))
    return Case(
        call=call,
        dtype=dtype,
        inputs=_head_inputs(call, tokens, device, dtype),
        leaves=("h",),
        torch_form=logprobs_torch,
        ours=functools.partial(ours.program, "token_logprobs"),
        work={
            FORWARD: once,
            BACKWARD: once,
            BOTH: Work(2 * once.flops, size * (2 * m * h + v * h)),
        },
        exact=functools.partial(_by_rows, logprobs_torch),
    )


def logprobs_torch(t: Tensors) -> tuple[torch.Tensor, ...]:
    """TRL's form: the label's logit − logsumexp; 0 at ignored tokens."""
    logits = opmath(functional.linear(t["h"], t["weight"]))
    ignored = t["labels"] == ours.IGNORED
    index = t["labels"].masked_fill(ignored, 0)[:, None]
    found = logits.gather(1, index)[:, 0] - torch.logsumexp(logits, dim=-1)
    return (found.masked_fill(ignored, 0.0),)


def _by_rows(form: Program, t: Tensors, upstream: tuple[torch.Tensor, ...]) -> Outcome:
    """The float64 outcome, CHUNK tokens at a time: rows of logits are independent."""
    weight = t["weight"].double()
    outs: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    for at in range(0, len(t["labels"]), CHUNK):
        rows = slice(at, at + CHUNK)
        h = t["h"][rows].detach().double().requires_grad_(True)
        (out,) = form({"h": h, "weight": weight, "labels": t["labels"][rows]})
        given = upstream[0].double() if out.ndim == 0 else upstream[0][rows].double()
        grads += torch.autograd.grad(out, h, given)
        outs.append(out.detach())
    whole = torch.stack(outs).sum() if outs[0].ndim == 0 else torch.cat(outs)
    return {"out 0": whole, "d h": torch.cat(grads)}
