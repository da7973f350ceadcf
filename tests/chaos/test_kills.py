"""Real runs, real kills, by seeded schedules: whatever dies, the same adapter comes out.

One Ray cluster of two nodes serves them all. Each schedule is one run of `trimpot train`, met by
one to three faults. Adapter and losses must be those of an unbroken run under torchrun, bit for
bit; where a node is lost for good and one worker goes on, in deterministic mode.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from nodes import Cluster, ray_nodes, wait
from runs import config, prepared, run_arrangements, settings, write_yaml
from tiny import chat_data

from trimpot.cluster import journal as journals

pytestmark = pytest.mark.alone

STEPS, EVERY = 20, 4
QUICK, LONG = 7, 58
"""Schedules in `make test`, and further ones in `make chaos`."""
RUN_S = 240
STOPPED_S = 40
"""A stopped worker that is not ended by then goes on."""


@dataclass
class Run:
    """One run of a schedule: its driver may die, and be started again."""

    cluster: Cluster
    yaml: Path
    driver: subprocess.Popen

    @property
    def folder(self) -> Path:
        return self.yaml.with_suffix("")

    def events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(Exception):
            return journals.read(self.folder)
        return []

    def step(self) -> int:
        return max((e["step"] for e in self.events() if e["kind"] == "step"), default=0)

    def starts(self) -> int:
        return sum(event["kind"] == "start" for event in self.events())

    def steps_of_this_start(self) -> int:
        kinds = [event["kind"] for event in self.events()]
        since = max((at for at, kind in enumerate(kinds) if kind == "start"), default=len(kinds))
        return kinds[since:].count("step")

    def workers(self) -> list[psutil.Process]:
        """The processes that train, or are about to."""
        found = []
        for node in self.cluster.alive():
            for pid in node.pids():
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def until(self, condition: Callable[[], bool], every_s: float = 0.1) -> None:
        """Until it holds; or the run is over, and there is nothing left to break."""
        over = self.driver.poll
        wait(lambda: condition() or over() is not None, timeout=RUN_S, every_s=every_s)


# --- faults: each breaks the run at a moment that `draw` chooses


def at_a_step(run: Run, draw: random.Random) -> None:
    step = run.step() + draw.randint(1, STEPS // 3)
    run.until(lambda: run.step() >= step)
    time.sleep(draw.random() / 5)


def strike(run: Run, draw: random.Random, number: int, everyone: bool = False) -> None:
    victims = run.workers()
    kill(victims if everyone else draw.sample(victims, min(1, len(victims))), number)


def kill(victims: list[psutil.Process], number: int) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)


def worker_killed(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    strike(run, draw, signal.SIGKILL)


def worker_crashes(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    strike(run, draw, signal.SIGSEGV)


def workers_killed(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    strike(run, draw, signal.SIGKILL, everyone=True)


def worker_told(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    strike(run, draw, signal.SIGTERM)


def killed_during_a_save(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    victims = run.workers()  # to find them takes as long as a save
    run.until(lambda: any((run.folder / "checkpoints").glob(".step-*.partial")), every_s=0.005)
    kill(victims, signal.SIGKILL)


def killed_during_start(run: Run, draw: random.Random) -> None:
    starts = run.starts()
    if starts and run.step():
        strike(run, draw, signal.SIGKILL)  # so that there is another start
        wait(lambda: run.starts() > starts or not run.workers(), timeout=RUN_S)
    run.until(lambda: bool(run.workers()))
    time.sleep(3 * draw.random())
    strike(run, draw, signal.SIGKILL)


def driver_killed(run: Run, draw: random.Random) -> None:
    at_a_step(run, draw)
    run.driver.kill()
    run.driver.communicate()
    run.driver = run.cluster.train(run.yaml)


def worker_stopped(run: Run, draw: random.Random) -> None:
    """SIGSTOP: it is found to hang, and ended; or, at the run's end, where a worker may take its
    time, it goes on after a while."""
    run.until(lambda: run.steps_of_this_start() > 0)
    victims = run.workers()  # to find them takes as long as some steps
    run.until(lambda: run.steps_of_this_start() > 5, every_s=0.02)
    time.sleep(draw.random() / 5)
    starts = run.starts()
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # none is left to be stopped
        victim = draw.choice(victims)
        victim.suspend()
        deadline = time.monotonic() + STOPPED_S
        run.until(lambda: run.starts() > starts or time.monotonic() > deadline)
        victim.resume()


def raylet_killed(run: Run, draw: random.Random) -> None:
    """SIGKILL to a node's raylet, which takes the node along; another node comes for it."""
    at_a_step(run, draw)
    node = draw.choice(run.cluster.alive())
    node.kill_raylet()
    time.sleep(3 * draw.random())
    run.cluster.add()


def node_lost(run: Run, draw: random.Random) -> None:
    """SIGKILL to all of a node, and none comes for it."""
    at_a_step(run, draw)
    draw.choice(run.cluster.alive()).kill()


FAULTS = (
    worker_killed,
    worker_told,
    killed_during_a_save,
    driver_killed,
    raylet_killed,
    worker_stopped,
    killed_during_start,
    workers_killed,
    worker_crashes,
)


# --- runs


def values(exact: bool) -> dict[str, Any]:
    """`exact`: deterministic, with one worker or two."""
    workers = {"min": 1, "max": 2} if exact else 2
    return {
        "adapter": {"lora_dropout": 0.1},
        "optim": {
            "batch_size": 12,
            "micro_batch_size": 3,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
        },
        "fleet": {"workers": workers, "zero_stage": 0 if exact else 2},
        "checkpoint": {"every_steps": EVERY},
        "deterministic": exact,
    }


def start(cluster: Cluster, model: Path, folder: Path, exact: bool = False) -> Run:
    given = settings(model, chat_data(folder, 120), folder / "run", **values(exact))
    yaml = write_yaml(folder / "run.yaml", given)
    return Run(cluster, yaml, cluster.train(yaml))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with ray_nodes(6, tmp_path_factory.mktemp("nodes")) as cluster:
        cluster.add()
        cluster.add()
        yield cluster


@dataclass
class Outcome:
    adapter: str
    """SHA-256 of its weights."""
    losses: list[float]


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory) -> dict[bool, Outcome]:
    """What comes out where nothing happens: of a plain run, and of an exact one (True)."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = chat_data(folder, 120)
    plans = [
        prepared(config(model, data, folder / f"run-{exact}", **values(exact)))
        for exact in (False, True)
    ]
    found = zip(plans, run_arrangements(2, plans, folder), strict=True)
    outcomes = [Outcome(adapter(Path(plan.run_dir)), losses) for plan, losses in found]
    return dict(zip((False, True), outcomes, strict=True))


def adapter(folder: Path) -> str:
    weights = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def outcome(folder: Path) -> Outcome:
    steps = journals.history(journals.read(folder)).steps
    return Outcome(adapter(folder), [step["loss"] for step in steps])


def recoveries(events: list[dict[str, Any]]) -> list[float]:
    """Seconds from each failure's last step before it to the first step after it."""
    found = []
    for at, event in enumerate(events):
        if event["kind"] == "failure":
            after = (e["time"] for e in events[at:] if e["kind"] == "step")
            if (again := next(after, None)) is not None:
                found.append(again - event["time"])
    return found


def survive(run: Run, seed: int, faults: list, count: Callable) -> list[dict[str, Any]]:
    """Break it → all that its journal says."""
    draw = random.Random(seed)
    for fault in faults:
        fault(run, draw)
    out, err = run.driver.communicate(timeout=RUN_S)
    assert run.driver.returncode == 0, out + err
    events = run.events()
    history = journals.history(events)
    count(schedules=1, survived=1, steps_lost=sum(s.steps_redone for s in history.sessions))
    for seconds in recoveries(events):
        count(recovery_seconds=seconds)
    return events


def schedule(seed: int) -> list:
    """One to three faults; over nine seeds in a row, each kind is the first one once."""
    draw = random.Random(seed)
    first = FAULTS[seed % len(FAULTS)]
    return [first, *draw.choices(FAULTS, k=draw.choice([0, 0, 1, 2]))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK))
def test_a_broken_run_ends_as_the_unbroken_one(
    seed, cluster, unbroken, model, tmp_path, count
) -> None:
    run = start(cluster, model, tmp_path)
    kinds = [event["kind"] for event in survive(run, seed, [FAULTS[seed]], count)]
    assert "failure" in kinds or kinds.count("start") > 1  # it was broken
    assert outcome(run.folder) == unbroken[False]


@pytest.mark.slow
def test_one_worker_goes_on_where_a_node_is_lost(cluster, unbroken, model, tmp_path, count) -> None:
    run = start(cluster, model, tmp_path, exact=True)
    try:
        events = survive(run, QUICK, [node_lost], count)
    finally:
        while len(cluster.alive()) < 2:
            cluster.add()
    assert [e["world_size"] for e in events if e["kind"] == "start"] == [2, 1]
    assert outcome(run.folder) == unbroken[True]


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(LONG))
def test_many_schedules(number, cluster, unbroken, model, tmp_path, count) -> None:
    seed = number + 1000 * (1 + int(os.environ.get("CHAOS_SEED", "0")))
    run = start(cluster, model, tmp_path)
    survive(run, seed, schedule(seed), count)
    assert outcome(run.folder) == unbroken[False]
