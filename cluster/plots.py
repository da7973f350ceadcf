"""Curves of a run as inline SVG, coloured by the page's own CSS variables.

matplotlib draws in stand-in colours, one for each role, which are then replaced by `var(--…)`:
so one drawing serves the light page, the dark one and paper. Text stays text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_POINTS = 1200
"""Points of one line: more than a page has pixels, and at most 20 kB of SVG."""

# Role → stand-in colour. None of them may be one that matplotlib writes by itself.
_ROLES = {
    "ink": "#0a0b01",
    "muted": "#0a0b02",
    "grid": "#0a0b03",
    "raw": "#0a0b04",
    "smooth": "#0a0b05",
    "held": "#0a0b06",
    "paper": "#0a0b07",
}
_POINTS_PER_PIXEL = 0.75


@dataclass(frozen=True)
class Line:
    x: Sequence[float]
    y: Sequence[float]
    role: str = "smooth"
    width_px: float = 2.0
    markers: bool = False


@dataclass(frozen=True)
class Plot:
    """One drawing. `name` is unique on the page; title and description are read to the blind."""

    name: str
    title: str
    description: str
    lines: Sequence[Line]
    width_px: int
    height_px: int
    marks: Sequence[float] = field(default_factory=list)
    """Vertical dashed lines, where the run was resumed."""
    y_range: tuple[float, float] | None = None


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values in a window around each; at the ends, of the half that is there.

    Centred, so that it has no lag behind the held-out loss beside it.
    """
    import numpy as np

    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(array))
    low, high = np.maximum(0, at - window // 2), np.minimum(len(array), at + window // 2 + 1)
    n = counts[high] - counts[low]
    means = np.divide(sums[high] - sums[low], n, out=np.full(len(array), np.nan), where=n > 0)
    return means.tolist()


def thin(
    x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """At most `most` points that look the same: the least and the greatest of each stretch."""
    import numpy as np

    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) <= most:
        return xs.tolist(), ys.tolist()
    kept: list[int] = [0]
    # Two points a stretch, and the first and the last.
    for part in np.array_split(np.arange(1, len(xs) - 1), (most - 2) // 2):
        finite = part[np.isfinite(ys[part])]
        if len(finite) == 0:  # a gap stays a gap
            kept.append(int(part[0]))
            continue
        extremes = {int(finite[ys[finite].argmin()]), int(finite[ys[finite].argmax()])}
        kept += sorted(extremes)
    kept.append(len(xs) - 1)
    return xs[kept].tolist(), ys[kept].tolist()


def envelope(
    x: Sequence[float], y: Sequence[float], stretches: int = 400
) -> tuple[list[float], list[float], list[float]]:
    """(x, least, greatest) of each stretch: what many thousand points look like, without moiré."""
    import numpy as np

    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    parts = [p for p in np.array_split(np.arange(len(xs)), stretches) if len(p)]
    some = [p for p in parts if not np.isnan(ys[p]).all()]
    middle = [float(xs[p].mean()) for p in some]
    lows, highs = ([float(f(ys[p])) for p in some] for f in (np.nanmin, np.nanmax))
    return middle, lows, highs


def y_limits(
    raw: Sequence[float], *others: Sequence[float], from_zero: bool = False
) -> tuple[float, float] | None:
    """Limits that hold all of `others` and, of many `raw` values, all but the wildest 0.5 %."""
    import numpy as np

    def finite(values: Sequence[float]) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=float)
        return array[np.isfinite(array)]

    held = [v for v in map(finite, others) if len(v)]
    if len(inner := finite(raw)):
        held.append(np.quantile(inner, [0.005, 0.995]) if len(inner) >= 200 else inner)
    if not held:
        return None
    low, high = min(v.min() for v in held), max(v.max() for v in held)
    low = min(0.0, low) if from_zero else low
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low if from_zero else low - room), float(high + room)


def draw(plot: Plot) -> str:
    """The plot as an `<svg>` element without ids that could meet another plot's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = plot.width_px * _POINTS_PER_PIXEL, plot.height_px * _POINTS_PER_PIXEL
    settings: dict[Any, Any] = {
        "svg.hashsalt": f"trimpot {plot.name}",  # ids are the same in every run, and this plot's
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 12 * _POINTS_PER_PIXEL,
        "path.simplify": False,  # `thin` did, and kept the extremes
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(points[0] / 72, points[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        _axes(axes, plot)
        for line in plot.lines:
            _line(axes, line)
        _limits(axes, plot)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    return _inline(file.getvalue(), plot)


def _axes(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_ROLES["grid"])
    axes.grid(axis="y", color=_ROLES["grid"], linewidth=0.75)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_ROLES["muted"], length=0, pad=5)
    across = max(3, plot.width_px // 110)
    axes.xaxis.set_major_locator(MaxNLocator(across, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(
        MaxNLocator(5 if plot.height_px > 220 else 4, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    for at in plot.marks:
        axes.axvline(at, color=_ROLES["muted"], linewidth=0.75, linestyle=(0, (3, 3)))


def tick(value: float) -> str:
    """'12k', '0.5', '2e-4': short enough for an axis."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


def _line(axes: Any, line: Line) -> None:
    if line.role == "raw" and len(line.x) > MAX_POINTS:
        x, low, high = envelope(line.x, line.y)
        axes.fill_between(x, low, high, color=_ROLES["raw"], linewidth=0)
        return
    x, y = thin(line.x, line.y)
    dots = line.markers or len(x) == 1  # a single point has no line
    axes.plot(
        x,
        y,
        color=_ROLES[line.role],
        linewidth=line.width_px * _POINTS_PER_PIXEL,
        marker="o" if dots and len(x) <= 60 else None,
        markersize=4.5,
        markeredgecolor=_ROLES["paper"],
        markeredgewidth=0.9,
        clip_on=not dots,
        zorder=3 if line.markers else 2,
    )


def _limits(axes: Any, plot: Plot) -> None:
    ends = [x for line in plot.lines for x in (line.x[0], line.x[-1]) if len(line.x)]
    low, high = (min(ends), max(ends)) if ends else (0, 1)
    axes.set_xlim(low, high if high > low else low + 1)
    if plot.y_range:
        axes.set_ylim(*plot.y_range)


def _inline(svg: str, plot: Plot) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Its rule is for `*`, which inline would be the whole page; the page has it for `svg *`.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", svg)
    svg = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group(0)):.2f}".rstrip("0").rstrip("."), svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # the page's own
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    for role, colour in _ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"\n\s*", "\n", svg).strip()
    title, description = html.escape(plot.title), html.escape(plot.description)
    ids = f"{plot.name}-title {plot.name}-text"
    head = (
        f'<svg role="img" aria-labelledby="{ids}" viewBox="0 0 '
        f"{plot.width_px * _POINTS_PER_PIXEL:g} {plot.height_px * _POINTS_PER_PIXEL:g}"
        f'"><title id="{plot.name}-title">{title}</title>'
        f'<desc id="{plot.name}-text">{description}</desc>'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: head, svg, count=1)
