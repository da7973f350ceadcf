"""What a run's own journal says of what steps, saves and starts cost it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from trimpot.cluster.policy import Limits

STARTING = ("workers", "imports", "process group", "model", "engine")
"""Phases of every start, a restart's too; the driver's own come once."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """None where the journal has nothing of it."""

    start: Event | None = None
    """The newest."""
    micro_batches: int | None = None
    round_s: float | None = None
    """Of a step, per micro-batch that a worker computes in turn. Median."""
    save_s: float | None = None
    stall_s: float | None = None
    restart_s: float | None = None
    """From the last line of workers that were asked to leave to the next ones' first step, where
    the journal has such restarts. Else of starts that resumed, else of the first, what their phases
    took, and by how much the first step was longer than others: without the old workers' leaving.
    """


@dataclass
class _Session:
    rounds: int = 1
    phases: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of its steps."""
    resumed: bool = False
    begun: bool = False
    left: bool = False
    """Its workers were asked to leave, and the driver stayed."""
    began_s: float | None = None
    """When its first step began."""
    last_s: float | None = None
    """When its last step was done, or saved."""


def measure(events: Iterable[Event]) -> Measured:
    """`events`: of `journal.read`, all sessions."""
    sessions, saves, start = [_Session()], [], None
    for event in events:
        kind = event["kind"]
        session = sessions[-1]
        if kind == "phase":
            name = event["name"]
            if session.begun and name in ("driver", *STARTING):  # ahead of the next start's line
                sessions.append(session := _Session())
            session.phases[name] = event["seconds"]
        elif kind == "start":
            if session.begun:
                sessions.append(session := _Session())
            start, session.begun = event, True
            session.rounds = _rounds(event)
            session.resumed = event.get("resumed_from") is not None
        elif kind == "step":
            if not session.seconds and "time" in event:
                session.began_s = event["time"] - event["seconds"]
            session.seconds.append(event["seconds"])
            session.last_s = event.get("time")
        elif kind == "checkpoint" and "stall_seconds" in event:
            saves.append((event["seconds"], event["stall_seconds"]))
            session.last_s = event.get("time")
        elif kind == "leave":
            session.left = True
    per_round = [s / session.rounds for session in sessions for s in session.seconds[1:]]
    round_s = median(per_round) if per_round else None
    starts = {True: [], False: []}
    for session in sessions:
        if round_s is not None and session.seconds and "first step" in session.phases:
            first_s = session.phases["first step"] - round_s * session.rounds
            known = sum(session.phases.get(name, 0.0) for name in STARTING)
            starts[session.resumed].append(known + max(0.0, first_s))
    restarts = _gaps(sessions) or starts[True] or starts[False]
    return Measured(
        start=start,
        micro_batches=_micro_batches(start) if start else None,
        round_s=round_s,
        save_s=median(s for s, _ in saves) if saves else None,
        stall_s=median(s for _, s in saves) if saves else None,
        restart_s=median(restarts) if restarts else None,
    )


def _gaps(sessions: list[_Session]) -> list[float]:
    return [
        after.began_s - before.last_s
        for before, after in itertools.pairwise(sessions)
        if before.left and "driver" not in after.phases and before.last_s and after.began_s
    ]


def _micro_batches(start: Event) -> int:
    return max(1, start["batch_size"] // start["micro_batch_size"])


def _rounds(start: Event) -> int:
    split = start.get("sequence_parallel_size", 1)
    limits = Limits(1, start["world_size"], _micro_batches(start), split)
    return limits.rounds(start["world_size"])
