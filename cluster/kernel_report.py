"""What `trimpot bench kernels` shows: a table, a CSV, plots, one HTML page that stands alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from trimpot.cluster import bench_page
from trimpot.cluster.bench_page import Page, PageTable, writing
from trimpot.cluster.kernel_plots import draw_all
from trimpot.kernels.bench.stats import Change

Row = Mapping[str, Any]

COLUMNS = (
    "op", "shape", "case", "mode", "dtype", "backend", "peer", "ratio", "p20 … p80",
    "of roofline", "memory", "error", "peer's error",
)  # fmt: skip
CSV_COLUMNS = (
    "op", "shape", "case", "mode", "dtype", "wanted", "backend", "peer", "device", "threads",
    "tokens", "p20", "p50", "p80", "verdict", "tflops", "least_bytes", "bandwidth_gbs",
    "roofline_percent", "memory_ratio", "error", "peer_error", "within_tolerance", "why",
)  # fmt: skip
STYLES = {"FAST": "green", "SLOW": "red", "WRONG": "bold red", "MISSING": "yellow"}


def cells(row: Row) -> list[str]:
    """One row's columns as text, ratios and no absolute times."""
    timed = bool(row.get("p50"))
    return [
        *(str(row.get(name, "")) for name in ("op", "shape", "case", "mode", "dtype")),
        str(row.get("backend", "")),
        str(row.get("peer", "")),
        f"{row['p50']:.2f} ×" if timed else "–",
        f"{row['p20']:.2f} … {row['p80']:.2f}" if timed else "–",
        f"{row['roofline_percent']:.0f} %" if timed else "–",
        _number(row.get("memory_ratio"), "{:.2f} ×"),
        _number(row.get("error"), "{:.1e}"),
        _number(row.get("peer_error"), "{:.1e}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in (*COLUMNS, ""):
        numeric = name in COLUMNS[7:]
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        style = STYLES.get(row["verdict"], "")
        text = f"[{style}]{row['verdict']}[/]" if style else row["verdict"]
        why = f" {row['why']}" if row.get("why") else ""
        table.add_row(*cells(row), text + why.replace("[", r"\["))
    return table


def dry_table(rows: Sequence[Row]) -> Table:
    """Rungs 4 to 6 of the proof ladder: what was compiled and counted, and the model's bounds."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = list(rows[0]) if rows else []
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("–" if row[name] is None else str(row[name]) for name in names))
    return table


def proof_table(rows: Sequence[Row]) -> Table:
    """Rung 7 of the proof ladder: what is right on this GPU, and how fast that is."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("op", "direction", "variant", "dtype", "p20", "p50", "p80", "GB/s", "of roofline",
                 "x torch", "", "gpu"):  # fmt: skip
        table.add_column(name, overflow="fold")
    for row in rows:
        numbers, verdict = ["–"] * 6, f"[red]WRONG[/] {escape(row['why'])}"
        if row["right"]:
            verdict = "right"
            numbers = [f"{row[name] * 1e6:.1f} us" for name in ("p20_s", "p50_s", "p80_s")]
            numbers += [f"{row['bandwidth'] / 1e9:.0f}", f"{row['roofline']:.0%}"]
            numbers.append(f"{row['ratio']:.2f}")
        what = (row[name] for name in ("op", "direction", "variant", "dtype"))
        table.add_row(*what, *numbers, verdict, row["gpu"])
    return table


def changes_table(changes: Sequence[Change]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("row", "ratio now / then", ""):
        table.add_column(name)
    for change in changes:
        style = STYLES.get(change.verdict, "dim")
        table.add_row(_name(change), f"{change.ratio:.3f}", f"[{style}]{change.verdict}[/]")
    return table


def _name(change: Change) -> str:
    return " ".join(str(part) for part in change.key if part is not None)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with writing(path) as stand_in, stand_in.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows([row.get(name) for name in CSV_COLUMNS] for row in rows)


def write_page(
    path: Path, result: Mapping[str, Any], changes: Sequence[Change], plots: Mapping[str, bytes]
) -> None:
    rows = [[*cells(row), row["verdict"], row.get("why") or ""] for row in result["rows"]]
    tables = [PageTable("Rows", [*COLUMNS, "verdict", ""], rows, last_wraps=True)]
    if changes:
        told = [[_name(change), f"{change.ratio:.3f}", change.verdict] for change in changes]
        tables.append(PageTable("Against the earlier run", ["row", "ratio now / then", ""], told))
    page = Page(
        title="trimpot bench kernels",
        heading="Kernels against their peers",
        about="A ratio is the peer's time over ours, both run one after the other in each round; "
        "over 1, ours is faster. Every row was checked against float64 before it was timed; a "
        "wrong result has no time.",
        tables=tables,
        images=plots,
        notes=result["notes"],
    )
    bench_page.write_page(path, page, result["environment"], result["roofline"])


def all_plots(result: Mapping[str, Any]) -> dict[str, bytes]:
    return draw_all(result)
