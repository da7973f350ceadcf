"""Plots of `trimpot bench kernels` as PNG: roofline, ratios with their spread, least bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

OURS, PEER, INK, GRID = "#1d5a9e", "#b8420f", "#1a1e24", "#e2e5e9"
DASHES = ("-", "--", ":")
DPI = 110
MOST_BARS = 60
"""Bars of one drawing; what is beyond stands in the table."""
WHOLE = ("fwd+bwd", "step")


def draw_all(result: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: PNG} of what the timed rows can show; empty without one."""
    timed = [row for row in result["rows"] if row.get("p50")]
    if not timed:
        return {}
    return {
        "ratios": ratios(timed),
        "roofline": roofline(timed, result["roofline"]),
        "bytes": least_bytes(timed, result["roofline"]),
    }


def label(row: Row) -> str:
    text = f"{row['op']} {row['shape']} {row['case']} {row['mode']} {row['dtype']}"
    return f"{text} · {row['backend']} : {row['peer']}"


def ratios(rows: Sequence[Row]) -> bytes:
    shown = list(rows)[:MOST_BARS]
    return ratio_bars([(label(row), (row["p20"], row["p50"], row["p80"])) for row in shown])


def ratio_bars(rows: Sequence[tuple[str, tuple[float, float, float]]], each: float = 0.26) -> bytes:
    """A bar for each (name, percentiles 20, 50, 80 of the peer's time over ours), `each` inches."""
    names, percentiles = zip(*rows[::-1], strict=True)
    low, middle, high = zip(*percentiles, strict=True)
    figure, axes = new_figure(9, 1.2 + each * len(names))
    # A ratio of two medians may lie outside the percentiles of the paired ones.
    below = [max(0.0, m - at) for m, at in zip(middle, low, strict=True)]
    above = [max(0.0, at - m) for m, at in zip(middle, high, strict=True)]
    at = range(len(names))
    axes.barh(at, middle, color=OURS, height=0.62, alpha=0.85)
    axes.errorbar(middle, at, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(1, color=PEER, linewidth=1)
    axes.set_yticks(list(at), names)
    axes.set_xlabel("peer's time / ours (over 1: ours is faster); line: 20th to 80th percentile")
    axes.set_title("Ratio to each peer")
    return as_png(figure)


def roofline(rows: Sequence[Row], peaks: Mapping[str, Any]) -> bytes:
    """FLOP/s over FLOP per least byte, ours and the peers', under the measured ceilings."""
    import numpy as np

    figure, axes = new_figure(8, 5)
    for mine, colour, name in ((True, OURS, "ours"), (False, PEER, "peers")):
        key = "seconds" if mine else "peer_seconds"
        x = [row["flops"] / row["least_bytes"] for row in rows]
        y = [row["flops"] / row[key] / 1e12 for row in rows]
        marker = "o" if mine else "x"
        axes.scatter(x, y, s=22, color=colour, marker=marker, label=name, zorder=3, linewidths=1)
    every = [row["flops"] / row["least_bytes"] for row in rows]
    x = np.geomspace(min(every) / 2, max(max(every), 100) * 2, 200)
    for (dtype, peak), dashes in zip(peaks["gemm_tflops"].items(), DASHES, strict=False):
        ceiling = np.minimum(peak, peaks["copy_gbs"] / 1e3 * x)
        axes.plot(x, ceiling, color=INK, linewidth=1, linestyle=dashes, label=f"{dtype} ceiling")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that has to be moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Roofline: torch's GEMM and copy, measured beside the kernels")
    axes.legend(frameon=False)
    return as_png(figure)


def least_bytes(rows: Sequence[Row], peaks: Mapping[str, Any]) -> bytes:
    """Bytes that have to be moved, beside what a copy moves in ours' and the peer's time."""
    chosen = [row for row in rows if row["mode"] in WHOLE] or list(rows)
    shown = chosen[:MOST_BARS][::-1]
    figure, axes = new_figure(9, 1.2 + 0.42 * len(shown))
    rate = peaks["copy_gbs"] * 1e9
    parts = (
        ("has to be moved", [row["least_bytes"] for row in shown], "#9aa3ae", 0.27),
        ("a copy moves in our time", [row["seconds"] * rate for row in shown], OURS, 0.0),
        ("… in the peer's time", [row["peer_seconds"] * rate for row in shown], PEER, -0.27),
    )
    for name, values, colour, off in parts:
        at = [i + off for i in range(len(shown))]
        axes.barh(at, [v / 2**20 for v in values], height=0.25, color=colour, label=name)
    axes.set_yticks(list(range(len(shown))), [label(row) for row in shown])
    axes.set_xscale("log")
    axes.set_xlabel("MiB")
    axes.set_title("Bytes", loc="left")
    figure.legend(frameon=False, loc="outside upper right", ncols=3, fontsize=8)
    return as_png(figure)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=GRID, linewidth=0.75)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def as_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
