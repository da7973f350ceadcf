"""Real runs, real kills, by seeded schedules: whatever dies, the same adapter comes out.

One Ray cluster of two nodes serves them all. Each schedule is one run of `trimpot train`, met by
one to three faults. At the same number of workers the adapter must be the unbroken run's, byte for
byte; at another, its losses must be.
"""

from __future__ import annotations

import contextlib
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
from runs import settings, write_yaml
from tiny import chat_data

from trimpot.cluster import journal as journals

STEPS, EVERY = 32, 4
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
        for node in self.cluster.nodes[1:]:
            for pid in node.pids() if node.process.poll() is None else []:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        """Until it holds; or the run is over, and there is nothing left to break."""
        wait(lambda: condition() or self.driver.poll() is not None, timeout=RUN_S)


# --- faults: each breaks the run at a moment that `draw` chooses


def at_a_step(run: Run, draw: random.Random) -> None:
    step = run.step() + draw.randint(1, STEPS // 3)
    run.until(lambda: run.step() >= step)
    time.sleep(draw.random() / 5)


def strike(run: Run, draw: random.Random, number: int, everyone: bool = False) -> None:
    victims = run.workers()
    for victim in victims if everyone else draw.sample(victims, min(1, len(victims))):
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
    run.until(lambda: any((run.folder / "checkpoints").glob(".step-*.partial")))
    strike(run, draw, signal.SIGKILL, everyone=True)


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
    run.until(lambda: run.steps_of_this_start() > 5)
    time.sleep(draw.random())
    starts = run.starts()
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # none is left to be stopped
        victim = draw.choice(run.workers())
        victim.suspend()
        deadline = time.monotonic() + STOPPED_S
        run.until(lambda: run.starts() > starts or time.monotonic() > deadline)
        victim.resume()


def raylet_killed(run: Run, draw: random.Random) -> None:
    """SIGKILL to a node's raylet, which takes the node along; another node comes for it."""
    at_a_step(run, draw)
    node = draw.choice([n for n in run.cluster.nodes[1:] if n.process.poll() is None])
    node.kill_raylet()
    time.sleep(3 * draw.random())
    run.cluster.add()


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


def configured(model: Path, folder: Path, name: str, **sections: Any) -> Path:
    values = settings(
        model,
        chat_data(folder, 120),
        folder / name,
        adapter={"lora_dropout": 0.1},
        optim={
            "batch_size": 12,
            "micro_batch_size": 3,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
        },
        fleet={"workers": 2, "zero_stage": 2},
        checkpoint={"every_steps": EVERY},
        **sections,
    )
    return write_yaml(folder / f"{name}.yaml", values)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with ray_nodes(6, tmp_path_factory.mktemp("nodes")) as cluster:
        cluster.add()
        cluster.add()
        yield cluster


@pytest.fixture(scope="module")
def unbroken(cluster, model, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    yaml = configured(model, tmp_path_factory.mktemp("unbroken"), "run")
    out, err = cluster.train(yaml).communicate(timeout=RUN_S)
    assert adapter(yaml.with_suffix("")), out + err
    return yaml.with_suffix("")


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> dict[int, float]:
    return {s["step"]: s["loss"] for s in journals.history(journals.read(folder)).steps}


def recoveries(events: list[dict[str, Any]]) -> list[float]:
    """Seconds from each failure's last step before it to the first step after it."""
    found = []
    for at, event in enumerate(events):
        if event["kind"] == "failure":
            after = (e["time"] for e in events[at:] if e["kind"] == "step")
            if (again := next(after, None)) is not None:
                found.append(again - event["time"])
    return found


def survive(
    cluster: Cluster, model: Path, folder: Path, seed: int, faults: list, count: Callable
) -> Path:
    draw = random.Random(seed)
    yaml = configured(model, folder, f"run-{seed}")
    run = Run(cluster, yaml, cluster.train(yaml))
    for fault in faults:
        fault(run, draw)
    out, err = run.driver.communicate(timeout=RUN_S)
    assert run.driver.returncode == 0, out + err
    events = run.events()
    history = journals.history(events)
    count(schedules=1, survived=1, steps_lost=sum(s.steps_redone for s in history.sessions))
    for seconds in recoveries(events):
        count(recovery_seconds=seconds)
    return run.folder


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
    faults = [FAULTS[seed]]
    folder = survive(cluster, model, tmp_path, seed, faults, count)
    kinds = [event["kind"] for event in journals.read(folder)]
    assert "failure" in kinds or kinds.count("start") > 1  # it was broken
    assert adapter(folder) == adapter(unbroken)
    assert losses(folder) == losses(unbroken)


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(LONG))
def test_many_schedules(number, cluster, unbroken, model, tmp_path, count) -> None:
    seed = number + 1000 * (1 + int(os.environ.get("CHAOS_SEED", "0")))
    folder = survive(cluster, model, tmp_path, seed, schedule(seed), count)
    assert adapter(folder) == adapter(unbroken)
    assert losses(folder) == losses(unbroken)
