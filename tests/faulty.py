"""Trains prepared plans while the disk misbehaves: `torchrun … faulty.py RESULT FAULT=PLAN.json …`.

Each rank writes {fault: [what it was told, in order]} to RESULT.RANK; an error that ended a run is
the last thing told.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from trimpot.runner import engine
from trimpot.runner.errors import TrimpotError
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.types import StepReport
from trimpot.runner.worker import train

FULL_FROM, FREE_AGAIN = 3, 7


def limit(size: int) -> None:
    """Files end here, as far as this process is concerned: the kernel cuts the write off."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def full_disk(rank: int, then_free: bool) -> Callable[[int], None]:
    """From FULL_FROM on, for this rank."""

    def after(step: int) -> None:
        if engine.ranks()[0] == rank and step == FULL_FROM:
            limit(50_000)
        if then_free and step == FREE_AGAIN:
            limit(resource.RLIM_INFINITY)

    return after


def slow_disk() -> Callable[[int], None]:
    """Nothing becomes durable before step 3 is done: a save that training waits for never ends."""
    gate, real = threading.Event(), os.fsync

    def fsync(handle: int) -> None:
        assert gate.wait(60), "training waits for its checkpoint"
        real(handle)

    os.fsync = fsync

    def after(step: int) -> None:
        if step == 3:
            gate.set()
            os.fsync = real

    return after


FAULTS = {
    "none": lambda: lambda step: None,
    "full for good": lambda: full_disk(0, then_free=False),
    "full for a while": lambda: full_disk(0, then_free=True),
    "full for worker 1": lambda: full_disk(1, then_free=True),
    "full for worker 1 for good": lambda: full_disk(1, then_free=False),
    "slow": slow_disk,
}


def run(fault: str, path: Path) -> list[str]:
    after, told = FAULTS[fault](), list[str]()

    def hear(event: object) -> None:
        if isinstance(event, StepReport):
            told.append(f"step {event.step}")
            after(event.step)
        elif event.kind == "checkpoint":
            told.append(f"saved {event.values['step']}")
        elif event.kind == "warning":
            told.append(f"warning: {event.values['text']}")

    try:
        last = train(plan_from_json(path.read_text()), hear)
        told.append(f"ended at {last.step}, complete {last.complete}")
    except TrimpotError as error:
        told.append(f"{type(error).__name__} {error.exit_code}: {error}")
    finally:
        limit(resource.RLIM_INFINITY)
    return told


def main() -> None:
    result, *arguments = sys.argv[1:]
    engine.join_workers()
    rank = engine.ranks()[0]
    told = {}
    for argument in arguments:
        fault, _, path = argument.partition("=")
        told[fault] = run(fault, Path(path))
        gc.collect()
    Path(f"{result}.{rank}").write_text(json.dumps(told))
    engine.leave_workers()


if __name__ == "__main__":
    main()
