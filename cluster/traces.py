"""When nodes go and come back: preemption traces, read from CSV or drawn from stated distributions.

A trace file has one line an event, in order of time:

    seconds,node,event,notice_s
    0,spot-7,gone
    5400,spot-0,notice,120
    6100,spot-0,back
    9000.5,spot-3,gone

`notice`: the node will be taken away, at its next line `gone`, or `notice_s` after where no such
line follows. `gone`: it is away, without a word where no notice came before. `back`: it is there
again, or for the first time. Nodes stand from second 0 unless their first line is `back`; more
nodes than have lines are given beside the file. The header may be left out, as may `notice_s`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trimpot.runner.errors import DataError

Kind = Literal["notice", "gone", "back"]
Life = Literal["exponential", "weibull", "bathtub"]
HEADER = "seconds,node,event,notice_s"
WEIBULL_SHAPE = 0.7
"""Below 1: a node that has stood for long is less likely to go in the next hour than a new one."""
POOL = 4096
"""Lives that the first ones, under way at second 0, are drawn from."""
FOREVER = math.inf


@dataclass(frozen=True)
class Happening:
    seconds: float
    node: int
    """Index into the trace's nodes."""
    kind: Kind


@dataclass(frozen=True)
class Trace:
    nodes: tuple[str, ...]
    standing: tuple[bool, ...]
    """Whether each is there at second 0."""
    happenings: tuple[Happening, ...]
    """In order of time."""
    source: str = "trace"


# Files


def read_trace(path: Path, nodes: int = 0) -> Trace:
    """`nodes`: how many there are at least; those without a line stand all the time.

    Raises DataError, with the number of the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is not there; a trace is CSV with the columns {HEADER}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise DataError(f"{path} is no text; a trace is CSV with the columns {HEADER}") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    return parse_trace(text, str(path), nodes)


def parse_trace(text: str, source: str, nodes: int = 0) -> Trace:
    reader = _Reader(source)
    rows = csv.reader(io.StringIO(text), strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{source} line {rows.line_num}: {error}") from None
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        if rows.line_num == 1 and cells[0].lower() == "seconds":
            reader.header(cells)
            continue
        reader.take(rows.line_num, cells)
    return reader.trace(nodes)


class _Reader:
    def __init__(self, source: str):
        self.source = source
        self.last = 0.0
        self.state: dict[str, Kind] = {}
        self.first: dict[str, Kind] = {}
        self.open: dict[str, tuple[int, float | None]] = {}
        """Nodes under notice: the notice's line, and when they go unless a line says otherwise."""
        self.found: list[tuple[float, str, Kind]] = []

    def header(self, cells: list[str]) -> None:
        said = [cell.lower() for cell in cells]
        if said not in (HEADER.split(","), HEADER.split(",")[:3]):
            raise DataError(f"{self.source} line 1: columns {', '.join(cells)}; {HEADER} is wanted")

    def take(self, line: int, cells: list[str]) -> None:
        where = f"{self.source} line {line}"
        if not 3 <= len(cells) <= 4:
            raise DataError(f"{where}: {len(cells)} values; {HEADER} are wanted")
        seconds = self._number(where, "seconds", cells[0])
        node, kind = cells[1], cells[2].lower()
        notice = cells[3] if len(cells) > 3 else ""
        if seconds < self.last:
            raise DataError(
                f"{where}: second {cells[0]} comes after second {self.last:g}; sort the lines by "
                "time"
            )
        if not node:
            raise DataError(f"{where}: no node is named; {HEADER} are wanted")
        if kind not in ("notice", "gone", "back"):
            raise DataError(f"{where}: event is {cells[2]!r}; notice, gone or back is wanted")
        if notice and kind != "notice":
            raise DataError(f"{where}: notice_s stands beside {kind}; it belongs to a notice")
        self.last = seconds
        self._follow(where, line, seconds, node, kind, notice)

    def _number(self, where: str, name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise DataError(f"{where}: {name} is {text!r}; a number, 0 or more, is wanted")
        return value

    def _follow(
        self, where: str, line: int, seconds: float, node: str, kind: Kind, notice: str
    ) -> None:
        before = self.state.get(node)
        if kind == "back" and before == "notice":  # it went in between, as its notice said
            self._go_as_told(node, seconds, where)
            before = "gone"
        if kind == "back" and before == "back":
            raise DataError(f"{where}: {node} is back, and was not gone")
        if kind != "back" and before == "gone":
            raise DataError(f"{where}: {node} is gone; before {kind} a back is wanted")
        if kind == "notice" and before == "notice":
            raise DataError(f"{where}: {node} is under notice since line {self.open[node][0]}")
        if kind == "gone":
            self.open.pop(node, None)
        if kind == "notice":
            goes = seconds + self._number(where, "notice_s", notice) if notice else None
            self.open[node] = (line, goes)
        self.first.setdefault(node, kind)
        self.state[node] = kind
        self.found.append((seconds, node, kind))

    def _go_as_told(self, node: str, before: float, where: str) -> None:
        line, goes = self.open.pop(node)
        if goes is None:
            raise DataError(
                f"{self.source} line {line}: when {node} goes is not said; give notice_s, or a "
                "gone line after it"
            )
        if goes > before:
            raise DataError(
                f"{where}: {node} is back at second {before:g}, and goes at second {goes:g}, as "
                f"line {line} says"
            )
        self.found.append((goes, node, "gone"))

    def trace(self, nodes: int) -> Trace:
        for node in list(self.open):
            self._go_as_told(node, FOREVER, self.source)
        names = list(self.first)
        spare = (f"node-{n}" for n in range(len(names) + nodes))
        while len(names) < nodes:
            if (name := next(spare)) not in self.first:
                names.append(name)
        if not names:
            raise DataError(f"{self.source} has no event; say with --nodes how many nodes stand")
        index = {name: n for n, name in enumerate(names)}
        order = sorted(self.found, key=lambda event: event[0])  # stable: as in the file
        return Trace(
            nodes=tuple(names),
            standing=tuple(self.first.get(name) != "back" for name in names),
            happenings=tuple(Happening(at, index[node], kind) for at, node, kind in order),
            source=self.source,
        )


def to_csv(trace: Trace) -> str:
    """What `parse_trace` reads back. Seconds to the millisecond."""
    lines = [f"{h.seconds:.3f},{trace.nodes[h.node]},{h.kind}," for h in trace.happenings]
    return "\n".join([HEADER, *lines]) + "\n"


# Drawing


@dataclass(frozen=True)
class Spot:
    """How preemptions of a fleet are drawn.

    One comes every `hours_between` on average while all nodes stand: a share `zone_share` of them
    takes a whole zone at once, at times that form a Poisson process (Thorpe et al. 2023, "Bamboo",
    found most preemptions of a zone to come together); the rest are the ends of single nodes'
    lives. A life is drawn anew when a node is back; those of the start are under way at second 0
    (the residual life of a renewal process), so that the rate is the same at all times.

    exponential: memoryless. weibull: of shape 0.7. bathtub: half of the lives end early, half pile
    up at the longest there can be, as Kadupitiya, Jadhao and Sharma 2020 ("Modeling the Temporally
    Constrained Preemptions of Transient Cloud VMs", HPDC) found of machines that live for 24 hours
    at most: F(t) = (1 − exp(−t/τ₁) + exp((t − b)/τ₂)) / 2, here with τ₁ = b/24, τ₂ = b/30, and b
    such that the mean is as asked.
    """

    nodes: int
    hours_between: float
    life: Life = "exponential"
    zones: int = 1
    """Nodes are dealt to zones in turn."""
    zone_share: float = 0.0
    notice_s: float = 120.0
    """AWS gives 120 s, Google and Azure give 30."""
    noticed_share: float = 1.0
    """Of the preemptions, the rest come without a word."""
    back_share: float = 1.0
    """Of the nodes that go; the others stay away."""
    back_s: float = 600.0
    """Mean time that a node is away; exponential."""


def draw_trace(spot: Spot, hours: float, seed: int) -> Trace:
    """The same for the same arguments. No preemption begins after `hours`."""
    draw = np.random.default_rng([seed, spot.nodes])
    end_s, between_s = hours * 3600, spot.hours_between * 3600
    mean_s = spot.nodes * between_s / (1 - spot.zone_share) if spot.zone_share < 1 else FOREVER
    goes_s = _first_lives(draw, spot, mean_s)
    zone_times = list(_zone_times(draw, between_s, spot.zone_share, end_s))
    found: list[Happening] = []
    away_till = np.zeros(spot.nodes)

    def take(node: int, at: float, noticed: bool) -> None:
        """From the first word to the life after it."""
        found.append(Happening(at, node, "notice" if noticed else "gone"))
        gone_at = at + spot.notice_s if noticed else at
        if noticed:
            found.append(Happening(gone_at, node, "gone"))
        away_till[node] = goes_s[node] = FOREVER
        if draw.random() < spot.back_share:
            away_till[node] = back_at = gone_at + draw.exponential(spot.back_s)
            found.append(Happening(back_at, node, "back"))
            goes_s[node] = back_at + _life(draw, spot.life, mean_s)

    while True:
        node = int(goes_s.argmin())
        zone_at = zone_times[0][0] if zone_times else FOREVER
        at = min(float(goes_s[node]), zone_at)
        if at >= end_s:
            break
        noticed = bool(spot.notice_s and draw.random() < spot.noticed_share)
        if zone_at > at:
            take(node, at, noticed)
            continue
        _, which = zone_times.pop(0)
        zone = int(which * spot.zones)
        for node in range(zone, spot.nodes, spot.zones):
            if away_till[node] <= at:  # it is there
                take(node, at, noticed)
    names = tuple(f"node-{n}" for n in range(spot.nodes))
    found.sort(key=lambda happening: happening.seconds)  # stable: gone before back in one instant
    return Trace(names, (True,) * spot.nodes, tuple(found), f"drawn, seed {seed}")


def _zone_times(
    draw: np.random.Generator, between_s: float, share: float, end_s: float
) -> Iterator[tuple[float, float]]:
    """(when, which zone as a fraction of all)."""
    at = 0.0
    while share > 0 and (at := at + draw.exponential(between_s / share)) < end_s:
        yield at, draw.random()


def _life(draw: np.random.Generator, life: Life, mean_s: float) -> float:
    return float(_lives(draw, life, mean_s, 1)[0])


def _lives(draw: np.random.Generator, life: Life, mean_s: float, count: int) -> np.ndarray:
    """Seconds, of that mean → (count,)."""
    if not math.isfinite(mean_s):
        return np.full(count, FOREVER)
    match life:
        case "exponential":
            return draw.exponential(mean_s, count)
        case "weibull":
            scale = mean_s / math.gamma(1 + 1 / WEIBULL_SHAPE)
            return scale * draw.weibull(WEIBULL_SHAPE, count)
        case "bathtub":
            longest = mean_s / (1 / 24 + 1 - 1 / 30) * 2
            early = draw.random(count) < 0.5
            ends = np.where(
                early,
                draw.exponential(longest / 24, count),
                longest - draw.exponential(longest / 30, count),
            )
            return np.clip(ends, 0.0, longest)


def _first_lives(draw: np.random.Generator, spot: Spot, mean_s: float) -> np.ndarray:
    """What is left of the lives under way at second 0: the longer a life, the likelier it is the
    one that is met, at a moment anywhere in it → (nodes,)."""
    if not math.isfinite(mean_s):
        return np.full(spot.nodes, FOREVER)
    pool = _lives(draw, spot.life, mean_s, POOL)
    met = draw.choice(pool, spot.nodes, p=pool / pool.sum())
    return met * draw.random(spot.nodes)
