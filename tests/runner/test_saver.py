"""Saving goes on beside training, and a disk that refuses costs a checkpoint, not the run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import HERE, config, prepared, torchrun
from tiny import tiny_data

from trimpot.runner.checkpoint import list_checkpoints, load_state, newest_checkpoint
from trimpot.runner.journal import Journal
from trimpot.runner.pace import FIRST_S, WRITING_SHARE, Pace
from trimpot.runner.pulse import PULSE
from trimpot.runner.saver import Saved, Saver
from trimpot.runner.types import Checkpoint, Event

STEPS = 10
FULL = {"method": "full", "adapter": None}


def tell(model: Path, folder: Path, world: int, faults: list[str], **sections):
    """{fault: (run directory, what each rank was told)}"""
    data = tiny_data(folder, 60)
    optim = {"batch_size": 2, "micro_batch_size": 1, "max_steps": STEPS, "learning_rate": 1e-3}
    sections |= {"fleet": {"workers": world, "zero_stage": 2 if world > 1 else 0}, "optim": optim}
    runs = {}
    for fault in faults:
        out = folder / fault.replace(" ", "-")
        runs[fault] = prepared(
            config(model, data, out, checkpoint={"every_steps": 2, "keep": 3}, **sections)
        )
    arguments = [f"{fault}={plan.run_dir}/plan.json" for fault, plan in runs.items()]
    torchrun(world, HERE / "faulty.py", folder / "told", *arguments)
    told = [json.loads((folder / f"told.{rank}").read_text()) for rank in range(world)]
    return {f: (Path(p.run_dir), [rank[f] for rank in told]) for f, p in runs.items()}


def steps_of(run: Path) -> list[int]:
    return [int(path.name[5:13]) for path in list_checkpoints(run / "checkpoints")]


def leftovers(run: Path) -> list[Path]:
    return [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_disk_that_refuses_costs_checkpoints_only(model, tmp_path):
    runs = tell(model, tmp_path, 1, ["none", "full for a while", "full for good", "slow"])
    steps = [f"step {n}" for n in range(1, STEPS + 1)]

    run, (told,) = runs["none"]
    assert [t for t in told if not t.startswith("saved")] == [*steps, "ended at 10, complete True"]
    assert [t for t in told if t.startswith("saved")] == [f"saved {n}" for n in range(2, 11, 2)]
    assert steps_of(run) == [10, 8, 6]
    whole = state_of(run)

    run, (told,) = runs["full for a while"]
    assert [t for t in told if t.startswith("step")] == steps
    assert [t for t in told if t.startswith("saved")] == ["saved 2", "saved 8", "saved 10"]
    (warning,) = [t for t in told if t.startswith("warning")]  # of steps 4 and 6, once
    assert re.search(r"step 4 is not saved: .*File too large; the run goes on", warning)
    assert told[-1] == "ended at 10, complete True"
    assert steps_of(run) == [10, 8, 2]
    assert not leftovers(run)
    assert equal(state_of(run), whole)  # nothing of it touched what is trained

    run, (told,) = runs["full for good"]
    assert [t for t in told if t.startswith("step")] == steps
    assert [t for t in told if t.startswith("saved")] == ["saved 2"]
    assert sum(t.startswith("warning") for t in told) == 1
    assert told[-1].startswith("SaveError 1: checkpoint ")
    for part in ("File too large", "steps 3 to 10 are lost", "step-00000002", "start again"):
        assert part in told[-1]
    assert steps_of(run) == [2]
    assert not leftovers(run)
    assert not (run / "adapter").exists()

    run, (told,) = runs["slow"]  # step 3 is done while step 2 is being written
    assert told.index("saved 2") > told.index("step 3")
    assert told[-1] == "ended at 10, complete True"
    assert equal(state_of(run), whole)


def state_of(run: Path):
    found = newest_checkpoint(run / "checkpoints", pytest.fail, set_aside=False)
    assert found is not None
    return load_state(found[0])


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n][k].equal(b[n][k]) for n in a for k in b[n])


@pytest.mark.slow
def test_one_worker_of_two_without_room(model, tmp_path):
    """Its shard is missing, so there is no checkpoint; all know, and go on together."""
    faults = ["full for worker 1", "full for worker 1 for good"]
    runs = tell(model, tmp_path, 2, faults, **FULL)
    run, (first, second) = runs[faults[0]]
    saved = [t for t in first if t.startswith("saved")]
    assert saved == ["saved 2", "saved 8", "saved 10"]
    for told in (first, second):
        (warning,) = [t for t in told if t.startswith("warning")]
        assert re.search(r"step 4 is not saved: .*shard-00001-of-00002", warning)
        assert told[-1] == "ended at 10, complete True"
    assert steps_of(run) == [10, 8, 2]
    assert not leftovers(run)
    run, (first, second) = runs[faults[1]]
    for told in (first, second):
        assert told[-1].startswith("SaveError 1: ")
        assert "File too large" in told[-1]
    assert "steps 3 to 10 are lost" in first[-1]
    assert steps_of(run) == [2]
    assert not leftovers(run)


@pytest.mark.slow
def test_sigterm_saves_the_step_and_the_next_start_goes_on(model, tmp_path):
    data = tiny_data(tmp_path, 60)
    plan = prepared(
        config(model, data, tmp_path / "run", optim={"max_steps": 400, "batch_size": 2})
    )
    run = Path(plan.run_dir)
    command = [sys.executable, "-m", "trimpot.runner.worker", str(run / "plan.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    steps: list[int] = []
    while len(steps) < 3:
        assert process.poll() is None
        time.sleep(0.05)
        steps = journal_steps(run)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    steps = journal_steps(run)
    assert process.returncode == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["step"], result["complete"]) == (steps[-1], False)
    assert 3 <= steps[-1] < 400
    assert steps_of(run) == [steps[-1]]


def journal_steps(run: Path) -> list[int]:
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["step"] for event in events if event["kind"] == "step"]


# --- how often


@pytest.mark.parametrize(("stall_s", "hours"), [(0.02, 24), (0.5, 24), (6.0, 3), (150.0, 12)])
def test_the_pace_is_the_cheapest(stall_s, hours):
    """Against the cost itself: saving takes C of every τ seconds, and a failure, every M, loses
    half of τ."""
    now = [0.0]
    pace = Pace(hours, clock=lambda: now[0])
    now[0] = FIRST_S - 1
    assert not pace.due()
    now[0] = FIRST_S + 1
    assert pace.due()
    pace.begun()
    pace.measured(Saved(Checkpoint(Path(), 1, 1, "", ""), stall_s, stall_s))
    taus = [1.01**n for n in range(1500)]
    cheapest = min(taus, key=lambda tau: stall_s / tau + tau / (2 * hours * 3600))
    assert pace.every_s == pytest.approx(cheapest, rel=0.02)
    now[0] += pace.every_s * 0.99
    assert not pace.due()
    now[0] += pace.every_s * 0.02
    assert pace.due()


def test_a_slow_disk_is_not_written_all_the_time():
    pace = Pace(0.01)
    pace.measured(Saved(Checkpoint(Path(), 1, 1, "", ""), 100.01, 0.01))
    assert pace.every_s == pytest.approx(100 / WRITING_SHARE)
    assert math.sqrt(2 * 0.01 * 36) < pace.every_s


# --- the journal's own disk


def test_a_run_outlives_a_full_disk_under_its_journal(tmp_path):
    """A limit on the size of files cuts a line in the middle and refuses the next ones."""
    code = """
import resource, sys
from pathlib import Path
from trimpot.runner.journal import Journal
from trimpot.runner.types import Event
journal = Journal(Path(sys.argv[1]))
for n in range(40):
    size = (Path(sys.argv[1]) / "journal.jsonl").stat().st_size
    if n == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
    if n == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    journal(Event("eval", {"step": n, "loss": 1.0}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("the run goes on") == 1
    from trimpot.cluster.journal import history, read

    run = history(read(tmp_path))
    assert [event["step"] for event in run.evals] == [*range(10), *range(20, 40)]
    assert any("10 lines were lost" in event["text"] for event in run.warnings)
    Journal(tmp_path)(Event("eval", {"step": 40, "loss": 1.0}))
    assert history(read(tmp_path)).evals[-1]["step"] == 40


def test_waiting_for_a_slow_disk_is_part_of_a_save(tmp_path, monkeypatch):
    """Else a worker that waits for the write before would be taken for one that hangs."""
    gate, real = threading.Event(), os.fsync

    def fsync(handle: int) -> None:
        assert gate.wait(60)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    saver = Saver(tmp_path, keep=2, rank=0, world=1, token="token")
    facts = {"plan_digest": "p", "data_digest": "d", "world_size": 1, "zero_stage": 0}
    saver.begin(
        {"w": {"weight": torch.ones(3)}}, sharded=False, began=time.perf_counter(),
        step=3, cursor=12, complete=False, facts=facts,
    )  # fmt: skip
    assert PULSE.outer == ""
    waiting = threading.Thread(target=saver.finish)
    waiting.start()
    while PULSE.outer != "save":
        assert waiting.is_alive()
        time.sleep(0.01)
    gate.set()
    waiting.join()
    assert PULSE.outer == "" and PULSE.save_s > 0
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [3]


def test_making_room_spares_what_another_worker_has_begun_and_what_is_read(tmp_path):
    reading = {tmp_path / "step-00000002"}
    saver = Saver(tmp_path, keep=3, rank=0, world=2, token="mine", reading=lambda: reading)
    facts = {"plan_digest": "p", "data_digest": "d", "world_size": 1, "zero_stage": 0}
    for step in (2, 4, 6):
        saver.begin(
            {"w": {"weight": torch.ones(3)}}, sharded=False, began=time.perf_counter(),
            step=step, cursor=12, complete=False, facts=facts,
        )  # fmt: skip
        (saved,) = saver.finish()
        assert isinstance(saved, Saved)
    begun, left = (tmp_path / f".step-00000008.{whose}.partial" for whose in ("mine", "another"))
    begun.mkdir()
    left.mkdir()
    saver.make_room(saved.checkpoint)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["6", "2"]
    assert begun.exists() and not left.exists()
