"""Liger-Kernel's modules as peers, where they are installed. Their kernels are Triton's: on a GPU
they are timed, on a CPU they run under TRITON_INTERPRET=1 only, and are checked and not timed."""

from __future__ import annotations

import os
from typing import Any

import torch

from trimpot.kernels.bench.case import Case, Tensors, Variant, copied
from trimpot.kernels.bench.ours import IGNORED

Outs = tuple[torch.Tensor, ...]


def variant(case: Case) -> Variant | None:
    """None for an op that Liger has not, and on a CPU without the interpreter."""
    on_gpu = next(v for v in case.inputs.values() if isinstance(v, torch.Tensor)).is_cuda
    if case.call.op not in RUN or not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if not on_gpu:
        from trimpot.kernels.proof import interpreter

        interpreter.enable()  # as shipped it computes bf16 wrongly
    # Liger's backward writes into what forward was given; the copies are the peer's own.
    return Variant("liger", RUN[case.call.op], copied)


def _swiglu(t: Tensors) -> Outs:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return (_apply(LigerSiLUMulFunction, t["gate"], t["up"]),)


def _geglu(t: Tensors) -> Outs:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return (_apply(LigerGELUMulFunction, t["gate"], t["up"]),)


def _cross_entropy(t: Tensors) -> Outs:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
    return (loss(t["weight"], t["h"], t["labels"]),)


def _apply(function: Any, *values: torch.Tensor) -> torch.Tensor:
    return function.apply(*values)


RUN = {"swiglu": _swiglu, "geglu": _geglu, "linear_cross_entropy": _cross_entropy}
