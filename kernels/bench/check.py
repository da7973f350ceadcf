"""Whether a result is right: its error against float64, held against torch's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trimpot.kernels.bench.case import Outcome

FACTOR = 2.0
"""A kernel may be off by twice what torch is off by in the same dtype (FlashAttention's rule)."""
LOW = {":int16": 0.5, ":bf16x3": 0.5, ":int8": 8.0}
"""How backends end that compute in less than the tensors' float32, and how far they may be off, of
the error of torch's bf16. Precision bf16 permits the first two; int8 has to be asked for."""


@dataclass(frozen=True)
class Error:
    """Of one tensor: ‖a − e‖ / ‖e‖, and max|a − e| / max|e|."""

    norm: float
    largest: float


@dataclass(frozen=True)
class Judgement:
    right: bool
    why: str
    """Of a wrong result: which tensor, by how much."""
    error: float
    """The worst tensor's ‖a − e‖ / ‖e‖."""


def error(found: torch.Tensor, exact: torch.Tensor) -> Error:
    """Infinite where a value is not finite or the shape is another."""
    if found.shape != exact.shape:
        return Error(math.inf, math.inf)
    difference = found.double() - exact.double()
    norm, most = float(exact.double().norm()), float(exact.abs().max()) if exact.numel() else 0.0
    if not exact.numel():
        return Error(0.0, 0.0)
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    floor = torch.finfo(torch.float64).tiny
    return Error(float(difference.norm()) / max(norm, floor),
                 float(difference.abs().max()) / max(most, floor))  # fmt: skip


def worst(found: Outcome, exact: Outcome) -> float:
    """The largest relative norm; infinite where a tensor is missing."""
    missing = Error(math.inf, math.inf)
    return max(
        (error(found[name], value) if name in found else missing).norm
        for name, value in exact.items()
    )


def judge(found: Outcome, yardstick: Outcome, exact: Outcome, factor: float = FACTOR) -> Judgement:
    """Each tensor's error ≤ factor × the yardstick's + the last bits of the dtype.

    The largest single deviation is held to 2 × in any case: one wrong element of a million
    hardly moves the norm.
    """
    why = ""
    for name, value in exact.items():
        if why:
            break
        if name not in found:
            why = f"{name} is missing"
            break
        mine, its = error(found[name], value), error(yardstick[name], value)
        eps = torch.finfo(found[name].dtype).eps
        # A scalar of the yardstick may be right by luck: 4 units. A norm averages over elements.
        floor = 4 * eps if value.ndim == 0 else eps / 16
        for what, got, limit in (
            ("norm", mine.norm, factor * its.norm + floor),
            ("largest", mine.largest, FACTOR * its.largest + max(floor, 1.5 * eps)),
        ):
            if not got <= limit and not why:
                why = f"{name}: error {got:.2e} ({what}), {limit:.2e} is the most"
    return Judgement(not why, why, worst(found, exact))
