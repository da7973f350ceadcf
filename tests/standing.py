"""Trains a prepared plan under torchrun, one rank of it faulty: `standing.py PLAN.json FAULT RANK`.

Faults, from step FROM on: `sleep` does not come to its next collective; `slow` takes twice as long
for its forward, data included; `spin` never leaves C code that holds Python's lock.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from trimpot.runner import engine, loop
from trimpot.runner.worker import run_worker

FROM = 12


def sleep() -> None:
    time.sleep(600)


def spin() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")  # exponential backtracking, in C, under the lock


def main() -> None:
    plan, fault, rank = sys.argv[1:]
    forward, summed, steps = loop.token_loss_sum, loop.sum_over_workers, []

    def mine() -> bool:
        return engine.ranks()[0] == int(rank)

    def faulty_sum(values: list[float]) -> list[float]:
        if len(values) > 2:  # a step's, not an evaluation's
            steps.append(len(steps) + 1)
        if mine() and len(steps) >= FROM and fault in ("sleep", "spin"):
            {"sleep": sleep, "spin": spin}[fault]()
        return summed(values)

    def slow_forward(*arguments):
        began = time.perf_counter()
        loss = forward(*arguments)
        if mine() and fault == "slow":
            time.sleep(2 * (time.perf_counter() - began) + 0.02)
        return loss

    loop.sum_over_workers, loop.token_loss_sum = faulty_sum, slow_forward
    run_worker(Path(plan).read_text(), time.time())


if __name__ == "__main__":
    main()
