"""`trimpot bench saves`: what checkpoints cost a run, paired with the same run without them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.cluster import journal as journals
from trimpot.cluster.bench import SKIPPED_STEPS, ratios, run_config, train


@dataclass(frozen=True)
class Course:
    """One run, from the end of the last skipped step to that of the last step."""

    seconds_per_step: float
    saves: int
    stall_share: float
    """Of the time, by the run's own clock: training stood still for saves."""
    save_s: float
    """Median seconds from a step's end until its save was durable; 0 without saves."""


def bench_saves(
    model: Path, data: Path, workers: int, steps: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run with `checkpoint.every_steps: auto` and without saves but the last, in turn → ratios."""
    saving: list[Course] = []
    without: list[Course] = []
    with tempfile.TemporaryDirectory(prefix="trimpot-bench-") as folder:
        for repeat in range(repeats):
            # Whoever goes second finds a warmer machine, or a slower one: they take turns at it.
            kinds = ("auto", steps) if repeat % 2 else (steps, "auto")
            for every in kinds:
                run = Path(folder) / f"run-{repeat}-{every}"
                train(run_config(run, model, data, workers, steps, every))
                (saving if every == "auto" else without).append(read(run))
            say(
                f"{repeat + 1}/{repeats}: a step takes "
                f"{saving[-1].seconds_per_step / without[-1].seconds_per_step:.4f} of its time "
                f"without saves; {saving[-1].saves} saves stalled it for "
                f"{saving[-1].stall_share:.3%}"
            )
    pairs = zip(saving, without, strict=True)
    result = {
        "workers": workers,
        "steps": steps,
        "repeats": repeats,
        "step_ratio": ratios([a.seconds_per_step / b.seconds_per_step for a, b in pairs]),
        "stall_share": ratios([course.stall_share for course in saving], 6),
        "saves": [course.saves for course in saving],
        "save_seconds_over_step": ratios([c.save_s / c.seconds_per_step for c in saving]),
    }
    ratio = result["step_ratio"]
    say(
        f"step time, saves over none: median {ratio['median']:.4f} "
        f"({ratio['low']:.4f} … {ratio['high']:.4f})"
    )
    return result


def read(run: Path) -> Course:
    """What a run's journal says of its steps and saves."""
    events = journals.read(run)
    ended = {event["step"]: event["time"] for event in events if event["kind"] == "step"}
    first, last = ended[SKIPPED_STEPS], ended[len(ended)]
    saves = [
        event
        for event in events
        if event["kind"] == "checkpoint" and SKIPPED_STEPS <= event["step"] < len(ended)
    ]
    stalls_s = sum(save["stall_seconds"] for save in saves)
    return Course(
        seconds_per_step=(last - first) / (len(ended) - SKIPPED_STEPS),
        saves=len(saves),
        stall_share=stalls_s / (last - first),
        save_s=statistics.median([save["seconds"] for save in saves] or [0.0]),
    )
