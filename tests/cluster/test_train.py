"""`trimpot train` for real: a Ray cluster, DeepSpeed workers, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from runs import settings, write_yaml
from tiny import chat_data

pytestmark = pytest.mark.alone

TRAIN = [sys.executable, "-m", "trimpot.cluster.cli", "train"]


def journal(run: Path) -> list[dict]:
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps(run: Path) -> list[dict]:
    return [event for event in journal(run) if event["kind"] == "step"]


def wait_for(condition, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def start(config: Path, *arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*TRAIN, str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, out + err
    return out, err


@pytest.fixture(scope="module")
def configs(model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("train")
    data = chat_data(folder, 120)
    made = {}
    for name in ("unbroken", "broken"):
        values = settings(
            model,
            data,
            folder / name,
            adapter={"lora_dropout": 0.1},
            optim={"batch_size": 8, "max_steps": 40, "learning_rate": 3e-3},
            fleet={"workers": 2, "zero_stage": 2},
            evaluation={"every_steps": 20},
            samples={"prompts": 1, "max_new_tokens": 8},
            tracking={"sinks": ["tensorboard"]},
        )
        made[name] = write_yaml(folder / f"{name}.yaml", values)
    return made


def read_back(driver: psutil.Process) -> dict[str, object]:
    """What the live Ray processes under a driver say of themselves."""
    processes = driver.children(recursive=True)
    by_name = {n: p for p in processes for n in ("gcs_server", "raylet") if p.name() == n}
    dashboard = next(p for p in processes if "dashboard/dashboard.py" in " ".join(p.cmdline()))
    listening = [c for c in dashboard.net_connections("tcp") if c.status == "LISTEN"]
    by_name["dashboard"] = dashboard
    environments = {name: p.environ() for name, p in by_name.items()}
    # The port that speaks HTTP is the dashboard's own; others of its process are gRPC.
    arguments = dict(a.lstrip("-").split("=", 1) for a in dashboard.cmdline() if "=" in a)
    port = int(arguments["port"])
    url = f"http://127.0.0.1:{port}/api/jobs/"
    try:
        status = urllib.request.urlopen(url, timeout=20).status
    except urllib.error.HTTPError as error:
        status = error.code
    return {
        "host": arguments["host"],
        "listens": {c.laddr.ip for c in listening if c.laddr.port == port},
        "jobs_without_token": status,
        "environments": environments,
    }


@pytest.fixture(scope="module")
def unbroken(configs) -> tuple[Path, dict, str]:
    """(run directory, what Ray's processes said meanwhile, output) of a run left alone."""
    config = configs["unbroken"]
    run = config.with_suffix("")
    process = start(config, "--json")
    wait_for(lambda: any(e.get("name") == "ray" for e in journal(run)), process)
    seen = read_back(psutil.Process(process.pid))
    out, _ = finish(process, 0)
    return run, seen, out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(unbroken):
    run, _, out = unbroken
    result = json.loads(out.splitlines()[-1])
    assert (result["status"], result["step"]) == ("done", 40)
    assert result["held_out_after"] < result["held_out_before"]
    assert Path(result["adapter"], "adapter_model.safetensors").is_file()
    assert Path(result["report"]).read_text().lower().startswith("<!doctype html>")
    assert [step["step"] for step in steps(run)] == list(range(1, 41))
    kinds = {event["kind"] for event in journal(run)}
    assert kinds >= {"start", "phase", "eval", "step", "sample", "checkpoint", "end"}
    assert list((run / "tensorboard").iterdir())
    assert not (run / "stop").exists()


@pytest.mark.slow
def test_ray_is_closed_to_others(unbroken):
    _, seen, _ = unbroken
    assert seen["host"] == "127.0.0.1"
    assert seen["listens"] == {"127.0.0.1"}
    assert seen["jobs_without_token"] in (401, 403)
    for name, environment in seen["environments"].items():
        assert environment["RAY_AUTH_MODE"] == "token", name
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0", name


@pytest.mark.slow
def test_ctrl_c_then_the_same_command_is_bit_equal(configs, unbroken):
    config = configs["broken"]
    run = config.with_suffix("")
    process = start(config)
    wait_for(lambda: len(steps(run)) >= 7, process)
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, 130)
    stopped = steps(run)[-1]["step"]
    assert 7 <= stopped < 40, out
    assert not (run / "adapter").exists()

    finish(start(config), 0)
    starts = [event for event in journal(run) if event["kind"] == "start"]
    assert [event["resumed_from"] for event in starts] == [None, stopped]
    assert [s["loss"] for s in steps(run)] == [s["loss"] for s in steps(unbroken[0])]
    ours, theirs = (
        Path(folder, "adapter/adapter_model.safetensors").read_bytes()
        for folder in (run, unbroken[0])
    )
    assert ours == theirs

    # A run that is done says so, and trains nothing.
    before = (run / "journal.jsonl").read_bytes()
    began = time.monotonic()
    out, _ = finish(start(config), 0)
    assert "finished already" in out
    assert (run / "journal.jsonl").read_bytes() == before
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line(model, tmp_path):
    values = settings(
        model,
        chat_data(tmp_path, 40),
        tmp_path / "run",
        method="full",
        adapter=None,
        # AdamW multiplies each weight by 1 − 9.9 · 0.9 a step: they grow until they overflow.
        optim={
            "learning_rate": 9.9,
            "weight_decay": 0.9,
            "max_grad_norm": None,
            "warmup_steps": 0,
            "max_steps": 200,
        },
    )
    out, err = finish(start(write_yaml(tmp_path / "run.yaml", values)), 1)
    (line,) = err.splitlines()
    assert line.startswith("error: the loss of step")
    assert "learning_rate" in line
    assert "Traceback" not in out + err
    assert journal(tmp_path / "run")[-1]["status"] == "failed"
