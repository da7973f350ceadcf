"""Paired ratios, their spread, and what may be said of them. numpy only.

A ratio is the peer's time over ours, taken in one round where both ran one after the other: what
the machine does meanwhile (frequency, neighbours) hits both. Over 1, ours is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 0.02
"""Within 2 % of 1 nothing is called faster or slower: clocks and page placement do as much."""

KEY = ("op", "shape", "case", "mode", "dtype", "wanted", "peer", "device", "threads")
"""What makes two rows of two runs the same measurement."""


@dataclass(frozen=True)
class Spread:
    p20: float
    p50: float
    p80: float

    def rounded(self) -> dict[str, float]:
        return {"p20": round(self.p20, 4), "p50": round(self.p50, 4), "p80": round(self.p80, 4)}


def spread(values: Sequence[float]) -> Spread:
    """20th, 50th and 80th percentile, linear between the values."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.2, 0.5, 0.8))
    return Spread(float(low), float(middle), float(high))


def paired_ratio(ours_s: Sequence[float], peer_s: Sequence[float]) -> Spread:
    """Spread of peer/ours, round by round. Both have one time per round, in seconds."""
    return spread([peer / ours for ours, peer in zip(ours_s, peer_s, strict=True)])


def verdict(ratio: Spread) -> str:
    """FAST or SLOW where the spread as a whole is on one side of 1, and SAME otherwise."""
    if ratio.p20 > 1 + MARGIN:
        return "FAST"
    return "SLOW" if ratio.p80 < 1 - MARGIN else "SAME"


def changed(now: Spread, base: Spread) -> str:
    """FAST or SLOW where two spreads do not touch, and SAME otherwise."""
    if now.p20 > base.p80:
        return "FAST"
    return "SLOW" if now.p80 < base.p20 else "SAME"


@dataclass(frozen=True)
class Change:
    """A row of this run beside the same row of an earlier one."""

    key: tuple[Any, ...]
    ratio: float
    """Median now over median then; under 1, ours has lost ground to the peer."""
    verdict: str


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def compare(rows: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]]) -> list[Change]:
    """Pair the timed rows of two runs by KEY; a row that either has not is left out."""
    before = {key_of(row): _spread_of(row) for row in base if row.get("p50")}
    found: list[Change] = []
    for row in rows:
        then = before.get(key_of(row))
        if row.get("p50") and then is not None:
            now = _spread_of(row)
            found.append(Change(key_of(row), now.p50 / then.p50, changed(now, then)))
    return found


def _spread_of(row: Mapping[str, Any]) -> Spread:
    middle = float(row["p50"])
    return Spread(float(row.get("p20", middle)), middle, float(row.get("p80", middle)))
