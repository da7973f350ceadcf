"""Our public ops as programs over a case's tensors.

The op's module is imported when its case is made, so that an op that is not there costs a row and
not the run. `backend` reaches the op as the user gave it: auto, torch, cpp, cpp:int16, triton.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from trimpot.kernels.bench.case import Program, Tensors
from trimpot.kernels.dispatch import AUTO
from trimpot.kernels.errors import BackendError
from trimpot.kernels.ops.implementation import implementation, resolve

EPS = 1e-5
IGNORED = -100
ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0

Outs = tuple[torch.Tensor, ...]


def program(op: str, backend: str) -> Program:
    """Raises BackendError where the op or the backend is not there."""
    module = _module(op)
    if backend not in (AUTO, "torch"):
        _there(op, backend)
    return functools.partial(RUN[op], module, backend)


def resolved(op: str, backend: str, sample: torch.Tensor) -> str:
    """The backend that a call on tensors like `sample` takes."""
    _module(op)
    return resolve(op, backend, sample)


def _module(op: str) -> ModuleType:
    name = f"trimpot.kernels.ops.{op}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BackendError(f"there is no op {op} in these sources") from None


def _there(op: str, backend: str) -> None:
    try:
        implementation(op, backend)
    except ModuleNotFoundError as error:
        raise BackendError(f"{op} can't run on {backend}: there is no {error.name}") from None


def _lora(module: ModuleType, backend: str, t: Tensors) -> Outs:
    ys = module.lora_linear(t["x"], t["weights"], t["a"], t["b"], t["scales"], backend=backend)
    return tuple(ys)


def _cross_entropy(module: ModuleType, backend: str, t: Tensors) -> Outs:
    loss = module.linear_cross_entropy(
        t["h"], t["weight"], t["labels"], ignore_index=IGNORED, backend=backend
    )
    return (loss,)


def _logprobs(module: ModuleType, backend: str, t: Tensors) -> Outs:
    return (
        module.token_logprobs(
            t["h"], t["weight"], t["labels"], ignore_index=IGNORED, backend=backend
        ),
    )


def _norm(module: ModuleType, backend: str, t: Tensors) -> Outs:
    return tuple(module.add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend))


def _rope(module: ModuleType, backend: str, t: Tensors) -> Outs:
    return tuple(module.rope(t["q"], t["k"], t["cos"], t["sin"], backend=backend))


def _attention(module: ModuleType, backend: str, t: Tensors) -> Outs:
    o, _ = module.varlen_attention(t["q"], t["k"], t["v"], t["cu_seqlens"], backend=backend)
    return (o,)


def _glu(name: str, module: ModuleType, backend: str, t: Tensors) -> Outs:
    return (getattr(module, name)(t["gate"], t["up"], backend=backend),)


def _adamw(module: ModuleType, backend: str, t: Tensors) -> Outs:
    """The norm is one pass over the gradient, as the peer's clipping has it."""
    norm = torch.linalg.vector_norm(t["grad"], dtype=torch.float32)
    scale = min(1.0, MAX_NORM / (float(norm) + 1e-6))
    module.adamw_step(
        t["param"], t["grad"], t["exp_avg"], t["exp_avg_sq"], t["copy_out"],
        step=t["step"], grad_scale=scale, backend=backend, **ADAMW,
    )  # fmt: skip
    return t["param"], t["exp_avg"], t["exp_avg_sq"], t["copy_out"]


RUN: dict[str, Callable[[ModuleType, str, Tensors], Outs]] = {
    "lora_linear": _lora,
    "linear_cross_entropy": _cross_entropy,
    "token_logprobs": _logprobs,
    "add_rms_norm": _norm,
    "rope": _rope,
    "varlen_attention": _attention,
    "swiglu": functools.partial(_glu, "swiglu"),
    "geglu": functools.partial(_glu, "geglu"),
    "adamw_step": _adamw,
}
