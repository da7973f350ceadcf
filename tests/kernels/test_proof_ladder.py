"""Rungs 3 to 6 of the proof ladder, over every case of every op that has Triton kernels.

Each case is interpreted in all its dtypes and compiled for all targets: for sm_90 in all dtypes,
for the three others in bf16, and in fp32 by `make chaos`; fp16's code differs from bf16's in the
conversions only. That happens once a session, for the ops that are selected (`-k swiglu`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from trimpot.cluster import cli
from trimpot.cluster.bench_kernels import DRY_KEYS
from trimpot.kernels.ops.implementation import implementation
from trimpot.kernels.proof import compile as rung4
from trimpot.kernels.proof import ladder, limits, model
from trimpot.kernels.proof.cases import named

Row = dict[str, Any]

FULL = "sm_90"
DTYPES = {t: ladder.EVERY if t == FULL else ("bf16",) for t in limits.TARGETS}
LATER = {t: ("fp32",) for t in limits.TARGETS if t != FULL}
CODE = ("compile", "spills", "registers", "shared", "wide", "mma")
"""What may be wrong with compiled rows."""

every_op = pytest.mark.parametrize("op", named())
every_target = pytest.mark.parametrize("target", limits.TARGETS)


@pytest.fixture(scope="session")
def proven(request: pytest.FixtureRequest) -> tuple[list[Row], list[Row]]:
    """(rows of rungs 3 and 5, rows of rung 4) of the selected ops."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = {call.params.get("op") for i in mine if (call := getattr(i, "callspec", None))}
    return ladder.rows_of([op for op in named() if op in chosen], DTYPES)


@pytest.fixture
def counted(proven: tuple[list[Row], list[Row]], op: str) -> list[Row]:
    return [row for row in proven[0] if row["op"] == op]


@pytest.fixture
def compiled(proven: tuple[list[Row], list[Row]], op: str) -> list[Row]:
    return [row for row in proven[1] if row["op"] == op]


def complaints(rows: Sequence[Row], *kinds: str) -> list[str]:
    """What is wrong with these rows, of these kinds and not excused."""
    judge = limits.of_compiled if "target" in rows[0] else limits.of_counted
    found = [(limits.named(row), limits.unexcused(row, judge(row))) for row in rows]
    return [f"{row}: {said[kind]}" for row, said in found for kind in kinds if kind in said]


@every_op
def test_rung_3_is_right(op: str, counted: list[Row]) -> None:
    assert complaints(counted, "wrong", "fault") == []


@every_op
def test_rung_3_leaves_nothing_out(op: str, counted: list[Row]) -> None:
    definition = implementation(op, "torch")
    directions = {d for d in ("forward", "backward") if hasattr(definition, d)}
    for direction in directions:
        dtypes = {row["dtype"] for row in counted if row["direction"] == direction}
        assert dtypes == set(ladder.EVERY)
    assert {row["direction"] for row in counted} == directions
    assert len({limits.key(row) for row in counted}) == len(counted)  # no name is used twice


@every_op
def test_rung_5_traffic(op: str, counted: list[Row]) -> None:
    assert complaints(counted, "traffic", "again") == []


@every_target
@every_op
def test_rung_4_code(op: str, target: str, compiled: list[Row], counted: list[Row]) -> None:
    rows = [row for row in compiled if row["target"] == target]
    assert complaints(rows, *CODE) == []
    of_target = [row for row in counted if row["dtype"] in DTYPES[target]]
    assert list(map(limits.key, rows)) == list(map(limits.key, of_target))


@pytest.mark.chaos
def test_rungs_4_and_6_in_fp32() -> None:
    counted, compiled = ladder.rows_of(named(), LATER)
    assert complaints(compiled, *CODE) == []
    assert {(row["target"], row["dtype"]) for row in compiled} == {(t, "fp32") for t in LATER}
    inside_the_roofline(counted, compiled)


@every_op
def test_rung_6_window(op: str, counted: list[Row], compiled: list[Row]) -> None:
    inside_the_roofline(counted, compiled)


def inside_the_roofline(counted: list[Row], compiled: list[Row]) -> None:
    by_case = {limits.key(row): row for row in counted}
    for row in compiled:
        both = row, by_case[limits.key(row)]
        assert not any("failed" in one for one in both), limits.named(row)
        low, high = ladder.modelled(*both)
        assert 0 < low <= high <= 1, limits.named(row)


@every_op
def test_exceptions_are_needed(op: str, counted: list[Row], compiled: list[Row]) -> None:
    """Each says a number, and excuses what is really there."""
    judged = [(row, limits.of_counted(row)) for row in counted]
    judged += [(row, limits.of_compiled(row)) for row in compiled]
    used = {limits.excuse(row, kind) for row, complaints in judged for kind in complaints}
    for exception, why in limits.EXCEPTIONS.items():
        if exception[0].split()[0] == op:
            assert exception in used and any(map(str.isdigit, why)), exception


@pytest.mark.parametrize("op", ["swiglu"])
def test_dry_tells_of_the_same_rows(
    op: str,
    counted: list[Row],
    compiled: list[Row],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        ladder, "rows_of", lambda *given: asked.append(given) or (counted, compiled)
    )
    command = ["trimpot", "bench", "kernels", "--dry", "--op", op, "--json", "-"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    *table, line = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["rows"]
    assert not end.value.code and len(table) == len(rows) + 1 == len(compiled) + 1
    ((names, dtypes, _),) = asked
    assert names == [op] and dtypes == dict.fromkeys(limits.TARGETS, ladder.EVERY)
    assert all(tuple(row) == DRY_KEYS for row in rows)
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    first = next(r for r in rows if (r["direction"], r["dtype"], r["target"])
                 == ("forward", "bf16", "sm_90"))  # fmt: skip
    assert (first["spills"], first["mma"], first["traffic_ratio"]) == (0, None, 1.0)
    assert first["registers"] > 0 and 0.5 < first["bound_low"] < first["bound_high"] <= 1


def test_every_table_knows_the_targets() -> None:
    assert set(limits.TARGETS) == set(rung4.TARGETS) == set(model.GPUS)
    assert set(limits.SHARED_BYTES) == set(limits.TARGETS)
