"""Real workers that stand still or are slow: named, their stacks dumped, ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import HERE, config, prepared, settings, write_yaml
from tiny import chat_data

from trimpot.cluster import watch
from trimpot.cluster.hang import FLOOR_S
from trimpot.cluster.watch import Watch
from trimpot.runner.pulse import FOLDER, Pulse, read_beats
from trimpot.runner.types import Event

pytestmark = pytest.mark.alone

NOTICED_S = 5.0
"""Over the time that a section has: beats, looks, and a node that is asked."""


def here(function: Callable[[Any], Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All nodes are this machine."""
    return {node: function(value) for node, value in inputs.items()}


@contextlib.contextmanager
def faulty(model: Path, folder: Path, fault: str, micro: int = 4) -> Iterator[tuple]:
    """Two workers under torchrun, worker 1 faulty, and a watcher that needs no Ray."""
    data = chat_data(folder, 64)
    optim = {"batch_size": 2 * micro, "max_steps": 400}
    plan = prepared(
        config(model, data, folder / "run", optim=optim, fleet={"zero_stage": 1}),
        world_size=2,
        gradient_accumulation_steps=1,
        micro_batch_size=micro,
    )
    pulses = folder / "pulses"
    pulses.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        FOLDER: str(pulses),
    }
    told: list[Event] = []
    log = (folder / "out.log").open("w")
    process = subprocess.Popen(
        [*command, str(HERE / "standing.py"), f"{plan.run_dir}/plan.json", fault, "1"],
        env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    watcher = Watch(pulses, folder, 2, told.append, here)
    try:
        with watcher:
            yield process, watcher, told, pulses
    finally:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("standing.py" in part for part in child.cmdline()):
                    child.kill()
        process.wait()


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def until(condition: Callable[[], Any], process: subprocess.Popen, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the workers ended"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_never_comes_to_its_collective(model, tmp_path):
    with faulty(model, tmp_path, "sleep") as (process, watcher, told, _):
        until(lambda: watcher.error is not None, process)
        watcher.join()
        assert process.wait(60) != 0  # ended by the watcher
    (event,) = told
    values = event.values
    assert event.kind == "hang" and (values["rank"], values["silent"]) == (1, [])
    assert values["step"] == 12 and values["section"] == "backward"
    assert values["last_collective"].startswith("gloo:")
    assert watcher.error is not None and watcher.error.rank == 1
    assert "worker 0 waits in gloo:all_reduce" in str(watcher.error)
    page = Path(values["stacks_file"]).read_text()
    first, second = page.split("--- stacks of worker ")[1:]
    assert "sum_over_workers" in first and "all_reduce" in first
    assert "standing.py" in second and " in sleep" in second
    beats = watcher.sights.of
    assert values["collectives"] == beats[0].beat.collectives - 1
    assert_in_time(values, dataclasses.asdict(beats[1].beat))


def assert_in_time(values: Mapping[str, Any], beat: Mapping[str, Any]) -> None:
    allowed = max(FLOOR_S, 3 * beat["step_s"], 1.5 * beat["longest_s"])
    assert allowed <= values["seconds"] < allowed + NOTICED_S


@pytest.mark.chaos
def test_a_worker_that_holds_the_lock_in_c(model, tmp_path):
    with faulty(model, tmp_path, "spin") as (process, watcher, told, _):
        until(lambda: watcher.error is not None, process)
        watcher.join()
    (event,) = told
    assert (event.values["rank"], event.values["silent"]) == (1, [1])
    assert "its process does not run" in event.values["text"]
    second = Path(event.values["stacks_file"]).read_text().split("--- stacks of worker 1")[1]
    assert "standing.py" in second and " in spin" in second


@pytest.mark.chaos
def test_a_slow_worker_is_a_straggler(model, tmp_path):
    with faulty(model, tmp_path, "slow", micro=1) as (process, watcher, told, _):
        until(lambda: told, process, timeout=400)
    event = told[0]
    assert event.kind == "straggler" and event.values["rank"] == 1
    assert event.values["ratio"] > 1.5
    assert watcher.error is None


def test_what_a_pulse_costs(tmp_path):
    """CPU time of a beat, with a full recorder as far as torch keeps one."""
    from trimpot.runner.pulse import _Writer

    pulse = Pulse()
    for step in range(300):
        pulse.begin_step(step)
    writer = _Writer(pulse, tmp_path, 0, 1)
    writer.start()
    writer.over.set()
    writer.join()
    assert writer.count == 1
    began = time.thread_time()
    for _ in range(100):
        writer.write()
    each = (time.thread_time() - began) / 100
    assert each < 0.01, f"{1e3 * each:.2f} ms of each second"
    assert read_beats(tmp_path, 1)[0].count == 101
    assert read_beats(tmp_path, 1)[0].steps == 256
    began = time.thread_time()
    for _ in range(10_000):
        pulse.enter("data")
    assert (time.thread_time() - began) / 10_000 < 1e-4
    writer.close()


def test_half_a_beat_is_none(tmp_path):
    (tmp_path / "rank-0.json").write_text('{"rank": 0, "cou')
    assert read_beats(tmp_path, 2) == {}


def test_a_pid_that_was_given_again_is_left_alone():
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = psutil.Process(other.pid).create_time()
    watch.end({0: (other.pid, born - 100, "")})
    assert watch.dump({0: (other.pid, born - 100, "")}) == {0: "its process is gone"}
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.3)
    watch.end({0: (other.pid, born, "")})
    assert other.wait(10) == -signal.SIGKILL


@pytest.fixture
def run_yaml(model, tmp_path) -> Path:
    values = settings(
        model,
        chat_data(tmp_path, 64),
        tmp_path / "run",
        optim={"batch_size": 8, "max_steps": 2000},
        fleet={"workers": 2, "zero_stage": 1, "max_failures": 0},
    )
    return write_yaml(tmp_path / "run.yaml", values)


@pytest.mark.slow
def test_a_stopped_worker_of_a_ray_run_is_named_and_ended(run_yaml, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "trimpot.cluster.cli", "train", str(run_yaml)],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    beats: dict = {}

    def timed() -> bool:
        for folder in (run / "pulse").glob("*"):
            beats.update(read_beats(folder, 2))
        return len(beats) == 2 and all(beat.steps >= 20 for beat in beats.values())

    until(timed, process)
    pid = beats[1].pid
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()
    out, err = process.communicate(timeout=180)
    assert process.returncode == 1, out + err
    assert not psutil.pid_exists(pid)
    (event,) = (e for e in journal(run) if e["kind"] == "hang")
    assert (event["rank"], event["silent"]) == (1, [1])
    assert event["section"] and event["step"] >= 20
    assert event["last_collective"].startswith("gloo:")
    longest = max(beat.longest_s for beat in beats.values())
    allowed = max(FLOOR_S, 3 * beats[1].step_s, 1.5 * longest)
    assert event["time"] - stopped < allowed + NOTICED_S
    (line,) = err.splitlines()
    assert line.startswith("error: worker 1 on ") and event["section"] in line
    assert "hang: worker 1" in out
    page = Path(event["stacks_file"]).read_text()
    first, second = page.split("--- stacks of worker ")[1:]
    assert "in sum_over_workers" in first or "in backward" in first or "in step" in first
    assert "its process is stopped (SIGSTOP" in second
    (failure,) = (e for e in journal(run) if e["kind"] == "failure")
    assert (failure["verdict"], failure["rank"]) == ("hang", 1)
    assert json.loads((run / "journal.jsonl").read_text().splitlines()[-1])["status"] == "failed"
    assert not (run / "pulse").exists()
    assert "stood still" in (run / "report.html").read_text()
