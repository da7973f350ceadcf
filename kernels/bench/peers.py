"""Whom a call is measured against: torch as users write it, compiled, and other people's modules.

torch is there in each dtype that might be its fastest: where ours computes a float32 call in
int16, torch's bf16 stands beside its float32.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence

import torch

from trimpot.kernels.bench import liger
from trimpot.kernels.bench.case import Case, Tensors, Variant, cast
from trimpot.kernels.errors import KernelError

PEERS = ("torch", "compile", "peft", "liger")

Foreign = Mapping[str, Callable[[Case], Variant | None]]
"""Peers that this floor may not import, by name: given by who calls."""


def torch_variant(case: Case, dtype: torch.dtype | None = None) -> Variant:
    """The plain peer, in the case's dtype or another."""
    if dtype is None:
        return case.peers.get("torch") or Variant("torch", case.torch_form)
    return Variant("torch:bf16", case.torch_form, functools.partial(_cast, dtype))


def _cast(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return cast(tensors, dtype)


def check_names(names: Sequence[str]) -> None:
    """Raises KernelError for a peer that is not known."""
    if unknown := [name for name in names if name not in PEERS]:
        raise KernelError(f"there is no peer {unknown[0]!r} to bench against; {', '.join(PEERS)}")


def missing(names: Sequence[str], foreign: Foreign) -> dict[str, str]:
    """{peer: why it is left out}, of those that this machine does not have."""
    why: dict[str, str] = {}
    if "compile" in names and not shutil.which(os.environ.get("CXX", "g++")):
        why["compile"] = "torch.compile wants a C++ compiler, and there is none; it is left out"
    if "liger" in names and importlib.util.find_spec("liger_kernel") is None:
        why["liger"] = "liger-kernel is not installed; it is left out (pip install liger-kernel)"
    if "peft" in names and "peft" not in foreign:
        why["peft"] = "peft is not installed; it is left out (pip install peft)"
    return why


def variants(case: Case, names: Sequence[str], foreign: Foreign) -> list[Variant]:
    """The peers of `names` that have something to say of this op."""
    found: list[Variant] = []
    for name in names:
        if name == "torch":
            found.append(torch_variant(case))
        elif name == "compile" and case.leaves:
            torch.compiler.reset()  # else the tenth case finds dynamo's cache full
            found.append(Variant("compile", torch.compile(case.torch_form, dynamic=False)))
        elif name == "liger":
            found += [v for v in [liger.variant(case)] if v is not None]
        elif name in foreign:
            found += [v for v in [foreign[name](case)] if v is not None]
    return found
