"""Plots and page of `trimpot bench step`: ratios, share per op, and ops under the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimpot.cluster import bench_page
from trimpot.cluster.bench_page import Page, PageTable
from trimpot.cluster.kernel_plots import GRID, INK, OURS, as_png, new_figure, ratio_bars

Part = Mapping[str, Any]
"""One workload of result["shares"]."""
LEAST_SHARE = 0.002
"""Ops under it are no points of the roofline: the profiler's own cost is as large."""

COLUMNS = ("workload", "ours", "against", "ratio", "p20 … p80", "memory", "gradients' error",
           "bf16's")  # fmt: skip
PART_COLUMNS = ("part", "share", "GFLOP", "least MB", "of roofline")


def draw(result: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: PNG}"""
    plots = {"ratios": _ratios([*result["rows"], *result["other_variants"]])}
    for part in result["shares"]:
        plots[f"shares-{part['workload']}"] = _shares(part)
        plots[f"roofline-{part['workload']}"] = _roofline(part)
    return plots


def write_page(path: Path, result: Mapping[str, Any], plots: Mapping[str, bytes]) -> None:
    """Raises StorageError."""
    rows = [row_cells(row) for row in [*result["rows"], *result["other_variants"]]]
    tables = [PageTable("Rows", COLUMNS, rows)]
    for part in result["shares"]:
        heading = f"{part['workload']}, ours ({part['variant']}): where a step's time goes"
        tables.append(PageTable(heading, PART_COLUMNS, part_rows(part)))
    page = Page(
        title="trimpot bench step",
        heading="A training step against its peers",
        about="A ratio is the peer's time over ours, each side a process of its own, asked for a "
        "step in turn; over 1, ours is faster. Each side's gradients were held against "
        "those of transformers + PEFT in float32 first. Shares are of one profiled step.",
        tables=tables,
        images=plots,
    )
    bench_page.write_page(path, page, result["environment"], result["shares"][0]["roofline"])


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """Ratios only: seconds on somebody's processor say little."""
    return [
        row["workload"],
        row["variant"],
        row["peer"],
        f"{row['ratio']:.2f} ×",
        f"{row['ratio_low']:.2f} … {row['ratio_high']:.2f}" if row["repeats"] > 1 else "one step",
        f"{row['memory_ratio']:.2f} ×",
        f"{row['gradient_error']:.1e}",
        f"{row['bf16_gradient_error']:.1e}",
    ]


def part_rows(part: Part) -> list[list[str]]:
    found = []
    for name, share in part["shares"].items():
        cells = [name, f"{share:.1%}", "–", "–", "–"]
        if work := part["work"].get(name):
            reached = (
                f"{_rate(part, name) / _ceiling(part, _intensity(work)):.0%}" if share else "–"
            )
            cells[2:] = [f"{work['flops'] / 1e9:.1f}", f"{work['bytes'] / 1e6:.0f}", reached]
        found.append(cells)
    return found


def _rate(part: Part, op: str) -> float:
    """FLOP/s of an op in the step."""
    return part["work"][op]["flops"] / (part["shares"][op] * part["seconds"])


def _intensity(work: Mapping[str, float]) -> float:
    return work["flops"] / work["bytes"]


def _ceiling(part: Part, intensity: Any) -> Any:
    """FLOP/s that torch's fp32 GEMM and copy permit; a GEMM on another unit may pass it."""
    import numpy as np

    peaks = part["roofline"]
    return np.minimum(peaks["gemm_tflops"]["fp32"] * 1e12, peaks["copy_gbs"] * 1e9 * intensity)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return ratio_bars(
        [
            (
                f"{row['workload']} · {row['variant']}\n{row['peer']}",
                (row["ratio_low"], row["ratio"], row["ratio_high"]),
            )
            for row in rows
        ],
        each=0.4,
    )


def _shares(part: Part) -> bytes:
    names = list(part["shares"])[::-1]
    figure, axes = new_figure(8, 1.0 + 0.3 * len(names))
    values = [100 * part["shares"][name] for name in names]
    ours = [n in part["work"] and "torch" not in n for n in names]
    bars = axes.barh(names, values, color=[OURS if own else "#9aa3ae" for own in ours])
    axes.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("% of a step; blue: our kernels")
    axes.set_title(f"{part['workload']}, ours ({part['variant']}): share per op")
    return as_png(figure)


def _roofline(part: Part) -> bytes:
    import numpy as np

    figure, axes = new_figure(8, 5)
    shown = [op for op in part["work"] if part["shares"].get(op, 0) >= LEAST_SHARE]
    x = [_intensity(part["work"][op]) for op in shown]
    y = [_rate(part, op) / 1e12 for op in shown]
    axes.scatter(x, y, color=OURS, s=26, zorder=3)
    for op, at_x, at_y in zip(shown, x, y, strict=True):
        axes.annotate(op, (at_x, at_y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    line = np.geomspace(min([*x, 1]) / 2, max([*x, 100]) * 4, 200)
    axes.plot(line, _ceiling(part, line) / 1e12, color=INK, linewidth=1, label="torch, fp32")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color=GRID, linewidth=0.75)
    axes.set_xlabel("FLOP per byte that has to be moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{part['workload']}: ops of a step under torch's GEMM and copy rates")
    axes.legend(frameon=False)
    return as_png(figure)
