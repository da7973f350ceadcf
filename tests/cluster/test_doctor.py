"""`trimpot doctor`: the shape of its facts, what it finds amiss, what it must not import."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from trimpot.cluster import doctor

PROGRAM = """
import json, sys, time
begin = time.process_time()
from trimpot.cluster import doctor
facts = doctor.examine()
seconds = time.process_time() - begin
heavy = [m for m in ("torch", "ray", "transformers", "deepspeed") if m in sys.modules]
print(json.dumps({"facts": facts, "heavy": heavy, "seconds": seconds}))
"""


def examine_elsewhere(**environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor.examine()


def fake_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)


def test_imports_nothing_heavy_and_answers_at_once() -> None:
    answers = [examine_elsewhere() for _ in range(3)]
    assert answers[0]["heavy"] == []
    if not answers[0]["facts"]["gpus"]:  # a driver may take its time
        assert min(a["seconds"] for a in answers) < 0.5


def test_shape_of_the_json(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {
        "python", "platform", "cpu", "memory_bytes", "disk", "shared_memory_bytes", "gpus",
        "versions", "native", "cpu_gemm", "ops", "tools", "ray", "hf_offline", "problems",
    }  # fmt: skip
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(facts["cpu"]) == {"model", "cores", "usable_cores", "isa"}
    assert 0 < facts["cpu"]["usable_cores"] <= facts["cpu"]["cores"]
    assert facts["memory_bytes"] > 2**28
    assert set(facts["native"]) == {"available", "why", "isa"}
    assert all(set(row) == {"op", "backend", "why"} for row in facts["ops"])
    assert {row["op"] for row in facts["ops"]} >= {"pack", "content_hash"}
    assert all(set(problem) == {"what", "advice"} for problem in facts["problems"])
    assert all("\n" not in text for problem in facts["problems"] for text in problem.values())
    assert facts["versions"]["torch"]


def test_the_switch_shows_everywhere() -> None:
    facts = examine_elsewhere(TRIMPOT_NATIVE="0")["facts"]
    assert facts["native"] == {"available": False, "why": "TRIMPOT_NATIVE=0 is set", "isa": []}
    assert facts["cpu_gemm"] == {}
    assert {row["backend"] for row in facts["ops"]} == {"torch"}
    assert all("TRIMPOT_NATIVE=0 is set" in row["why"] for row in facts["ops"])
    advice = [p["advice"] for p in facts["problems"] if "native kernels are off" in p["what"]]
    assert advice == ["unset TRIMPOT_NATIVE; it works without"]


def test_rays_token_is_never_shown() -> None:
    secret = "token-that-nobody-may-read"
    answer = examine_elsewhere(
        RAY_AUTH_TOKEN=secret, RAY_AUTH_MODE="token", RAY_ADDRESS="10.0.0.1:6379"
    )
    ray = {"address": "10.0.0.1:6379", "auth_mode": "token", "token": True}
    assert answer["facts"]["ray"] == ray
    assert secret not in json.dumps(answer)


def test_a_missing_token_is_a_problem(facts: dict[str, Any], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none")
    environment = {"RAY_ADDRESS": "a:1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": nowhere}
    ray = doctor.ray_environment(environment)
    assert ray == {"address": "a:1", "auth_mode": "token", "token": False}
    assert "no token is set" in text_of(doctor.find_problems({**facts, "ray": ray}))
    (tmp_path / "none").write_text("t", encoding="utf-8")
    assert doctor.ray_environment(environment)["token"]


def text_of(problems: list[dict[str, str]]) -> str:
    return "; ".join(f"{p['what']}: {p['advice']}" for p in problems)


HEALTHY = {
    "native": {"available": True, "why": "", "isa": []},
    "cpu_gemm": {"fp32": "3e-7", "int16": "1.5e-4"},
    "versions": {"torch": "2.13.0"},
    "gpus": [],
    "disk": {"path": "/data", "free_bytes": 2**40},
    "shared_memory_bytes": 2**34,
    "tools": {"c++": None, "nvcc": None},
    "ray": {"address": None, "auth_mode": None, "token": False},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        (
            {"native": {"available": False, "why": "no compiler", "isa": []}},
            "native kernels are off: no compiler: install a C++ compiler, then trimpot again",
        ),
        (
            {
                "native": {"available": False, "why": "no compiler", "isa": []},
                "tools": {"c++": "/usr/bin/c++"},
            },
            "install trimpot again: the compiler is there now",
        ),
        (
            {"gpus": [{"index": 0}], "versions": {"torch": "2.13.0+cpu"}},
            "torch 2.13.0+cpu can't use the GPUs: install a torch built for CUDA",
        ),
        ({"gpus": [{"index": 0}], "versions": {"torch": "2.13.0+cu130"}}, ""),
        ({"disk": {"path": "/data", "free_bytes": 2**30}}, "1.0 GiB are free in /data"),
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm has 64 MiB"),
        ({"shared_memory_bytes": None}, ""),
    ],
)
def test_problems_and_their_advice(change: dict[str, Any], message: str) -> None:
    text = text_of(doctor.find_problems({**HEALTHY, **change}))
    assert message in text
    assert bool(message) == bool(text)


@pytest.mark.parametrize(
    ("requirement", "version", "what"),
    [
        ("torch>=2.10", "2.13.0+cpu", None),
        ("torch>=2.10", "2.11.0.dev20260101", None),
        ("torch>=2.10", "2.9.1", "torch is 2.9.1, torch>=2.10 is wanted"),
        ("tokenizers", "0.1", None),
        ("tokenizers", None, "tokenizers is missing"),
    ],
)
def test_versions_against_what_is_stated(
    requirement: str, version: str | None, what: str | None
) -> None:
    problems = doctor.check_requirement(Requirement(requirement), version)
    assert [p["what"] for p in problems] == ([what] if what else [])
    assert all(p["advice"] == f"pip install '{requirement}'" for p in problems)


NVIDIA = """\
0, NVIDIA H200, 143771, 570.86.15, 9.0
1, NVIDIA GB10, [N/A], 580.95.05, 12.1
"""
ROCM = {
    "card0": {
        "VRAM Total Memory (B)": "206141652992",
        "Card Series": "AMD Instinct MI300X",
        "GFX Version": "gfx942",
    },
    "system": {"Driver version": "6.10.5"},
}


def test_gpus_of_both_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "nvidia-smi", f"/bin/cat <<'END'\n{NVIDIA}END")
    fake_tool(tmp_path, "rocm-smi", f"echo '{json.dumps(ROCM)}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus, problems = doctor.find_gpus()
    assert problems == []
    assert gpus == [
        gpu(0, "NVIDIA H200", 143771 * 2**20, "570.86.15", "sm_90"),
        gpu(1, "NVIDIA GB10", None, "580.95.05", "sm_121"),
        gpu(0, "AMD Instinct MI300X", 206141652992, "6.10.5", "gfx942"),
    ]


def gpu(index: int, name: str, memory: int | None, driver: str, arch: str) -> dict[str, Any]:
    return {
        "index": index,
        "name": name,
        "memory_bytes": memory,
        "driver": driver,
        "architecture": arch,
    }


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (
            "echo 'NVIDIA-SMI has failed'; exit 9",
            "nvidia-smi fails: exit code 9, NVIDIA-SMI has failed",
        ),
        ("echo 'nonsense, here'", "nvidia-smi fails: unexpected line 'nonsense,here'"),
        ("exec /bin/sleep 30", "nvidia-smi fails: no answer in 0.5 s"),
    ],
)
def test_a_driver_that_fails_is_a_problem_and_no_crash(
    script: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "TOOL_TIMEOUT_S", 0.5)
    begin = time.perf_counter()
    gpus, problems = doctor.find_gpus()
    assert time.perf_counter() - begin < 10
    assert gpus == []
    assert what in problems[0]["what"]
    assert problems[0]["advice"] == "see what `nvidia-smi` says by itself"


def test_rendered_facts_say_it_all(facts: dict[str, Any]) -> None:
    problem = {"what": "[red] is no markup", "advice": "show it as it is"}
    gpus = [gpu(0, "NVIDIA H200", 143771 * 2**20, "570.86.15", "sm_90")]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.render({**facts, "gpus": gpus, "problems": [problem]}))
    text = console.export_text()
    for part in ("NVIDIA H200", "140 GiB", "sm_90", "! [red] is no markup: show it as it is"):
        assert part in text
    for row in facts["ops"]:
        assert row["why"] in text
