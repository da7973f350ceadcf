"""`trimpot bench step`: rows and tables of one training step against its peers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimpot.cluster.bench_page import write_plots
from trimpot.cluster.step_report import (
    COLUMNS,
    PART_COLUMNS,
    draw,
    part_rows,
    row_cells,
    write_page,
)
from trimpot.runner.errors import StorageError


def run(
    workloads: Sequence[str],
    variants: Sequence[str] | None,
    peers: Sequence[str] | None,
    tokens: int | None,
    threads: int,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    from trimpot.runner.bench_step import PEERS, bench_step, default_variants

    return bench_step(
        workloads, variants or default_variants(), peers or PEERS, tokens, threads, repeats, say
    )


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}") from None


def write_drawings(result: Mapping[str, Any], plots: Path | None, html: Path | None) -> None:
    drawings = draw(result) if plots or html else {}
    if plots:
        write_plots(plots, drawings)
    if html:
        write_page(html, result, drawings)


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = [*result["rows"], *result["other_variants"]]
    return [rows_table(rows), *(shares_table(part) for part in result["shares"])]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in COLUMNS:
        numeric = name in COLUMNS[3:]
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row_cells(row))
    return table


def shares_table(part: Mapping[str, Any]) -> Table:
    title = f"{part['workload']}, ours ({part['variant']}): share of a step"
    table = Table(box=None, header_style="dim", pad_edge=False, title=title, title_justify="left")
    for name in PART_COLUMNS:
        table.add_column(name, justify="left" if name == "part" else "right")
    for cells in part_rows(part):
        table.add_row(*cells)
    return table
