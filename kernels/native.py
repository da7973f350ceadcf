"""The one door to the C++ extension, and the reason when it is shut.

The environment variable TRIMPOT_NATIVE=0 shuts it: every op then runs on its plain definition.
Arrays must be contiguous and of the type that `_native.pyi` names; results are written into the
array that is given. The extension checks both, and releases the GIL while it works.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimpot.kernels.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INTERFACE = 10
"""Rises together with kInterface in csrc/bindings.cpp, at every change of a signature."""

_NAME = "trimpot.kernels._native"


@dataclass(frozen=True)
class State:
    """Whether the extension runs here, and why or why not."""

    available: bool
    why: str
    cpu_features: tuple[str, ...] = ()
    """What the processor has: "avx2", "avx512dq", "neon" … Empty without the extension."""
    hash_variants: tuple[str, ...] = ()
    """Paths of the hash kernel that this processor runs, fastest first."""


@functools.cache
def state() -> State:
    """Found out once a process; `state.cache_clear()` looks again."""
    if os.environ.get("TRIMPOT_NATIVE") == "0":
        return State(False, "TRIMPOT_NATIVE=0 is set")
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError:
        return State(False, _why_absent())
    except ImportError as error:
        # Built for another Python or C library. The loader's message says which.
        return State(False, f"the extension does not load: {_one_line(error)}")
    if module.interface != INTERFACE:
        found = f"the extension is of interface {module.interface}, these sources want {INTERFACE}"
        return State(False, f"{found}; install trimpot again")
    return State(
        True,
        "the C++ extension is built and loads",
        tuple(module.cpu_features()),
        tuple(module.hash_variants()),
    )


def _why_absent() -> str:
    """The build leaves a module with the reason where it could not build the extension."""
    try:
        return str(importlib.import_module(f"{_NAME}_absent").WHY)
    except ModuleNotFoundError:
        return "the extension is not built; install trimpot with pip to build it"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def extension() -> Any:
    """The module itself, for those in `kernels/cpp/`. Raises BackendError where it is shut."""
    now = state()
    if not now.available:
        raise BackendError(f"native kernels can't run: {now.why}; use the torch backend")
    return importlib.import_module(_NAME)


def pack(lengths: NDArray[np.int64], capacity: int, bins: NDArray[np.int64]) -> int:
    """First-fit decreasing into `bins`; returns their number. See `ops/pack.py`."""
    return extension().pack(lengths, capacity, bins)


def hash_documents(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    seed: int,
    hashes: NDArray[np.uint64],
    variant: str | None = None,
) -> None:
    """XXH64 of each document into `hashes`. See `ops/content_hash.py`.

    `variant` is one of `state().hash_variants`, the fastest by default; all give the same bits.
    """
    module = extension()
    chosen = state().hash_variants[0] if variant is None else variant
    module.hash_documents(tokens, offsets, seed, hashes, chosen)


def softmax_loss(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    labels: int,
    weights: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    loss: int,
    lse: int,
    gradient: bool,
) -> None:
    """Cross-entropy of float32 logits [rows, columns], and its gradient in their place.

    Addresses: logits, labels (int64), weights (float32, 0: ones), loss and lse (float32, a row
    each). Formulas in csrc/softmax.h. Without `gradient` the logits stay, or are
    tanh(z/c) with a soft cap c.
    """
    extension().softmax_loss(
        logits, stride, rows, columns, labels, weights, ignore_index, label_smoothing, z_loss,
        softcap, loss, lse, gradient,
    )  # fmt: skip
