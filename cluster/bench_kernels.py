"""`trimpot bench kernels`: what was asked for → rows, files, a verdict as exit code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.cluster import kernel_report as report
from trimpot.cluster.bench_page import write_plots
from trimpot.kernels.bench.stats import Change, compare
from trimpot.runner.errors import ConfigError, StorageError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Files:
    """Where results go besides the terminal."""

    json: str | None = None
    """A path, or "-" for one JSON object as the last line of stdout."""
    csv: Path | None = None
    plots: Path | None = None
    html: Path | None = None


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def run(
    values: Mapping[str, Any], compare_with: Path | None, fail_under: float | None, files: Files,
    say: Say,
) -> tuple[dict[str, Any], list[Change], int]:  # fmt: skip
    """(result, changes, exit code). `values`: fields of kernels.bench.run.Options."""
    from trimpot.kernels.bench.run import Options, bench
    from trimpot.kernels.bench.shapes import OPS

    base = _read_rows(compare_with) if compare_with else None
    peers: dict[str, Any] = {}
    if "peft" in values["peers"] and importlib.util.find_spec("peft") is not None:
        from trimpot.runner.adapters.peft_peer import linear_variant

        peers["peft"] = linear_variant
    options = Options(**{**values, "ops": values["ops"] or OPS, "foreign": peers})
    result = bench(options, say)
    changes = compare(result["rows"], base) if base is not None else []
    write(result, changes, files)
    return result, changes, exit_code(result["rows"], changes, base is not None, fail_under)


def write(result: Mapping[str, Any], changes: Sequence[Change], files: Files) -> None:
    if files.json and files.json != "-":
        write_json(Path(files.json), result)
    if files.csv:
        report.write_csv(files.csv, result["rows"])
    plots = report.all_plots(result) if files.plots or files.html else {}
    if files.plots:
        write_plots(files.plots, plots)
    if files.html:
        report.write_page(files.html, result, changes, plots)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}") from None


def exit_code(
    rows: Sequence[Mapping[str, Any]],
    changes: Sequence[Change],
    compared: bool,
    fail_under: float | None,
) -> int:
    """1 of a wrong result, of nothing that could be timed, and below `fail_under`.

    `fail_under` is held against the ratio now over the ratio then where there is an earlier run,
    and against the ratio to the peer where there is none.
    """
    if any(row["verdict"] == "WRONG" for row in rows):
        return 1
    if any(row["verdict"] == "MISSING" for row in rows) and not any(row.get("p50") for row in rows):
        return 1
    if fail_under is None:
        return 0
    ratios = [c.ratio for c in changes] if compared else [r["p50"] for r in rows if r.get("p50")]
    return int(any(ratio < fail_under for ratio in ratios))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run's JSON. Raises ConfigError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is no result of trimpot bench kernels --json {path}") from None
    return list(rows)


DRY_KEYS = (
    "op", "direction", "variant", "dtype", "target", "registers", "spills", "shared_bytes", "mma",
    "traffic_ratio", "bound_low", "bound_high",
)  # fmt: skip


def dry(ops: Sequence[str], files: Files, say: Say) -> tuple[dict[str, Any], int]:
    """Rungs 4 to 6 of the proof ladder, no GPU needed → ({"rows": [...]} with DRY_KEYS each, exit
    code): 1 where a limit is broken, which `say` tells."""
    from trimpot.kernels.proof import ladder

    found = ladder.dry_rows(ops, say)
    complaints = [text for row in found for text in row["complaints"]]
    for text in complaints:
        say(text)
    result = {"rows": [{key: row[key] for key in DRY_KEYS} for row in found]}
    if files.json and files.json != "-":
        write_json(Path(files.json), result)
    return result, int(bool(complaints))


def prove(ops: Sequence[str], files: Files, say: Say) -> tuple[dict[str, Any], int]:
    """Rung 7: compiled kernels on a GPU, right first, then timed → ({"rows": [...]} as gpu.py
    makes them, exit code): 1 where one is wrong. Raises BackendError without a GPU."""
    from trimpot.kernels.proof import ladder

    rows = ladder.prove(ops, say)
    result = {"rows": rows}
    if files.json and files.json != "-":
        write_json(Path(files.json), result)
    return result, int(not all(row["right"] for row in rows))
