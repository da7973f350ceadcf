"""What `trimpot plan` says of rows: who shares them, and how full they are where that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from rich.console import Console

from trimpot.cluster.prepare import compiled_fill, draft_plan, prepare_run
from trimpot.cluster.show import plan_table, plan_values
from trimpot.runner.data.compile import load_splits
from trimpot.runner.run_yaml import load_config
from trimpot.runner.types import Fleet

FLEET = Fleet(memory_bytes=2**30)


def planned(*overrides: str) -> tuple[list[str], dict]:
    """(lines of the table, `fill` of the JSON)"""
    plan = draft_plan(load_config(Path("run.yaml"), list(overrides)), FLEET)
    fill = compiled_fill(plan)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_table(plan, FLEET, fill))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    return lines, plan_values(plan, FLEET, fill)["fill"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy.toy_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_how_full_rows_are_is_told_once_the_data_is_read(place: Path) -> None:
    lines, fill = planned("data.packing=true")
    assert "packing rows of 96 tokens; how full is known once train has read the data" in lines
    assert fill is None
    prepare_run(load_config(Path("run.yaml"), ["data.packing=true"]), FLEET, fresh=False)
    lines, fill = planned("data.packing=true", "optim.learning_rate=0.5")
    train, _ = load_splits(place / "run/data") or pytest.fail("no data")
    samples, rows = len(train.documents) - 1, len(train)
    share = train.tokens.size / (96 * rows)
    assert fill["documents"] == samples and fill["rows"] == rows < samples
    assert fill["row_share"] == share
    least = "the fewest there can be"
    if fill["least_rows"] < rows:
        least = f"at least {fill['least_rows']} are needed"
    percent = int(1000 * share) / 10
    text = f"packing {samples} samples in {rows} rows of 96 tokens, {percent} % full ({least})"
    assert text in lines
    assert any(line.startswith("computed ") for line in lines)


@pytest.mark.parametrize("change", ["seed=1", "data.max_length=95", "data.packing=false"])
def test_other_data_is_not_told_of(place: Path, change: str) -> None:
    prepare_run(load_config(Path("run.yaml"), ["data.packing=true"]), FLEET, fresh=False)
    assert planned("data.packing=true")[1] is not None
    assert planned("data.packing=true", change)[1] is None


def test_who_shares_a_row(place: Path) -> None:
    lines, _ = planned("fleet.workers=4", "fleet.sequence_parallel_size=2")
    assert any(line.startswith("workers 4 (ZeRO stage ") and "2 to a row" in line for line in lines)
    assert "batch 4 = 2 groups of 2 workers × 2 samples × 1 accumulation steps" in lines
    lines, _ = planned("fleet.workers=2", "fleet.sequence_parallel_size=2")
    assert "batch 4 = 1 group of 2 workers × 4 samples × 1 accumulation steps" in lines
