"""A Ray cluster of several nodes on one machine, each with an address of its own where namespaces
can be made; nodes join, are drained, and die by SIGKILL with all that ran on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
SMALL = ["--object-store-memory=100000000", "--disable-usage-stats"]
PORT = "6399"


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def may_make_namespaces() -> bool:
    name = f"tp-{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@dataclass
class Host:
    """Where a node may run: a namespace, or an address of the loopback network."""

    address: str
    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """`count` hosts on one switch."""
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
        yield [Host(f"10.77.0.1{number}", host) for number, host in enumerate(hosts)]
    finally:
        for name in (*hosts, switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextlib.contextmanager
def loopback(count: int) -> Iterator[list[Host]]:
    yield [Host(f"127.0.0.{number + 1}") for number in range(count)]


def wait(
    condition: Callable[[], bool],
    log: Path | None = None,
    timeout: float = 60,
    every_s: float = 0.1,
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log else "it did not happen in time"
        time.sleep(every_s)


@dataclass
class Node:
    host: Host
    process: subprocess.Popen

    def pids(self) -> list[int]:
        """Everything that runs on this node."""
        if self.host.namespace:
            return [int(pid) for pid in ip("netns", "pids", self.host.namespace).split()]
        if self.process.poll() is not None:
            return []
        tree = psutil.Process(self.process.pid)
        return [tree.pid, *(child.pid for child in tree.children(recursive=True))]

    def kill_raylet(self) -> None:
        """Its raylet alone; what that served ends by itself, or is ended here."""
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                if (process := psutil.Process(pid)).name() == "raylet":
                    process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        self.kill()

    def kill(self) -> None:
        """The node is gone: SIGKILL to all of it at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


@dataclass
class Cluster:
    """The first host has the head, without CPUs of its own."""

    hosts: list[Host]
    environment: dict[str, str]
    logs: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def alive(self) -> list[Node]:
        """Of those beside the head."""
        return [node for node in self.nodes[1:] if node.process.poll() is None]

    def start_head(self) -> None:
        self._launch(
            self.head, "--head", f"--port={PORT}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
            "--include-dashboard=false",
        )  # fmt: skip

    def add(self) -> Node:
        """One more node, of one CPU, on the first host that has none."""
        taken = {node.host.address for node in self.nodes if node.process.poll() is None}
        host = next(host for host in self.hosts if host.address not in taken)
        return self._launch(host, f"--address={self.address}", "--num-cpus=1")

    def _launch(self, host: Host, *arguments: str) -> Node:
        # One after the other: raylets of one machine that start together race for their files.
        command = [*host.prefix, str(RAY), "start", "--block", *SMALL]
        log = self.logs / f"ray-start-{len(self.nodes)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, f"--node-ip-address={host.address}", *arguments],
                env=self.environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        wait(lambda: "Ray runtime started" in log.read_text(), log)
        self.nodes.append(Node(host, process))
        return self.nodes[-1]

    def drain(self, node: Node, seconds: int) -> None:
        """What a spot node's watcher does on notice: tell Ray that it will go."""
        names = {entry["address"]: entry["id"] for entry in self.listed()}
        command = [
            str(RAY), "drain-node", "--address", self.address, "--node-id",
            names[node.host.address], "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "spot", "--deadline-remaining-seconds", str(seconds),
        ]  # fmt: skip
        self.run(command)

    def listed(self) -> list[dict[str, str]]:
        """{id, address} of each node that the head takes for alive."""
        code = (
            "import json, sys; from ray._raylet import GcsClient;"
            "nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values();"
            "print(json.dumps([{'id': n.node_id.hex(), 'address': n.node_manager_address}"
            " for n in nodes if n.state == 0]))"
        )
        return json.loads(self.run([sys.executable, "-c", code, self.address]))

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            [*self.head.prefix, *command],
            env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, config: Path, *arguments: str) -> subprocess.Popen:
        """`trimpot train`, its driver on the head's host."""
        command = [*self.head.prefix, sys.executable, "-m", "trimpot.cluster.cli", "train"]
        return subprocess.Popen(
            [*command, str(config), "--address", self.address, *arguments],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def stop(self) -> None:
        for node in self.nodes:  # told to end, some take 30 s
            node.kill()


@contextlib.contextmanager
def ray_nodes(hosts: int, logs: Path) -> Iterator[Cluster]:
    """A cluster of a head and room for `hosts` − 1 nodes, with a token of its own."""
    token = logs / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A node that is gone is missed after 2 s, not after 15.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "2",
    }
    environment.pop("RAY_ADDRESS", None)
    places = namespaces if may_make_namespaces() else loopback
    with places(hosts) as found:
        cluster = Cluster(found, environment, logs)
        try:
            cluster.start_head()
            yield cluster
        finally:
            cluster.stop()
