"""What `trimpot bench kernels` shows: a table, a CSV, plots, one HTML page that stands alone."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from trimpot.cluster.kernel_plots import draw_all
from trimpot.kernels.bench.stats import Change
from trimpot.runner.errors import StorageError

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
    with _writing(path) as stand_in, stand_in.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows([row.get(name) for name in CSV_COLUMNS] for row in rows)


def write_plots(folder: Path, plots: Mapping[str, bytes]) -> None:
    for name, png in plots.items():
        with _writing(folder / f"{name}.png") as stand_in:
            stand_in.write_bytes(png)


def write_page(
    path: Path, result: Mapping[str, Any], changes: Sequence[Change], plots: Mapping[str, bytes]
) -> None:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("kernel_report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(_content(result, changes, plots))
    with _writing(path) as stand_in:
        stand_in.write_text(page, encoding="utf-8")


def _content(
    result: Mapping[str, Any], changes: Sequence[Change], plots: Mapping[str, bytes]
) -> dict[str, Any]:
    where = result["environment"]
    facts = where | {f"peak {name}": peak for name, peak in result["roofline"].items()}
    device = where.get("gpu") or where["cpu"]
    return {
        "subtitle": f"{device} · torch {where['torch']} · threads: {where['threads']}",
        "notes": result["notes"],
        "images": [(name, base64.b64encode(png).decode()) for name, png in plots.items()],
        "columns": [*COLUMNS, "verdict", ""],
        "rows": [
            {"cells": cells(row), "verdict": row["verdict"], "why": row.get("why") or ""}
            for row in result["rows"]
        ],
        "changes": [
            {"name": _name(change), "ratio": f"{change.ratio:.3f}", "verdict": change.verdict}
            for change in changes
        ],
        "environment": [
            (key.replace("_", " "), ", ".join(value) if isinstance(value, list) else value)
            for key, value in facts.items()
        ],
    }


def all_plots(result: Mapping[str, Any]) -> dict[str, bytes]:
    return draw_all(result)


class _writing:
    """A file beside `path` that takes its place at the end. Raises StorageError."""

    def __init__(self, path: Path):
        self.path, self.draft = path, path.with_name(f".{path.name}.draft")

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.draft.touch()
        except OSError as error:
            raise StorageError(f"{self.path} can't be written: {error.strerror}") from None
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.draft.replace(self.path)
        else:
            self.draft.unlink(missing_ok=True)
