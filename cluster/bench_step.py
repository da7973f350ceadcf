"""`trimpot bench step`: rows and tables of one training step against its peers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

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


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = [*result["rows"], *result["other_variants"]]
    return [rows_table(rows), *(shares_table(part) for part in result["shares"])]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Ratios only: seconds on somebody's processor say little."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    numeric = ("ratio", "p20 … p80", "memory", "gradients' error", "bf16's")
    for name in ("workload", "ours", "against", *numeric):
        table.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(
            row["workload"],
            row["variant"],
            row["peer"],
            f"{row['ratio']:.2f} ×",
            f"{row['ratio_low']:.2f} … {row['ratio_high']:.2f}",
            f"{row['memory_ratio']:.2f} ×",
            f"{row['gradient_error']:.1e}",
            f"{row['bf16_gradient_error']:.1e}",
        )
    return table


def shares_table(part: Mapping[str, Any]) -> Table:
    title = f"{part['workload']}, ours ({part['variant']}): share of a step"
    table = Table(box=None, header_style="dim", pad_edge=False, title=title, title_justify="left")
    table.add_column("part")
    table.add_column("share", justify="right")
    for name, share in part["shares"].items():
        table.add_row(name, f"{share:.1%}")
    return table
