"""When the next checkpoint is due, where a run decides that itself. Torch-free: `trimpot simulate`
asks the same code."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

FIRST_S = 60.0
"""Until the first save, nobody knows what one costs: it is made this soon."""
WRITING_SHARE = 0.1
"""Of the time, at most, goes by with a write in the background: it takes a core and the disk."""


class Save(Protocol):
    """What a save took."""

    @property
    def seconds(self) -> float:
        """From the step's end until it was durable."""
        ...

    @property
    def stall_s(self) -> float:
        """Of these, how long training stood still."""
        ...


def interval_s(save: Save, failure_s: float) -> float:
    """Seconds between checkpoints: √(2 · C · M), C what a save costs the run, how long training
    stood still for it, and M the mean time between failures that lose work (Young 1974, "A first
    order approximation to the optimum checkpoint interval"). More often, and saving costs more
    than the work that a failure loses; less often, the other way round."""
    best_s = math.sqrt(2 * save.stall_s * failure_s)
    return max(best_s, (save.seconds - save.stall_s) / WRITING_SHARE)


class Pace:
    """Counts the time since the newest save, and says when the next one is due.

    C of the interval is taken from the newest save.
    """

    def __init__(self, hours_between_failures: float, clock: Callable[[], float] = time.monotonic):
        self.failure_s, self.clock = hours_between_failures * 3600, clock
        self.every_s = FIRST_S
        self.since = clock()

    def due_in(self) -> float:
        """Seconds; none or less: now."""
        return self.every_s - (self.clock() - self.since)

    def due(self) -> bool:
        return self.due_in() <= 0

    def begun(self) -> None:
        self.since = self.clock()

    def measured(self, save: Save) -> None:
        self.every_s = interval_s(save, self.failure_s)
