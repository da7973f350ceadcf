"""`trimpot bench launch`: what Ray costs, paired with torchrun of the same worker in one run."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimpot.cluster import journal as journals
from trimpot.runner.errors import TrainError

SKIPPED_STEPS = 3
"""Steps at the start that are not counted: allocators and caches warm up in them."""


@dataclass(frozen=True)
class Start:
    """One start of a run. Seconds from the command to the end of the first step, by phase."""

    to_first_step_s: float
    phases: dict[str, float]
    steps_s: list[float]


def bench_launch(
    model: Path, data: Path, workers: int, steps: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the same worker under Ray and under torchrun in turn → ratios, with their spread."""
    ours: list[Start] = []
    bare: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="trimpot-bench-") as folder:
        for repeat in range(repeats):
            run = Path(folder) / f"run-{repeat}"
            config = run_config(run, model, data, workers, steps, steps)
            ours.append(_under_ray(config))
            bare.append(_under_torchrun(config, workers))
            say(
                f"{repeat + 1}/{repeats}: to the first step "
                f"{ours[-1].to_first_step_s:.1f} s under Ray, "
                f"{bare[-1].to_first_step_s:.1f} s under torchrun; median step "
                f"{_median(ours[-1]) * 1e3:.1f} and {_median(bare[-1]) * 1e3:.1f} ms"
            )
    result = {
        "workers": workers,
        "steps": steps,
        "repeats": repeats,
        "step_ratio": ratios([_median(a) / _median(b) for a, b in zip(ours, bare, strict=True)]),
        "start_ratio": ratios(
            [a.to_first_step_s / b.to_first_step_s for a, b in zip(ours, bare, strict=True)]
        ),
        "start_share": _shares(ours),
        "torchrun_start_share": _shares(bare),
    }
    _tell(result, say)
    return result


def _median(start: Start) -> float:
    return statistics.median(start.steps_s[SKIPPED_STEPS:])


def ratios(values: list[float], digits: int = 4) -> dict[str, float]:
    names = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in names.items()}


def _shares(starts: list[Start]) -> dict[str, float]:
    """Median share of each phase in the time to the first step; what no phase names is `other`."""
    names = list(dict.fromkeys(name for start in starts for name in start.phases))
    shares = {
        name: statistics.median(s.phases.get(name, 0.0) / s.to_first_step_s for s in starts)
        for name in names
    }
    return {n: round(v, 3) for n, v in (shares | {"other": 1 - sum(shares.values())}).items()}


def _tell(result: dict[str, Any], say: Callable[[str], None]) -> None:
    for name, what in (("step_ratio", "step time"), ("start_ratio", "time to the first step")):
        ratio = result[name]
        say(
            f"{what}, Ray over torchrun: median {ratio['median']:.3f} "
            f"({ratio['low']:.3f} … {ratio['high']:.3f})"
        )
    for name, where in (("start_share", "Ray"), ("torchrun_start_share", "torchrun")):
        shares = ", ".join(f"{k} {v:.0%}" for k, v in result[name].items())
        say(f"start under {where}: {shares}")


def run_config(
    run: Path, model: Path, data: Path, workers: int, steps: int, every_steps: int | str
) -> Path:
    """A config of a small run beside its folder `run`; a checkpoint `every_steps`."""
    values = {
        "model": {"path": str(model.resolve())},
        "precision": "fp32",
        "output_dir": str(run),
        "data": {"train": str(data.resolve()), "eval_fraction": 0, "max_length": 256},
        "optim": {"batch_size": 4 * workers, "max_steps": steps},
        "fleet": {"workers": workers, "zero_stage": 2},
        "checkpoint": {"every_steps": every_steps},
        "samples": {"prompts": 0},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _under_ray(config: Path) -> Start:
    started = time.time()
    train(config)
    return _read(config.with_suffix(""), started)


def train(config: Path) -> None:
    """`trimpot train` of it, on a Ray of its own. Raises TrainError."""
    _run([sys.executable, "-m", "trimpot.cluster.cli", "train", str(config)])


def _under_torchrun(config: Path, workers: int) -> Start:
    """The plan that the run under Ray left, from its beginning, under torchrun."""
    run = config.with_suffix("")
    shutil.rmtree(run / "checkpoints")
    (run / "journal.jsonl").unlink()
    started = time.time()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={workers}", "-m", "trimpot.runner.worker"]
    _run([*launcher, str(run / "plan.json")])
    return _read(run, started)


def _run(command: list[str]) -> None:
    # Ray gives a worker of one CPU one thread; torchrun's workers get the same.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise TrainError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else 'silently'}")


def _read(run: Path, started: float) -> Start:
    events = journals.read(run)
    steps = [event for event in events if event["kind"] == "step"]
    phases = {e["name"]: e["seconds"] for e in events if e["kind"] == "phase"}
    return Start(steps[0]["time"] - started, phases, [step["seconds"] for step in steps])
