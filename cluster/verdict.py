"""What ended a start of a run: out of Ray's exceptions, into one line and policy.py's words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trimpot.cluster.policy import Failure, Kind
from trimpot.runner import errors
from trimpot.runner.errors import ClusterError, TrimpotError, WorkerError

AFTERMATH = re.compile(r"connection (closed|reset)|broken pipe|gloo|nccl|store", re.IGNORECASE)
"""What the others say of a collective once one worker is gone."""
MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory", re.IGNORECASE)
DIED_IN_START = "WorkerGroupStartupFailedError"
"""Raised of dead actors only, which it may have lost on its way here."""
WRAPS = ("cause", "health_check_failure", "controller_failure")
KINDS: dict[str, Kind] = {
    "WorkerStorageError": "storage",
    "HangError": "hang",
    "CorruptionError": "corruption",
}
"""Of our own errors, by name; any other is a mistake that no restart mends."""


def explain(error: BaseException) -> TrimpotError:
    """The error that a worker raised if it is ours, else a WorkerError or ClusterError that says
    in one line what became of which worker. `error`: what Ray Train raised."""
    rank, cause = _culprit(error)
    if (own := _own(cause)) is not None:
        return own
    if "No module named 'trimpot'" in str(cause):
        return ClusterError(f"{_why(cause)} on the cluster's nodes; install trimpot there, as here")
    who = "Ray Train" if rank is None else f"worker {rank}"
    if rank is None and _in_start(error, cause):
        who = "a worker that started"
    match _kind(error, cause):
        case "crash":
            return WorkerError(f"{who} died{_last_words(cause)}")
        case "node lost":
            return WorkerError(f"{who} died with its node")
        case "preempted":
            return WorkerError(f"{who} lost its node, which was taken back by its owner")
        case "no room":
            return WorkerError("the cluster did not start the workers in time")
        case "out of memory":
            return WorkerError(f"{who} ran out of memory: {_why(cause)}")
        case _:
            return WorkerError(f"{who} failed: {_why(cause)}")


def verdict(
    error: BaseException,
    *,
    step: int,
    saved: int,
    nodes: list[str],
    leaving: frozenset[str],
    lost: frozenset[str],
) -> Failure:
    """Judge an error that `explain` made of Ray's, which is its cause.

    `step`, `saved`: the newest step done, and that a durable checkpoint holds. `nodes`: of each
    rank, as far as known. `leaving`: nodes that had said that they would go; `lost`: that are
    gone.
    """
    if not isinstance(error, WorkerError):
        kind = KINDS.get(type(error).__name__, "mistake")
        suspects = getattr(error, "ranks", ())
        rank = suspects[0] if len(suspects) == 1 else getattr(error, "rank", None)
    else:
        assert error.__cause__ is not None
        rank, cause = _culprit(error.__cause__)
        kind = _kind(error.__cause__, cause)
        gone = next((r for r, node in enumerate(nodes) if node in lost), None)
        if kind in ("crash", "exception") and gone is not None:
            kind, rank = "node lost", gone
            error = WorkerError(f"worker {rank} died with its node")
        if kind in ("crash", "node lost", "exception", "no room") and leaving & {*nodes}:
            kind = "preempted"
    node = nodes[rank] if rank is not None and rank < len(nodes) else None
    return Failure(kind, str(error), step, saved, rank, node)


def _culprit(error: BaseException) -> tuple[int | None, BaseException]:
    """(rank, its exception) that the other workers' are likely to follow from."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", None) or {})
    if not failures:
        return None, error

    def order(item: tuple[int, BaseException]) -> tuple[int, int]:
        rank, cause = item
        if _own(cause) is not None:
            return 0, rank
        if _died(cause):
            return 1, rank
        return (3 if AFTERMATH.search(str(cause)) else 2), rank

    return min(failures.items(), key=order)


def _kind(error: BaseException, cause: BaseException) -> Kind:
    """Of what is no error of ours. `error`: Ray Train's; `cause`: the culprit's."""
    if type(error).__name__ == "PreemptionError":
        return "preempted"
    if any(getattr(e, "preempted", False) is True for e in _chain(cause)):
        return "preempted"
    if MEMORY.search(f"{type(cause).__name__} {cause}") and not _killed(cause):
        return "out of memory"
    if _died(cause):
        gone = "node" in str(cause).lower() and "died" in str(cause) and not _killed(cause)
        return "node lost" if gone else "crash"
    if _named(cause, "WorkerGroupStartupTimeoutError"):
        return "no room"
    if _named(cause, DIED_IN_START):
        return "crash"
    return "crash" if AFTERMATH.search(str(cause)) else "exception"


def _in_start(error: BaseException, cause: BaseException) -> bool:
    """Whether a worker died before it had a rank. Ray Train's controller tells of that in an error
    of its own; that the controller itself died arrives as it is."""
    told = type(error).__name__ == "ControllerError"
    return told and (_died(cause) or _named(cause, DIED_IN_START))


def _named(error: BaseException, name: str) -> bool:
    return any(type(e).__name__ == name for e in _chain(error))


def _died(error: BaseException) -> bool:
    """Whether a worker's process ended, as opposed to raising something."""
    from ray.exceptions import RayActorError, WorkerCrashedError

    return any(isinstance(e, (RayActorError, WorkerCrashedError)) for e in _chain(error))


def _killed(error: BaseException) -> bool:
    """Ray found the process gone. It names the kernel's OOM killer then, whatever the reason."""
    return "worker process has died" in str(error)


def _last_words(error: BaseException) -> str:
    if "SIGTERM" in str(error):
        return " of SIGTERM"
    return " without a word: killed, or a segmentation fault"


def _own(error: BaseException) -> TrimpotError | None:
    return next((e for e in _chain(error) if isinstance(e, errors.TrimpotError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it wraps, each layer of Ray's under a name of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        wrapped: list[Any] = [getattr(error, name, None) for name in WRAPS]
        error = next((e for e in wrapped if isinstance(e, BaseException)), error.__cause__)


def _why(error: BaseException) -> str:
    """Class and last line of the innermost exception: outer ones carry remote tracebacks."""
    inner = list(_chain(error))[-1]
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[-1]}" if lines else type(inner).__name__
