"""What a cluster of ours is closed to, and that a run's secrets stay out of all it writes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import settings, write_yaml
from tiny import chat_data

from trimpot.cluster import launch
from trimpot.cluster.launch import check_dashboard, is_loopback, secure_environment
from trimpot.runner.errors import ClusterError

pytestmark = pytest.mark.alone

RAY = Path(sys.executable).with_name("ray")
TRIMPOT = [sys.executable, "-m", "trimpot.cluster.cli"]


def test_every_cluster_of_ours_wants_a_token(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "ray/token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    ours = secure_environment()
    assert (ours["RAY_AUTH_MODE"], ours["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
    assert re.fullmatch(r"[0-9a-f]{64}", token := path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secure_environment()
    assert path.read_text() == token  # the user's own stays


def test_nothing_that_starts_ray_opens_its_dashboard() -> None:
    """Wherever our code starts a cluster or says how: loopback."""
    for path in Path(launch.__file__).parent.rglob("*"):
        if path.suffix in (".py", ".j2", ".yaml", ".sh", ".md"):
            text = path.read_text(encoding="utf-8")
            assert "0.0.0.0" not in text, path
            assert set(re.findall(r"dashboard[-_]host[=\" ]+([\w.]+)", text)) <= {"127.0.0.1"}, path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_a_dashboard_for_its_own_machine_may_be_open(host: str) -> None:
    assert is_loopback(host)
    check_dashboard("a:1", f"[{host}]:8265" if ":" in host else f"{host}:8265")
    check_dashboard("a:1", None)
    check_dashboard("a:1", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "head", "127.0.0.1.evil.org"])
def test_a_dashboard_for_all_may_not(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ClusterError, match="RAY_AUTH_MODE=token"):
        check_dashboard("a:1", f"[{host}]:8265" if ":" in host else f"{host}:8265")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def open_cluster(folder: Path) -> Iterator[str]:
    """A Ray head that takes work from whoever reaches it, its dashboard on all interfaces."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    port, log = free_port(), folder / "ray.log"
    command = [
        str(RAY), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        "--dashboard-host=0.0.0.0", f"--dashboard-port={free_port()}", "--include-dashboard=true",
        "--object-store-memory=100000000", f"--temp-dir={folder / 'r'}",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_that_takes_work_from_everybody_is_refused(model: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tp") as place:  # short: it has sockets in it
        folder = Path(place)
        values = settings(model, chat_data(folder, 20), folder / "run")
        config = write_yaml(folder / "run.yaml", values)
        with open_cluster(folder) as address:
            done = subprocess.run(
                [*TRIMPOT, "train", str(config), "--address", address],
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: the Ray cluster at {address} runs whatever is sent")
        assert "--dashboard-host=127.0.0.1" in line
        assert not (folder / "run/plan.json").exists()


# --- secrets in a real run

CANARIES = {
    "HF_TOKEN": "hf_" + "CaNaRy" * 6,
    "AWS_ACCESS_KEY_ID": "AKIA" + "CANARY7EXAMPLE42",
    "AWS_SECRET_ACCESS_KEY": "wJaCaNaRyFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "WANDB_API_KEY": "ca4a12ca4a12ca4a12ca4a12ca4a12ca4a12ca4a",
    "MLFLOW_TRACKING_PASSWORD": "CaNaRy-horse-battery",
    "https_proxy": "http://me:CaNaRyPaSs@127.0.0.1:9",
}
SECRETS = [*(v for k, v in CANARIES.items() if k != "https_proxy"), "CaNaRyPaSs"]
SPEAKS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}" \
    "{% if add_generation_prompt %}assistant: {% endif %}"  # fmt: skip


def leaks(folder: Path) -> list[str]:
    """Files and names of files in which a secret stands."""
    found = []
    for path in folder.rglob("*"):
        named = [secret for secret in SECRETS if secret in path.name]
        raw = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found += [f"{path}: {secret}" for secret in SECRETS if secret.encode() in raw or named]
    return found


def train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [*TRIMPOT, "train", str(config), *arguments],
        env=kept | CANARIES, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_secrets_are_in_nothing_that_a_run_leaves(model: Path, tmp_path: Path) -> None:
    """In no journal, plan, report, checkpoint, tracker's file, failure.log, nor in Ray's own logs.

    The run is stopped by a loss that is not finite, so that a traceback is kept, too; and its
    samples quote a token, as data can.
    """
    data = chat_data(tmp_path, 40)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["messages"][0]["content"] += f" with token {CANARIES['HF_TOKEN']}?"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(
        model, data, tmp_path / "run", method="full", adapter=None,
        optim={"learning_rate": 9.9, "weight_decay": 0.9, "max_grad_norm": None,
               "warmup_steps": 0, "max_steps": 200},
        data={"max_length": 256},
        checkpoint={"every_steps": 2},
        samples={"prompts": 2, "max_new_tokens": 4},
        tracking={"sinks": ["tensorboard"]},
    )  # fmt: skip
    done = train(write_yaml(tmp_path / "run.yaml", values))
    assert done.returncode == 1, done.stdout + done.stderr
    run = tmp_path / "run"
    assert {
        "journal.jsonl",
        "plan.json",
        "report.html",
        "failure.log",
        "checkpoints",
        "tensorboard",
    } <= {path.name for path in run.iterdir()}
    assert "Traceback" in (run / "failure.log").read_text()
    assert '"sample"' in (run / "journal.jsonl").read_text()
    assert "with token ***" in (run / "report.html").read_text()
    assert leaks(run) == []
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
    session = Path("/tmp/ray/session_latest")
    if session.exists():
        assert leaks(session.resolve() / "logs") == []


def test_a_secret_in_what_fails_is_not_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    """A tracker's exception that quotes its URL; an error's line; a warning of a library."""
    import logging

    from trimpot.cluster import cli
    from trimpot.cluster.display import Display
    from trimpot.cluster.train import Watcher
    from trimpot.runner.errors import TrainError
    from trimpot.runner.types import Event, Plan

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    said = " ".join(CANARIES.values())
    plan = Plan(None, str(tmp_path), "m", 1, 1, 1, 1, {"stage": 0})  # type: ignore[arg-type]
    watcher = Watcher(plan, Display(), started=0.0)
    watcher.warn(said)
    watcher.tell(Event("start", {"run_dir": said, "config": {"tracking": {"project": said}}}))
    try:
        try:
            raise ValueError(f"401 for {said}")
        except ValueError as error:
            raise TrainError(said) from error
    except TrainError as failure:
        watcher._keep_failure(failure)
    watcher._end("failed", 1, said)
    assert "ValueError: 401 for ***" in (tmp_path / "failure.log").read_text()
    assert leaks(tmp_path) == []

    monkeypatch.setattr(sys, "argv", ["trimpot", "report", f"/no/{said}"])
    logging.getLogger().handlers.clear()
    with pytest.raises(SystemExit):
        cli.main()
    logging.getLogger("x").warning("%s", said)
    out, err = capsys.readouterr()
    assert "WARNING x: ***" in err
    assert not [secret for secret in SECRETS if secret in out + err]
