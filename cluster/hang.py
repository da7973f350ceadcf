"""When a run's workers stand still, who is to blame, and who is slow: rules over their pulses.

Pure: what the pulses say and the watcher's own clock in, a finding out. A worker's clock is never
compared with another's: what counts is when the watcher saw something change.

A run stands still when no worker enters a section or begins a collective for as long as the
section of those that don't wait in a collective allows:

- in a step: 5 s, 3 median steps, or half as long again as the longest of the last 256 steps,
  whichever is most;
- a micro-batch of an evaluation: 60 s or 10 median steps; a save: 10 min or 10 times the longest
  one so far; else (start, model, load, engine, a compiler, an answer, until three steps are
  timed): 10 min;
- where no pulse arrives at all: 60 s at least, since the storage may be what stands still.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trimpot.runner.pulse import WINDOW, Beat, period_s

FLOOR_S = 5.0
STEPS = 3.0
OVER_LONGEST = 1.5
TIMED = 3
"""Steps after which their median is believed."""
EVALUATE_S, EVALUATE_STEPS = 60.0, 10.0
LONG_S, SAVES = 600.0, 10.0
NO_PULSE_S = 60.0
SILENT_BEATS = 4.0
"""A pulse that is so many periods late is silent: its process does not run."""

SLOW = 1.5
"""A straggler's own time over the median of the others'."""
CALM = 1.25
"""Below this it is none any more."""
WINDOWS = 5
"""Windows of WINDOW steps in a row that say so: with log-normal noise of sigma 0.5 on each step
of two workers, one window errs in 50, five in a row in 3e8."""
MATTERS = 0.05
"""Of a step: less than this does not hold the others up."""


@dataclass
class Sight:
    """What the watcher has seen of one worker, by its own clock."""

    beat: Beat
    beat_at: float
    """When a new beat last came."""
    moved_at: float
    """When one last came that told of progress."""


class Sights:
    """Of all workers of one start."""

    def __init__(self, world: int):
        self.world = world
        self.of: dict[int, Sight] = {}

    def observe(self, beats: Mapping[int, Beat], now: float) -> None:
        for rank, beat in beats.items():
            sight = self.of.get(rank)
            if sight is None:
                self.of[rank] = Sight(beat, now, now)
                continue
            if beat.count != sight.beat.count:
                sight.beat_at = now
            if _progress(beat) != _progress(sight.beat):
                sight.moved_at = now
            sight.beat = beat

    def forgive(self, seconds: float) -> None:
        """The watcher itself did not run, or could not read, for so long."""
        for sight in self.of.values():
            sight.beat_at += seconds
            sight.moved_at += seconds


def _progress(beat: Beat) -> tuple[int, int, int, bool]:
    return beat.step, beat.marks, beat.collectives, beat.over


@dataclass(frozen=True)
class Hang:
    rank: int | None
    """The lowest of `ranks`; None where no worker is behind the others."""
    ranks: tuple[int, ...]
    """Whom the others wait for."""
    silent: tuple[int, ...]
    """Whose pulse stopped: the process is stopped or gone, or holds Python's lock."""
    seconds: float
    """For so long nobody has moved."""
    text: str


def find_hang(sights: Sights, now: float) -> Hang | None:
    """What the workers stand still at, if they do."""
    there = {rank: s for rank, s in sights.of.items() if not s.beat.over}
    if not there:
        return None
    missing = tuple(rank for rank in range(sights.world) if rank not in sights.of)
    late_s = SILENT_BEATS * period_s(sights.world)
    silent = tuple(rank for rank, s in there.items() if now - s.beat_at > late_s)
    still_s = now - max(s.moved_at for s in there.values())
    deciding = [r for r, s in there.items() if r in silent or not s.beat.waiting]
    allowed_s = max(_limit_of(there, rank, silent) for rank in deciding or there)
    if missing:
        allowed_s = max(allowed_s, LONG_S)
    if len(silent) == len(there):
        allowed_s = max(allowed_s, NO_PULSE_S)
    if still_s <= allowed_s:
        return None
    ranks = missing or _behind(there, silent)
    rank = min(ranks, default=None)
    return Hang(rank, ranks, silent, still_s, _told(there, ranks, missing, silent, still_s))


def _limit_of(there: Mapping[int, Sight], rank: int, silent: Sequence[int]) -> float:
    """How long a worker may be where it is. The last pulse of a silent one is up to a period old,
    and may be of the start; whoever has timed steps has met it in each of them, so that it is past
    that, too."""
    beat = there[rank].beat
    if rank in silent and beat.steps < TIMED:
        met = [s.beat for r, s in there.items() if r not in silent and s.beat.steps >= TIMED]
        if met:
            return max(map(limit_s, met))
    return limit_s(beat)


def limit_s(beat: Beat) -> float:
    """How long a worker may be where it is."""
    outer = beat.section.partition(":")[0]
    if outer == "save":
        return max(LONG_S, SAVES * beat.save_s)
    if outer in ("compile", "generate") or beat.steps < TIMED:
        return LONG_S
    if outer == "evaluate":
        return max(EVALUATE_S, EVALUATE_STEPS * beat.step_s)
    return max(FLOOR_S, STEPS * beat.step_s, OVER_LONGEST * beat.longest_s)


def _behind(there: Mapping[int, Sight], silent: Sequence[int]) -> tuple[int, ...]:
    """Whose process does not run; else who has come least far; else nobody, and it is the network
    between them."""
    if silent and (len(silent) < len(there) or len(there) == 1):
        return tuple(silent)

    def far(sight: Sight) -> tuple[int, int, bool]:
        return sight.beat.step, sight.beat.collectives, sight.beat.waiting

    least = min(far(s) for s in there.values())
    behind = tuple(rank for rank, s in there.items() if far(s) == least)
    return behind if len(behind) < len(there) or len(there) == 1 else ()


def _told(
    there: Mapping[int, Sight],
    ranks: Sequence[int],
    missing: Sequence[int],
    silent: Sequence[int],
    still_s: float,
) -> str:
    """One line: who, where, in what, since when, and what the others wait for."""
    if missing:
        return f"{_named(missing)} gave no sign of life in {still_s:.0f} s; the others wait"
    if not ranks:
        beat = next(iter(there.values())).beat
        why = "no pulse arrives" if len(silent) == len(there) else "none is behind the others"
        return (
            f"all {len(there)} workers stood still for {still_s:.0f} s in {beat.section} of step "
            f"{beat.step}, {_last(beat)}; {why}: look at the network and the storage"
        )
    beat = there[ranks[0]].beat
    state = ", its process does not run" if ranks[0] in silent else ""
    text = (
        f"{_named(ranks)} on {beat.host} stood still for {still_s:.0f} s in {beat.section} of step "
        f"{beat.step}{state}, {_last(beat)}"
    )
    others = {r: s.beat for r, s in there.items() if r not in ranks and s.beat.waiting}
    if others:
        met = next(iter(others.values()))
        waits = "waits" if len(others) == 1 else "wait"
        text += f"; {_named(tuple(others))} {waits} in {met.collective}, number {met.collectives}"
    return text


def _last(beat: Beat) -> str:
    """The last collective of a worker, as it counts them."""
    if not beat.collectives:
        return "before any collective"
    return f"{'in' if beat.waiting else 'after'} {beat.collective}, number {beat.collectives}"


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"worker {ranks[0]}"
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"workers {', '.join(map(str, ranks[:4]))}{more}"


@dataclass(frozen=True)
class Slow:
    rank: int
    node: str
    ratio: float
    text: str


@dataclass
class Stragglers:
    """Who holds the others up in step after step, and not because it has more to do: both its own
    time in a step and that of a token are over SLOW times the median of the other workers', as
    medians of WINDOW steps, in WINDOWS such windows in a row. Told again once it got worse by as
    much, or was well in between."""

    seen: int = 0
    """The step that the last window ended with."""
    slow: dict[int, int] = field(default_factory=dict[int, int])
    calm: dict[int, int] = field(default_factory=dict[int, int])
    told: dict[int, float] = field(default_factory=dict[int, float])

    def observe(self, beats: Mapping[int, Beat], world: int) -> list[Slow]:
        """To be asked at each look → those to tell of."""
        if world < 2 or len(beats) < world or any(not b.own_s or b.over for b in beats.values()):
            return []
        step = min(beat.step for beat in beats.values())
        if step < self.seen + WINDOW:
            return []
        self.seen = step
        return [found for rank in sorted(beats) if (found := self._judge(rank, beats))]

    def _judge(self, rank: int, beats: Mapping[int, Beat]) -> Slow | None:
        beat, others = beats[rank], [b for r, b in beats.items() if r != rank]
        own_s = statistics.median(b.own_s for b in others)
        token_s = statistics.median(b.token_s for b in others)
        ratio = min(beat.own_s / own_s, beat.token_s / token_s) if own_s and token_s else 1.0
        matters = beat.own_s - own_s > MATTERS * beat.step_s
        self.slow[rank] = self.slow.get(rank, 0) + 1 if ratio > SLOW and matters else 0
        self.calm[rank] = self.calm.get(rank, 0) + 1 if ratio < CALM else 0
        if self.calm[rank] >= WINDOWS:
            self.told.pop(rank, None)
        if self.slow[rank] < WINDOWS or ratio < SLOW * self.told.get(rank, 0.0):
            return None
        self.told[rank] = ratio
        text = (
            f"worker {rank} on {beat.host} is {ratio:.1f} times as slow as the others, over "
            f"{WINDOW * WINDOWS} steps up to {beat.step}: each step waits for it"
        )
        return Slow(rank, beat.node, ratio, text)
