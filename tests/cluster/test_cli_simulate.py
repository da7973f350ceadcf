"""`trimpot simulate` as a person calls it, and what it takes from a run's journal and run.yaml."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import toy
import yaml

from trimpot.cluster import cli
from trimpot.cluster.costs import measure
from trimpot.cluster.simulate_plan import Given, make_plan
from trimpot.runner.errors import ConfigError


@pytest.fixture
def call(monkeypatch, capsys):
    """`trimpot simulate …` in this process → (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimpot", "simulate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# --- what is printed


def test_the_table_fits_a_terminal_and_json_says_the_same(call, tmp_path):
    (tmp_path / "trace.csv").write_text("seconds,node,event,notice_s\n55,b,notice,120\n")
    options = ("--trace", tmp_path / "trace.csv", "--max-workers", "2", "--micro-batches", "2")
    options += ("--step-seconds", "10", "--steps", "10", "--price", "3.6", "--nodes", "2")
    options += ("--stall-seconds", "1", "--save-seconds", "4", "--restart-seconds", "30")
    code, table, _ = call(*options)
    assert code == 0
    assert max(map(len, table.splitlines())) <= 80
    assert "trace.csv, 2 nodes; 1 to 2 workers" in table
    (last,) = call(*options, "--json")[1].splitlines()
    said = json.loads(last)
    (outcome,) = said["outcomes"]
    # The run by hand of test_simulate.py, and one save more, a minute after the second start.
    assert outcome["seconds"]["training"] == 170
    assert outcome["elapsed_s"] == 239
    assert outcome["cost_usd"] == pytest.approx((239 + 175) * 3.6 / 3600)
    assert said["cost_usd"]["median"] == outcome["cost_usd"]
    goodput = said["goodput"]["median"]
    assert goodput == outcome["goodput"] == 200 / 303
    assert f"{100 * goodput:.2f} %" in table
    assert f"US$ {outcome['cost_usd']:.2f}" in table
    assert said["sources"]["restart_s"] == "given"
    assert said["sources"]["detect_s"] == "assumed"
    for cause, share in said["share_by_cause"].items():
        assert re.search(rf"^{cause} .*{100 * share:.2f} %", table, re.M), cause


def test_many_traces_show_their_spread(call, tmp_path):
    options = ("--max-workers", "4", "--step-seconds", "5", "--runs", "7", "--between", "0.5")
    options += ("--life", "weibull", "--hours", "6")
    _, table, _ = call(*options, "--write-trace", tmp_path / "first.csv")
    for word in ("median", "lowest", "highest", "7 traces of 4 nodes"):
        assert word in table

    def values(*arguments: str | Path) -> dict:
        return json.loads(call(*arguments, "--json")[1])

    said = values(*options)
    assert said["runs"] == 7
    lowest, middle, highest = (said["goodput"][k] for k in ("lowest", "median", "highest"))
    assert lowest < middle < highest
    assert said["cost_usd"] is None
    # The first of them, again from its file.
    first = ("--max-workers", "4", "--step-seconds", "5", "--hours", "6")
    again = values(*first, "--trace", tmp_path / "first.csv")
    before, now = said["outcomes"][0], again["outcomes"][0]
    assert now["restarts"] == before["restarts"]
    assert now["goodput"] == pytest.approx(before["goodput"], abs=1e-4)
    # Other seeds, other traces; the same seed, the same.
    assert values(*options) == said
    assert values(*options, "--seed", "1")["outcomes"][0] == said["outcomes"][1]


def test_a_run_that_cannot_go_on_is_told(call, tmp_path):
    (tmp_path / "t.csv").write_text("35,a,gone\n35,b,gone\n")
    options = ("--max-workers", "2", "--step-seconds", "10", "--steps", "9", "--hours", "1")
    code, text, _ = call(*options, "--trace", tmp_path / "t.csv")
    assert code == 1
    assert "the run did not get to the end: too few nodes are left" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-workers", "2"], "how long a step takes is not known; give --step-seconds"),
        (["--step-seconds", "2"], "how many workers there may be is not known"),
        (["--max-workers", "2", "--min-workers", "3", "--step-seconds", "2"], "is over"),
        (["--max-workers", "2", "--step-seconds", "inf"], "--step-seconds"),
        (["--max-workers", "2", "--step-seconds", "nan"], "--step-seconds"),
        (["--max-workers", "2", "--step-seconds", "2", "--noticed", "1.5"], "--noticed"),
        (["--max-workers", "2", "--step-seconds", "2", "--life", "gamma"], "--life"),
        (["--max-workers", "2", "--step-seconds", "2", "--trace", "none.csv"], "none.csv is not"),
        (["--max-workers", "2", "--step-seconds", "2", "--trace", "bad.csv"], "bad.csv line 2: "),
        (["--run", "nowhere"], "nowhere/journal.jsonl is not there"),
        (["nowhere.yaml"], "nowhere.yaml is not there"),
        (["--max-workers", "2", "--step-seconds", "2", "--write-trace", "no/x"], "be written"),
        (
            ["--max-workers", "2", "--step-seconds", "2", "--stall-seconds", "9",
             "--save-seconds", "1"],
            "--stall-seconds 9 is over --save-seconds 1",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(call, arguments, says, tmp_path, monkeypatch):
    (tmp_path / "bad.csv").write_text("5,a,gone\n6,a,vanished\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line


# --- what it stands on

START = {"kind": "start", "world_size": 2, "batch_size": 16, "micro_batch_size": 2,
         "total_steps": 300}  # fmt: skip


def phase(name: str, seconds: float) -> dict:
    return {"kind": "phase", "name": name, "seconds": seconds}


def step(number: int, seconds: float) -> dict:
    return {"kind": "step", "step": number, "seconds": seconds}


JOURNAL = [
    phase("driver", 50), phase("ray", 9), phase("workers", 5), phase("imports", 4),
    phase("process group", 1), phase("model", 3), phase("engine", 2), START,
    phase("first look", 70), step(1, 12), phase("first step", 12),
    step(2, 4), step(3, 4),
    {"kind": "checkpoint", "step": 3, "path": "x", "seconds": 3, "stall_seconds": 0.5},
    {"kind": "leave", "reason": "preempted", "text": "", "step": 3},
    # One worker, eight micro-batches in turn instead of four.
    phase("workers", 4), phase("imports", 2), phase("process group", 1), phase("model", 3),
    phase("engine", 1), {**START, "world_size": 1, "resumed_from": 3},
    step(4, 9.5), phase("first step", 10), step(5, 8),
    {"kind": "checkpoint", "step": 5, "path": "x", "seconds": 5, "stall_seconds": 0.7},
]  # fmt: skip


def test_costs_are_read_from_the_journal():
    found = measure(JOURNAL)
    assert found.micro_batches == 8
    assert found.round_s == 1.0
    assert (found.save_s, found.stall_s) == (4, pytest.approx(0.6))
    # Of the start that resumed: 4 + 2 + 1 + 3 + 1, and a first step 2 s longer than others.
    assert found.restart_s == 13
    # With no other, the first: neither the driver's part nor the look at held-out data.
    assert measure(JOURNAL[:13]).restart_s == 5 + 4 + 1 + 3 + 2 + 8
    empty = measure([])
    assert (empty.start, empty.round_s, empty.restart_s) == (None, None, None)


def test_a_restart_is_measured_from_leaving_to_the_next_step():
    """The last save is told at second 100, the next first step of 9.5 s at 131.5."""
    at = {"step 3": 99.0, "checkpoint 3": 100.0, "step 4": 131.5}
    events = [
        {**e, "time": at[name]} if (name := f"{e['kind']} {e.get('step')}") in at else e
        for e in JOURNAL
    ]
    assert measure(events).restart_s == 131.5 - 9.5 - 100
    # Another driver came in between: who knows how long that took.
    later = [{**e, "name": "driver"} if e is JOURNAL[15] else e for e in events]
    assert measure(later).restart_s == 13 - JOURNAL[15]["seconds"]


def test_a_journal_is_all_that_is_needed(tmp_path):
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in JOURNAL))
    plan = make_plan(Given(max_workers=4), None, [], tmp_path)
    assert plan.job.limits.micro_batches == 8
    assert plan.job.step_s == 2  # 8 over 4 workers, a second each
    assert plan.job.total_steps == 300
    assert plan.costs.restart_s == 13
    assert plan.sources == {
        "step_s": "measured", "stall_s": "measured", "save_s": "measured",
        "restart_s": "measured", "detect_s": "assumed",
    }  # fmt: skip
    assert plan.hours == pytest.approx(4 * 600 / 3600 + 1)


def test_a_run_yaml_says_what_is_run(tmp_path):
    path = toy.toy_run(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["optim"] |= {"batch_size": 48, "micro_batch_size": 2, "max_steps": 70}
    values["fleet"] |= {
        "workers": {"min": 3, "max": 8}, "nodes": 4, "price_per_hour": 10, "preemptible": True,
        "max_failures": 5, "grow_after_s": 7, "start_timeout_s": 99,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    plan = make_plan(Given(step_s=3), path, ["optim.max_steps=80"], None)
    limits = plan.job.limits
    assert (limits.min_workers, limits.max_workers, limits.micro_batches) == (3, 8, 24)
    assert (limits.max_failures, limits.preemptible) == (5, True)
    assert (plan.job.grow_after_s, plan.job.start_timeout_s) == (7, 99)
    assert (plan.job.total_steps, plan.job.hours, plan.job.prior_hours) == (80, None, 4)
    assert (plan.job.workers_per_node, plan.nodes, plan.price) == (2, 4, 2.5)
    plan = make_plan(
        Given(step_s=3, min_workers=1, steps=9), path,
        ["checkpoint.hours_between_failures=11", "checkpoint.every_steps=6", "fleet.workers=4"],
        None,
    )  # fmt: skip
    assert (plan.job.limits.min_workers, plan.job.limits.max_workers) == (1, 4)
    assert (plan.job.total_steps, plan.job.prior_hours, plan.job.every_steps) == (9, 11, 6)


def test_micro_batches_are_planned_where_run_yaml_leaves_them(tmp_path):
    path = toy.toy_run(tmp_path)
    plan = make_plan(Given(step_s=3, max_workers=4), path, ["optim.batch_size=32"], None)
    assert 32 % plan.job.limits.micro_batches == 0
    with pytest.raises(ConfigError, match="give --max-workers"):
        make_plan(Given(step_s=3), path, [], None)
