"""Which backend runs an op, and why. Decided before the launch, never by trying and catching.

Every op has the backend "torch": its plain definition, which runs everywhere. It has that name
also where numpy is all the definition needs, so that a plan says the same word for every op.
Before it stand the faster ones, best first: "native" is the C++ extension. Each backend has a
predicate over the facts of the call (device, dtype, shape …); the first that says yes is taken.

No torch here: `trimpot plan` and `trimpot doctor` ask too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimpot.kernels import native
from trimpot.kernels.errors import BackendError

AUTO = "auto"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What runs: `backend` for `op`. `why` is for people: the log, the journal, the doctor."""

    op: str
    backend: str
    why: str


@dataclass(frozen=True)
class Answer:
    """A predicate's: whether the backend can run on these facts, and the reason either way."""

    runs: bool
    why: str


@dataclass(frozen=True)
class Backend:
    name: str
    judge: Callable[[Facts], Answer]


def _native_pack(_: Facts) -> Answer:
    state = native.state()
    return Answer(state.available, "C++, segment tree" if state.available else state.why)


def _native_hash(_: Facts) -> Answer:
    state = native.state()
    if not state.available:
        return Answer(False, state.why)
    return Answer(True, f"C++, {state.hash_variants[0]}")


def _definition(_: Facts) -> Answer:
    return Answer(True, "plain definition")


OPS: dict[str, tuple[Backend, ...]] = {
    "content_hash": (Backend("native", _native_hash), Backend("torch", _definition)),
    "pack": (Backend("native", _native_pack), Backend("torch", _definition)),
}
"""Backends of each op, best first. The last one, torch, runs on any facts."""


def choose(op: str, wanted: str = AUTO, **facts: Any) -> Choice:
    """The backend for `op`: the best that runs on `facts`, or the `wanted` one.

    Raises BackendError for an unknown op or backend, and for a wanted backend that can't run:
    what was asked for is never quietly replaced.
    """
    backends = _backends(op)
    if wanted != AUTO:
        return _forced(op, wanted, facts)
    refusals: list[str] = []
    for backend in backends:
        answer = backend.judge(facts)
        if answer.runs:
            return Choice(op, backend.name, "; ".join([answer.why, *refusals]))
        refusals.append(f"no {backend.name}: {answer.why}")
    raise BackendError(f"no backend of {op} can run: {'; '.join(refusals)}")


def _forced(op: str, wanted: str, facts: Facts) -> Choice:
    by_name = {backend.name: backend for backend in _backends(op)}
    if wanted not in by_name:
        raise BackendError(f"{op} has no backend {wanted!r}; it has {', '.join(by_name)}, or auto")
    answer = by_name[wanted].judge(facts)
    if not answer.runs:
        raise BackendError(
            f"{op}: {wanted} was asked for and can't run: {answer.why}; use auto to take what can"
        )
    return Choice(op, wanted, f"asked for; {answer.why}")


def _backends(op: str) -> tuple[Backend, ...]:
    if op in OPS:
        return OPS[op]
    close = difflib.get_close_matches(op, OPS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(available_ops())}"
    raise BackendError(f"there is no op {op!r}; {hint}")


def available_ops() -> list[str]:
    return sorted(OPS)


def table() -> list[Choice]:
    """What `auto` takes on this machine, op by op, with no facts but the machine's own."""
    return [choose(op) for op in available_ops()]
