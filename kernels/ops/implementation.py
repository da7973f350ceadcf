"""From the name of an op and a backend to the module that computes it.

Every tensor op has its definition in `ops/<op>.py`, C++ in `cpp/<op>.py`, Triton in
`triton/<op>.py` and what others made for GPUs in `vendor/<op>.py`, with functions of the same
names and signatures. Modules are loaded when they
are first asked for: nothing pulls in triton that does not use it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from trimpot.kernels.dispatch import AUTO, choose
from trimpot.kernels.errors import BackendError

FOLDERS = {"torch": "ops", "cpp": "cpp", "triton": "triton", "vendor": "vendor"}


@functools.cache
def implementation(op: str, backend: str) -> Any:
    """What computes `op` on `backend`: its module, or with a variant ("cpp:int16") what the
    module's `variant` makes of that; both have the op's `forward` and `backward`."""
    name, _, variant = backend.partition(":")
    if name not in FOLDERS:
        raise BackendError(f"{op} has no backend {backend!r}; it has {', '.join(FOLDERS)}, or auto")
    where = f"trimpot.kernels.{FOLDERS[name]}.{op}"
    if importlib.util.find_spec(where) is None:
        raise BackendError(f"{op} has no {name} kernel yet; use auto to take what there is")
    module = importlib.import_module(where)
    if not variant:
        return module
    if not hasattr(module, "variant"):
        raise BackendError(f"{op} has no variants of {name}; {variant!r} was asked for")
    return module.variant(variant)


def resolve(op: str, backend: str, tensor: torch.Tensor, **facts: Any) -> str:
    """The backend that runs `op` on tensors like this one: `backend`, unless that is auto."""
    if backend != AUTO:
        return backend
    return _chosen(op, tensor.device.type, str(tensor.dtype).removeprefix("torch."), **facts)


@functools.cache
def _chosen(op: str, device: str, dtype: str, **facts: Any) -> str:
    return choose(op, device=device, dtype=dtype, **facts).backend
