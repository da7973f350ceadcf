"""What this machine has for trimpot, and what is amiss: `trimpot doctor`.

Imports neither torch nor ray nor transformers: versions come from the installed metadata, GPUs
from their drivers' own tools.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimpot.kernels import dispatch, native

Facts = dict[str, Any]
Problem = dict[str, str]

GIB = 2**30
TOOL_TIMEOUT_S = 10.0
"""nvidia-smi takes seconds where the driver has to wake up first."""

WATCHED = ("peft", "triton", "tensorboardX", "mlflow-skinny", "wandb", "trackio", "gguf")
"""Versions shown besides those of our own requirements."""

LOW_DISK_BYTES = 5 * GIB
LOW_SHARED_BYTES = GIB
"""Ray keeps its object store in /dev/shm; containers often get 64 MB of it."""


def examine() -> Facts:
    """Facts for `--json`; every `problem` has what is and the advice. Well under half a second
    where no GPU driver has to be asked."""
    gpus, gpu_problems = find_gpus()
    versions, version_problems = read_versions()
    state = native.state()
    facts: Facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(state),
        "memory_bytes": _memory_bytes(),
        "disk": {"path": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "shared_memory_bytes": _shared_memory_bytes(),
        "gpus": gpus,
        "versions": versions,
        "native": {
            "available": state.available,
            "why": state.why,
            "isa": list(state.hash_variants),
        },
        "ops": [
            {"op": c.op, "backend": c.backend, "why": c.why}
            for c in dispatch.table("cuda" if gpus else "cpu")
        ],
        "cpu_gemm": dispatch.arithmetics(),
        "tools": {"c++": _compiler(), "nvcc": shutil.which("nvcc")},
        "ray": ray_environment(os.environ),
        "hf_offline": _truthy(os.environ.get("HF_HUB_OFFLINE")),
    }
    facts["problems"] = [*version_problems, *gpu_problems, *find_problems(facts)]
    return facts


def find_problems(facts: Mapping[str, Any]) -> list[Problem]:
    """What the facts say is amiss. Pure."""
    problems: list[Problem] = []

    def add(what: str, advice: str) -> None:
        problems.append({"what": what, "advice": advice})

    if not facts["native"]["available"]:
        advice = "unset TRIMPOT_NATIVE"
        if "TRIMPOT_NATIVE" not in facts["native"]["why"]:
            lacks_compiler = facts["tools"]["c++"] is None
            advice = (
                "install a C++ compiler, then trimpot again"
                if lacks_compiler
                else ("install trimpot again: the compiler is there now")
            )
        add(f"native kernels are off: {facts['native']['why']}", advice + "; it works without")
    torch = facts["versions"].get("torch")
    if facts["gpus"] and torch and torch.endswith("+cpu"):
        add(f"torch {torch} can't use the GPUs", "install a torch built for CUDA or ROCm")
    if (free := facts["disk"]["free_bytes"]) < LOW_DISK_BYTES:
        add(
            f"{free / GIB:.1f} GiB are free in {facts['disk']['path']}",
            "checkpoints need room: free some, or set output_dir elsewhere",
        )
    shared = facts["shared_memory_bytes"]
    if shared is not None and shared < LOW_SHARED_BYTES:
        add(
            f"/dev/shm has {shared / 2**20:.0f} MiB, Ray's object store falls back to disk",
            "give the container more, such as --shm-size=2g",
        )
    ray = facts["ray"]
    if ray["address"] and ray["auth_mode"] == "token" and not ray["token"]:
        add(
            "RAY_AUTH_MODE is token, but no token is set",
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's",
        )
    return problems


def _cpu(state: native.State) -> Facts:
    return {
        "model": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "usable_cores": _usable_cores(),
        "isa": list(state.cpu_features),
    }


def _cpu_model() -> str:
    if (path := Path("/proc/cpuinfo")).is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":  # Arm has no such line
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> float:
    """Cores this process may keep busy: its affinity, and the container's share of time."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    limit = _cgroup("cpu.max").split()  # "quota period" in microseconds, or "max period"
    if len(limit) == 2 and limit[0].isdigit():
        cores = min(cores, int(limit[0]) / int(limit[1]))
    return cores


def _memory_bytes() -> int:
    """Host memory, or the container's part of it."""
    limit = _cgroup("memory.max")
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


def _cgroup(name: str) -> str:
    """A limit of the container's control group, version 2; empty where there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _shared_memory_bytes() -> int | None:
    path = Path("/dev/shm")
    return shutil.disk_usage(path).total if path.is_dir() else None


def _compiler() -> str | None:
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def find_gpus() -> tuple[list[Facts], list[Problem]]:
    """GPUs as their drivers' tools list them: index, name, memory_bytes, driver."""
    gpus: list[Facts] = []
    problems: list[Problem] = []
    for tool, arguments, parse in (
        ("nvidia-smi", NVIDIA_QUERY, parse_nvidia),
        ("rocm-smi", ROCM_QUERY, parse_rocm),
    ):
        if (path := shutil.which(tool)) is None:
            continue
        try:
            gpus += parse(_run([path, *arguments]))
        except subprocess.TimeoutExpired:
            what = f"no answer in {TOOL_TIMEOUT_S:g} s"
        except (OSError, ValueError, KeyError) as error:
            what = " ".join(str(error).split())
        else:
            continue
        advice = f"see what `{tool}` says by itself"
        problems.append({"what": f"{tool} fails: {what}", "advice": advice})
    return gpus, problems


NVIDIA_QUERY = (
    "--query-gpu=index,name,memory.total,driver_version,compute_cap",
    "--format=csv,noheader,nounits",
)
ROCM_QUERY = ("--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).partition("\n")[0]
        raise ValueError(f"exit code {done.returncode}, {said or 'no word why'}")
    return done.stdout


def parse_nvidia(text: str) -> list[Facts]:
    """Lines of `nvidia-smi` with NVIDIA_QUERY; memory is in MiB."""
    gpus: list[Facts] = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if not row:
            continue
        if len(row) != 5:
            raise ValueError(f"unexpected line {','.join(row)!r}")
        index, name, memory, driver, capability = row
        # A GPU that shares the host's memory, and a MIG parent, say [N/A].
        memory_bytes = int(memory) * 2**20 if memory.isdigit() else None
        gpus.append(
            {
                "index": int(index),
                "name": name,
                "memory_bytes": memory_bytes,
                "driver": driver,
                "architecture": f"sm_{capability.replace('.', '')}",
            }
        )
    return gpus


def parse_rocm(text: str) -> list[Facts]:
    """JSON of `rocm-smi` with ROCM_QUERY: cards by name, and one entry for the system."""
    read: dict[str, dict[str, str]] = json.loads(text)
    driver = read.get("system", {}).get("Driver version", "unknown")
    cards = [(name, card) for name, card in read.items() if name.startswith("card")]
    return [
        {
            "index": int(name.removeprefix("card")),
            "name": card.get("Card Series") or card.get("Card series") or "AMD GPU",
            "memory_bytes": int(card["VRAM Total Memory (B)"]),
            "driver": driver,
            "architecture": card.get("GFX Version"),
        }
        for name, card in cards
    ]


def read_versions() -> tuple[dict[str, str | None], list[Problem]]:
    """Installed versions of what trimpot needs or can use, against what it states to need."""
    problems: list[Problem] = []
    try:
        stated = importlib.metadata.requires("trimpot") or []
    except importlib.metadata.PackageNotFoundError:
        stated = []
        problems.append(
            {
                "what": "trimpot runs from its sources and is not installed",
                "advice": "pip install . so that versions can be checked",
            }
        )
    needed = [r for r in map(Requirement, stated) if r.marker is None or r.marker.evaluate()]
    names = ("trimpot", "torch", "ray", "deepspeed", "transformers", *(r.name for r in needed))
    versions = {name: _version(name) for name in dict.fromkeys((*names, *WATCHED))}
    for requirement in needed:
        problems += check_requirement(requirement, versions[requirement.name])
    return versions, problems


def check_requirement(requirement: Requirement, version: str | None) -> list[Problem]:
    wanted = f"{requirement.name}{requirement.specifier}"
    advice = f"pip install '{wanted}'"
    if version is None:
        return [{"what": f"{requirement.name} is missing", "advice": advice}]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    return [{"what": f"{requirement.name} is {version}, {wanted} is wanted", "advice": advice}]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def ray_environment(environment: Mapping[str, str]) -> Facts:
    """What tells Ray where its cluster is and how to prove who asks. Never the token itself."""
    token_file = environment.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    return {
        "address": environment.get("RAY_ADDRESS"),
        "auth_mode": environment.get("RAY_AUTH_MODE"),
        "token": bool(environment.get("RAY_AUTH_TOKEN")) or Path(token_file).is_file(),
    }


def _truthy(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "on")


def render(facts: Mapping[str, Any]) -> RenderableType:
    """The facts as tables, the problems last."""
    return Group(_machine(facts), _gpu_table(facts), _op_table(facts), _problem_list(facts))


def _machine(facts: Mapping[str, Any]) -> Table:
    cpu, state = facts["cpu"], facts["native"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "python": f"{facts['python']} ({sys.executable})",
        "platform": facts["platform"],
        "cpu": f"{cpu['model']}, {cpu['cores']} cores, {cpu['usable_cores']:g} usable",
        "isa": " ".join(cpu["isa"]) or "not known without the native extension",
        "memory": f"{facts['memory_bytes'] / GIB:.1f} GiB",
        "disk": f"{facts['disk']['free_bytes'] / GIB:.1f} GiB free in {facts['disk']['path']}",
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v),
        "cpu_gemm": ", ".join(f"{n} errs by {e}" for n, e in facts["cpu_gemm"].items())
        or "torch's",
        "native": ("yes: " if state["available"] else "no: ") + state["why"],
        "tools": ", ".join(f"{k}: {v or 'none'}" for k, v in facts["tools"].items()),
        "ray": _ray_line(facts["ray"]),
        "hub": "offline" if facts["hf_offline"] else "online",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _ray_line(ray: Mapping[str, Any]) -> str:
    where = ray["address"] or "starts inside the process"
    token = "a token is set" if ray["token"] else "no token is set"
    return f"{where}; authentication {ray['auth_mode'] or 'by default'}, {token}"


def _gpu_table(facts: Mapping[str, Any]) -> RenderableType:
    if not facts["gpus"]:
        return Text("\nno GPU found")
    table = Table("gpu", "name", "memory", "architecture", "driver", box=None)
    for gpu in facts["gpus"]:
        memory = f"{gpu['memory_bytes'] / GIB:.0f} GiB" if gpu["memory_bytes"] else "shared"
        cells = (str(gpu["index"]), gpu["name"], memory, gpu["architecture"] or "", gpu["driver"])
        table.add_row(*map(Text, cells))
    return table


def _op_table(facts: Mapping[str, Any]) -> Table:
    table = Table("op", "backend", "why", box=None, title_justify="left")
    for row in facts["ops"]:
        table.add_row(*(Text(row[key]) for key in ("op", "backend", "why")))
    return table


def _problem_list(facts: Mapping[str, Any]) -> Text:
    if not facts["problems"]:
        return Text("\nno problem found", style="green")
    lines = [f"{p['what']}: {p['advice']}" for p in facts["problems"]]
    return Text("\n" + "\n".join(f"! {line}" for line in lines), style="yellow")
