"""Which steps are bad, and what follows: decided on numbers that all workers share.

A step is bad whose loss or gradient norm is NaN or infinite, or a spike: far over the last steps'
median, measured in their own spread (`limit`). It updates nothing. After some bad steps in a row
the run goes back to a checkpoint from before them, and on with the samples after them, as Chowdhery
et al. 2022 ("PaLM", §5.1) did by hand: what led into a divergence is left out with it. Steps keep
their samples whatever becomes of them, so a resumed run decides the same again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trimpot.runner.config import HealthSection

Action = Literal["none", "skip", "rewind", "stop"]
LEAST = 32
"""Steps that must have been seen before one can be a spike."""
LOSS_FLOOR, NORM_FLOOR = 0.07, 0.23
"""Least spread of the logarithms. At threshold 10 no loss below 2.0 times the median is a spike,
and no gradient norm below 10 times: however smooth a curve is, that much is ordinary."""
TINY = 1e-12


def limit(values: Iterable[float], threshold: float, floor: float) -> float:
    """exp(m + threshold · s): the highest value that is no spike.

    m: median of the values' logarithms. s: the largest of `floor`, their median absolute deviation,
    and how far their upper tenth begins over m, the latter two scaled to be the standard deviation
    of a normal distribution. A tenth of the steps may be of another, harder kind of sample.
    """
    logs = sorted(math.log(max(value, TINY)) for value in values)
    middle = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    upper = (logs[math.ceil(0.9 * len(logs)) - 1] - middle) / 1.2816
    return math.exp(min(700.0, middle + threshold * max(deviation, upper, floor)))


@dataclass(frozen=True)
class Bad:
    step: int
    loss: float
    grad_norm: float
    why: str
    samples: tuple[int, ...]


class Health:
    """Every worker has one; all are told the same. `state()` goes into each checkpoint."""

    def __init__(
        self,
        section: HealthSection,
        every_steps: int | Literal["auto"],
        state: dict[str, Any] | None = None,
    ):
        """`every_steps`: of the checkpoints. `state`: of the checkpoint that a start goes on from,
        None of a new run or one that was saved before there was any."""
        self.section = section
        self.every_steps: int | Literal["auto"] = every_steps
        saved = state or {}
        self.losses = deque[float](saved.get("losses", ()), section.window)
        self.norms = deque[float](saved.get("norms", ()), section.window)
        self.streak: list[dict[str, Any]] = list(saved.get("streak", ()))
        """The bad steps in a row that end with the last one: {step, why, samples}."""
        self.rewinds: int = saved.get("rewinds", 0)
        self.good: int = saved.get("good", 0)
        """Good steps since the last rewind."""
        self.undone: list[list[int]] = [list(pair) for pair in saved.get("undone", ())]
        """[first, last] of the steps that rewinds have taken out of the weights again."""
        self.bad: Bad | None = None
        """The last step, if it was bad."""

    def state(self) -> dict[str, Any]:
        """As JSON has it, and gives it back to the last bit."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "streak": list(self.streak),
            "rewinds": self.rewinds,
            "good": self.good,
            "undone": list(self.undone),
        }

    def copy(self) -> Health:
        """Of now, for who asks later."""
        return Health(self.section, self.every_steps, self.state())

    def judge(self, step: int, loss: float, norm: float) -> str:
        """Why a step is bad; "" of a good one. `norm`: of its gradient, before clipping."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} of step {step} is {value}"
        threshold = self.section.spike_threshold
        if threshold is None or len(self.losses) < LEAST:
            return ""
        for name, value, past, floor in (
            ("loss", loss, self.losses, LOSS_FLOOR),
            ("gradient norm", norm, self.norms, NORM_FLOOR),
        ):
            if value > (most := limit(past, threshold, floor)):
                return (
                    f"the {name} of step {step} is {value:.4g}, a spike: over {most:.4g}, where "
                    f"the last {len(past)} steps had a median of {statistics.median(past):.4g}"
                )
        return ""

    def record(self, step: int, loss: float, norm: float, why: str, samples: Iterable[int]) -> None:
        """A step is over. `why`: what `judge` said of it, on any worker."""
        # Spikes count, too: if they go on, they are what this run is like.
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)
        if not why:
            self.bad, self.streak = None, []
            self.good += 1
            if self.good >= self.section.window:
                self.rewinds = 0
            return
        self.bad = Bad(step, loss, norm, why, tuple(samples))
        self.streak.append({"step": step, "why": why, "samples": list(self.bad.samples)})

    def action(self, final: bool) -> Action:
        """What the last step asks for. `final`: it was the run's last."""
        if self.bad is None:
            return "none"
        if self.section.on_bad_step == "stop":
            return "stop"
        # Nothing comes after the last step that could show whether the weights are still good.
        lost = final and not math.isfinite(self.bad.loss)
        if len(self.streak) < self.section.rewind_after and not lost:
            return "skip"
        return "rewind" if self.rewinds < self.section.max_rewinds else "stop"

    def may_return_to(self, step: int) -> bool:
        """Whether a rewind may go to a checkpoint of this step: not of the bad steps in a row, nor
        of what was undone before. Where checkpoints come every so many steps, only to those: where
        a run was interrupted decides nothing.
        """
        if self.streak and step >= self.streak[0]["step"]:
            return False
        if any(first <= step <= last for first, last in self.undone):
            return False
        return self.every_steps == "auto" or step % self.every_steps == 0

    def rewound(self, to: int, step: int) -> None:
        """After `step`, the weights are those of step `to` again. What is usual is learned anew: it
        may have been what was wrong."""
        self.undone.append([to + 1, step])
        self.streak = []
        self.rewinds += 1
        self.good = 0
        self.losses.clear()
        self.norms.clear()

    def complaint(self, no_way_back: bool) -> str:
        """The error that ends the run, of the first of the bad steps in a row."""
        first, count = self.streak[0], len(self.streak)
        shown = f"{sorted(first['samples'])[:8]}".removesuffix("]")
        more = " …]" if len(first["samples"]) > 8 else "]"
        said = [f"{first['why']}; samples {shown}{more}"]
        if self.section.on_bad_step == "skip":
            row = f"{count} bad steps in a row" if count > 1 else "the last step"
            past = (
                "no checkpoint from before to go back to"
                if no_way_back
                else f"the run went back {self.rewinds} times (health.max_rewinds)"
            )
            said.append(f"{row}, and {past}")
        return "; ".join([*said, "lower optim.learning_rate, or look at these samples"])

    def event(self, action: Action, to: int | None) -> dict[str, Any]:
        """Of the last step, for the journal."""
        assert self.bad is not None
        return {**asdict(self.bad), "action": action, "to": to}
