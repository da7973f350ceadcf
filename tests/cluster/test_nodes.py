"""A Ray head and two raylets as nodes with addresses of their own; training across them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import config, prepared, run_arrangements, settings, write_yaml
from tiny import tiny_data

RAY = Path(sys.executable).with_name("ray")
SMALL = ["--object-store-memory=100000000", "--disable-usage-stats"]
Prefix = list[str]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def may_make_namespaces() -> bool:
    name = f"tp-{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[tuple[Prefix, str]]]:
    """`count` hosts on one switch: (command prefix, address) of each."""
    tag = uuid.uuid4().hex[:4]
    switch, hosts = f"tp{tag}s", [f"tp{tag}h{i}" for i in range(count)]
    try:
        for name in (switch, *hosts):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(hosts):
            port = f"tp{tag}v{number}"
            ip("link", "add", port, "netns", switch, "type", "veth", "peer", "eth0", "netns", host)
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", host, "addr", "add", f"10.77.0.1{number}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
        yield [
            (["ip", "netns", "exec", host], f"10.77.0.1{number}")
            for number, host in enumerate(hosts)
        ]
    finally:
        for name in (*hosts, switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextlib.contextmanager
def loopback_nodes(count: int) -> Iterator[list[tuple[Prefix, str]]]:
    """Where namespaces can't be made: as many addresses of the loopback network."""
    yield [([], f"127.0.0.{number + 1}") for number in range(count)]


@contextlib.contextmanager
def cluster(
    nodes: list[tuple[Prefix, str]], environment: dict[str, str], logs: Path
) -> Iterator[str]:
    """`ray start` on each node, the first being the head without CPUs of its own → address.

    One after the other: raylets of one machine that start together race for their files.
    """
    (head, address), *rest = nodes
    started: list[subprocess.Popen] = []

    def launch(prefix: Prefix, *arguments: str) -> None:
        command = [*prefix, str(RAY), "start", "--block", *SMALL, *arguments]
        log = logs / f"ray-start-{len(started)}.log"
        with log.open("w") as out:
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=out, stderr=out, start_new_session=True
                )
            )
        wait(lambda: "Ray runtime started" in log.read_text(), log)

    port = "6399"
    dashboard = ["--dashboard-host=127.0.0.1", "--include-dashboard=false"]
    try:
        launch(head, "--head", f"--node-ip-address={address}", f"--port={port}", "--num-cpus=0",
               *dashboard)  # fmt: skip
        for prefix, own in rest:
            launch(prefix, f"--address={address}:{port}", f"--node-ip-address={own}",
                   "--num-cpus=1")  # fmt: skip
        yield f"{address}:{port}"
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


def wait(condition: Callable[[], bool], log: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.slow
def test_training_across_nodes_equals_one_process(model, tmp_path):
    data = tiny_data(tmp_path, 60)
    optim = {"batch_size": 8, "max_steps": 10, "learning_rate": 1e-2}
    alone = config(model, data, tmp_path / "alone", optim=optim)
    (expected,) = run_arrangements(1, [prepared(alone)], tmp_path)

    fleet = {"workers": 2, "zero_stage": 3, "nodes": 2}
    values = settings(model, data, tmp_path / "across", optim=optim, fleet=fleet)
    yaml = write_yaml(tmp_path / "across.yaml", values)
    token = tmp_path / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    hosts = namespaces if may_make_namespaces() else loopback_nodes
    with hosts(3) as nodes, cluster(nodes, environment, tmp_path) as address:
        command = [*nodes[0][0], sys.executable, "-m", "trimpot.cluster.cli", "train", str(yaml)]
        done = subprocess.run(
            [*command, "--address", address],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    events = [
        json.loads(line) for line in (tmp_path / "across/journal.jsonl").read_text().splitlines()
    ]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert losses == pytest.approx(expected, rel=1e-4)
    # Two workers of one CPU, two nodes of one CPU, none on the head: each had a node of its own.
