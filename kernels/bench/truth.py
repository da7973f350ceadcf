"""Before anything is timed: what is right in float64, how far torch is from it, and are we closer.

A backend that is not there, or whose result is wrong, becomes a row without times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimpot.kernels.bench import ours
from trimpot.kernels.bench.case import (
    Case,
    Outcome,
    Variant,
    cast,
    copied,
    outcome_of,
    upstream_like,
)
from trimpot.kernels.bench.check import FACTOR, LOW, Judgement, judge, worst
from trimpot.kernels.bench.peers import torch_variant
from trimpot.kernels.bench.work import BOTH
from trimpot.kernels.errors import BackendError

Row = dict[str, Any]


@dataclass(frozen=True)
class Ours:
    """A backend of ours that is there: what was asked for, what runs."""

    wanted: str
    backend: str
    variant: Variant
    judgement: Judgement


class Truth:
    """What a case's outcome is in float64, and how far torch is from it."""

    def __init__(self, case: Case):
        self.case = case
        inputs = copied(case.inputs) if case.in_place else case.inputs
        with torch.no_grad():
            self.upstream = upstream_like(case.torch_form(inputs))
        wide = tuple(u.double() for u in self.upstream)
        exactly = Variant("exact", case.torch_form)
        self.exact: Outcome = (
            case.exact(case.inputs, self.upstream)
            if case.exact
            else outcome_of(exactly, case, cast(case.inputs, torch.float64), wide)
        )
        self._yardsticks: dict[str, Outcome] = {}

    def judge(self, variant: Variant, backend: str) -> Judgement:
        """Arithmetic of less than float32 is held to a share of bf16's error, everything else to
        twice torch's own. (16-bit tensors round every result as torch does.)"""
        shares = [share for end, share in LOW.items() if backend.endswith(end)]
        low = bool(shares) and self.case.dtype is torch.float32
        found = outcome_of(variant, self.case, self.case.inputs, self.upstream)
        factor = shares[0] if low else FACTOR
        return judge(found, self._yardstick(low), self.exact, factor)

    def _yardstick(self, bf16: bool) -> Outcome:
        name = "bf16" if bf16 else "own"
        if name not in self._yardsticks:
            peer = torch_variant(self.case, torch.bfloat16 if bf16 else None)
            self._yardsticks[name] = outcome_of(peer, self.case, self.case.inputs, self.upstream)
        return self._yardsticks[name]

    def error_of_peer(self, peer: Variant) -> float | str:
        """Its worst relative error; or why it has none, of a peer that does not run here."""
        try:
            found = outcome_of(peer, self.case, self.case.inputs, self.upstream)
        except Exception as error:  # other people's code: what it raises is what its row says
            if peer.name.startswith("torch"):
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return worst(found, self.exact)


def prepare(case: Case, wanted: str, truth: Truth) -> Ours | BackendError:
    """The backend as a variant, judged; or the error that says why it is not to be had."""
    sample = next(v for v in case.inputs.values() if isinstance(v, torch.Tensor))
    try:
        variant = Variant(f"ours {wanted}", case.ours(wanted))
        backend = ours.resolved(case.call.op, wanted, sample)
        return Ours(wanted, backend, variant, truth.judge(variant, backend))
    except BackendError as error:
        return error


def refused(mode: str, wanted: str, peer: str, found: Ours | BackendError) -> Row:
    """A row without times, for all modes and peers: the backend is not there, or is wrong."""
    row: Row = {
        "mode": mode,
        "wanted": wanted,
        "backend": wanted,
        "peer": peer,
        "p20": None,
        "p50": None,
        "p80": None,
    }
    if isinstance(found, BackendError):
        return row | {"verdict": "MISSING", "why": str(found), "within_tolerance": None}
    return row | {
        "backend": found.backend,
        "verdict": "WRONG",
        "why": found.judgement.why,
        "error": found.judgement.error,
        "within_tolerance": False,
    }


def untimed(mine: Ours, peer: str, peer_error: float | str) -> Row:
    """A row without times, of a peer that is only an oracle here, or that failed."""
    failed = isinstance(peer_error, str)
    return {
        "mode": BOTH,
        "wanted": mine.wanted,
        "backend": mine.backend,
        "peer": peer,
        "p20": None,
        "p50": None,
        "p80": None,
        "verdict": "FAILED" if failed else "CHECKED",
        "why": f"the peer: {peer_error}" if failed else "interpreted here: errors only",
        "error": mine.judgement.error,
        "peer_error": None if failed else peer_error,
        "within_tolerance": True,
    }
