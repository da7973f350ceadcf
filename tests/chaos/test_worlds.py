"""Nodes come and go under a run: 1, 3, 2, 4 workers, and the same samples, losses, adapter."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from nodes import Cluster, ray_nodes, wait
from runs import config, prepared, run_arrangements, settings, write_yaml
from tiny import chat_data

from trimpot.cluster import journal as journals

pytestmark = pytest.mark.alone

STEPS, LONG_S = 48, 300
WHOLE_S = 900
"""600 steps of twelve micro-batches: 5 min of one worker on a slow core."""
OPTIM = {"batch_size": 12, "micro_batch_size": 1, "max_steps": STEPS, "learning_rate": 3e-3}
DROPOUT = {"lora_dropout": 0.1}


def events(run: Path) -> list[dict[str, Any]]:
    return journals.read(run) if (run / "journal.jsonl").exists() else []


def step(run: Path) -> int:
    return max((e["step"] for e in events(run) if e["kind"] == "step"), default=0)


def starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["kind"] == "start"]


def until(run: Path, least: int, driver) -> None:
    wait(lambda: step(run) >= least or driver.poll() is not None, timeout=LONG_S)
    assert step(run) >= least, driver.communicate()


def stopped(driver) -> None:
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=LONG_S)
    assert driver.returncode == 130, out + err


def resize(cluster: Cluster, count: int) -> None:
    for _ in range(count - len(cluster.alive())):
        cluster.add()
    # The head may not have missed a killed one yet.
    wait(lambda: len(cluster.listed()) == 1 + count)


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.chaos
@pytest.mark.parametrize("more", [{"deterministic": True}, {}], ids=["exact", "plain"])
def test_one_three_two_four_workers(more, model, tmp_path, count):
    run, data = tmp_path / "run", chat_data(tmp_path, 120)
    same = {"adapter": DROPOUT, "optim": OPTIM, **more}
    fleet = {"workers": {"min": 1, "max": 4}, "zero_stage": 0}
    values = settings(model, data, run, **same, fleet=fleet, checkpoint={"every_steps": 5})
    yaml = write_yaml(tmp_path / "run.yaml", values)
    alone = prepared(config(model, data, tmp_path / "alone", **same))
    (expected,) = run_arrangements(1, [alone], tmp_path)

    with ray_nodes(6, tmp_path) as cluster:
        resize(cluster, 1)
        driver = cluster.train(yaml)
        until(run, 8, driver)
        stopped(driver)
        resize(cluster, 3)
        driver = cluster.train(yaml)
        until(run, 16, driver)
        # One of three is taken back: it says so, and no step is lost.
        noticed = cluster.nodes[-1]
        cluster.drain(noticed, 60)
        wait(lambda: len(starts(run)) == 3, timeout=LONG_S)
        until(run, step(run) + 3, driver)
        stopped(driver)
        noticed.kill()
        resize(cluster, 4)
        driver = cluster.train(yaml)
        out, err = driver.communicate(timeout=LONG_S)
        assert driver.returncode == 0, out + err

    assert [start["world_size"] for start in starts(run)] == [1, 3, 2, 4]
    history = journals.history(events(run))
    assert sum(session.steps_redone for session in history.sessions) == 0
    assert [e["reason"] for e in events(run) if e["kind"] == "leave"] == ["preempted"]
    losses = [s["loss"] for s in history.steps]
    assert losses == pytest.approx(expected, rel=1e-4)
    if more:
        assert losses == expected
        assert adapter(run) == adapter(Path(alone.run_dir))
    count(schedules=1, survived=1, steps_lost=0)


@pytest.mark.chaos
def test_one_run_shrinks_grows_and_loses_a_node(model, tmp_path, count):
    run, data = tmp_path / "run", chat_data(tmp_path, 120)
    optim = OPTIM | {"max_steps": 600}
    values = settings(
        model, data, run, optim=optim, checkpoint={"every_steps": 20},
        fleet={"workers": {"min": 1, "max": 2}, "zero_stage": 0, "grow_after_s": 2},
        deterministic=True,
    )  # fmt: skip
    yaml = write_yaml(tmp_path / "run.yaml", values)
    alone = prepared(config(model, data, tmp_path / "alone", optim=optim, deterministic=True))
    (expected,) = run_arrangements(1, [alone], tmp_path, timeout=WHOLE_S)

    def told(kind: str) -> int:
        return sum(event["kind"] == kind for event in events(run))

    with ray_nodes(5, tmp_path) as cluster:
        cluster.add()
        going = cluster.add()
        driver = cluster.train(yaml)
        until(run, 20, driver)
        cluster.drain(going, 60)
        wait(lambda: len(starts(run)) == 2, timeout=LONG_S)
        going.kill()
        cluster.add()
        wait(lambda: len(starts(run)) == 3, timeout=LONG_S)
        until(run, step(run) + 5, driver)
        cluster.nodes[-1].kill()
        wait(lambda: len(starts(run)) == 4, timeout=LONG_S)
        out, err = driver.communicate(timeout=WHOLE_S)
    assert driver.returncode == 0, out + err
    assert [s["world_size"] for s in starts(run)] == [2, 1, 2, 1]
    history = journals.history(events(run))
    assert [s.steps_redone for s in history.sessions[:3]] == [0, 0, 0]
    assert [s["loss"] for s in history.steps] == expected
    assert [f["verdict"] for f in history.failures] == ["node lost"]
    assert history.failures[0]["text"].endswith(f"(node {cluster.nodes[-1].host.address})")
    lost = history.sessions[3].steps_redone
    count(schedules=1, survived=1, steps_lost=lost)
    assert lost <= 20
