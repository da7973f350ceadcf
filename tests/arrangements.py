"""Runs prepared plans in one process group: `torchrun … arrangements.py RESULT PLAN.json[@STEP] …`.

Many engines in one process, since a process costs 8 s to start and a tiny run 2. With @STEP a run
is told to stop after that step, and goes on in a second start; with @STEP! it does not.
Rank 0 writes {argument: [loss of each step], "argument#held-out": [held-out losses],
"argument#norms": [gradient's norm of each step]} to RESULT, and adds the samples of each step to
RUN/samples.jsonl.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from trimpot.runner import engine, loop
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.types import Event, Plan, StepReport
from trimpot.runner.worker import train


def run(plan: Plan, stop_after: int | None, for_good: bool) -> dict[str, list[float]]:
    """{"": losses of all steps, "#held-out": held-out losses, "#norms": norms of all steps}"""
    flag = Path(plan.run_dir, "stop")
    losses: list[float] = []
    held_out: list[float] = []
    norms: list[float] = []

    def hear(told: object) -> None:
        if isinstance(told, StepReport):
            losses.append(told.loss)
            norms.append(told.grad_norm)
            if told.step + 1 == stop_after:
                flag.touch()
        elif isinstance(told, Event) and told.kind == "eval":
            held_out.append(told.values["loss"])

    deal = loop.deal

    def watched(indices, *rest):
        if engine.ranks()[0] == 0:
            with Path(plan.run_dir, "samples.jsonl").open("a") as file:
                file.write(json.dumps(indices.tolist()) + "\n")
        return deal(indices, *rest)

    loop.deal = watched
    try:
        train_through(plan, hear, stop_after, flag, for_good)
    finally:
        loop.deal = deal
    return {"": losses, "#held-out": held_out, "#norms": norms}


def train_through(
    plan: Plan, hear: Callable[[object], None], stop_after: int | None, flag: Path, for_good: bool
) -> None:
    if stop_after == 1:
        flag.touch()
    last = train(plan, hear)
    if stop_after is not None:
        assert (last.step, last.complete) == (stop_after, False), last
        dist.barrier()
        flag.unlink(missing_ok=True)
        dist.barrier()
        if for_good:
            return
        last = train(plan, hear)
    assert last.complete


def main() -> None:
    result, *arguments = sys.argv[1:]
    engine.join_workers()
    losses: dict[str, list[float]] = {}
    for argument in arguments:
        path, _, stop_after = argument.partition("@")
        plan = plan_from_json(Path(path).read_text())
        step, for_good = stop_after.rstrip("!"), stop_after.endswith("!")
        curves = run(plan, int(step) if step else None, for_good)
        losses |= {argument + which: curve for which, curve in curves.items()}
        gc.collect()
    if engine.ranks()[0] == 0:
        Path(result).write_text(json.dumps(losses))
    engine.leave_workers()


if __name__ == "__main__":
    main()
