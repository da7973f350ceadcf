"""GeGLU, y = GELU(gate)·up, with GELU by its tanh form (transformers: gelu_pytorch_tanh); formulas
and types in glu.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trimpot.kernels.ops import glu
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import opmath


def geglu(gate: torch.Tensor, up: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """→ y, in the wider type of the two. Raises KernelError unless they are of one shape."""
    gate, up = glu.checked("geglu", gate, up)
    return _op(gate, up, backend)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y by the formula, differentiable by torch itself."""
    wide = opmath(gate.dtype)
    return (F.gelu(gate.to(wide), approximate="tanh") * up.to(wide)).to(gate.dtype)


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu.forward(True, gate, up)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (dgate, dup)"""
    return glu.backward(True, dy, gate, up)


@torch.library.custom_op("trimpot::geglu", mutates_args=())
def _op(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    return implementation("geglu", resolve("geglu", backend, gate)).forward(gate, up)


@_op.register_fake
def _(gate, up, backend):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("trimpot::geglu_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation("geglu", resolve("geglu", backend, gate)).backward(dy, gate, up)


@_backward_op.register_fake
def _(dy, gate, up, backend):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _autograd_backward(ctx, dy):
    return *_backward_op(dy, *ctx.saved_tensors, ctx.backend), None


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
