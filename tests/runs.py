"""Makes runs for tests: a config over the tiny model, prepared as the driver would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from trimpot.cluster.prepare import prepare_run
from trimpot.runner.config import Config, check_config
from trimpot.runner.plan.plan import plan_to_json
from trimpot.runner.types import Fleet, Plan

HERE = Path(__file__).parent
FLEET = Fleet(memory_bytes=4 << 30)


def settings(model: Path, data: Path, out: Path, /, **sections: Any) -> dict[str, Any]:
    """A run.yaml's content: fp32, LoRA, no samples; `sections` update it key by key."""
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "precision": "fp32",
        "output_dir": str(out),
        "adapter": {"lora_rank": 4, "lora_alpha": 8},
        "data": {"train": str(data), "max_length": 96},
        "optim": {"batch_size": 8, "max_steps": 20, "learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every_steps": 1000},
        "samples": {"prompts": 0},
    }
    for section, update in sections.items():
        if isinstance(update, dict) and isinstance(values.get(section, {}), dict):
            values[section] = {**values.get(section, {}), **update}
        else:
            values[section] = update
    return {key: value for key, value in values.items() if value is not None}


def config(*args: Any, **sections: Any) -> Config:
    return check_config(settings(*args, **sections), "test")


def prepared(checked: Config, fresh: bool = True, **changes: Any) -> Plan:
    """The plan of a config, its run directory made; `changes` replace fields of the plan."""
    plan = prepare_run(checked, FLEET, fresh).plan.replace(**changes)
    Path(plan.run_dir, "plan.json").write_text(plan_to_json(plan))
    return plan


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def torchrun(world_size: int, *arguments: str | Path, timeout: float = 600) -> None:
    """Run a script under torchrun, one thread a worker. Raises with its output where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONFAULTHANDLER"] = "1"  # an abort leaves its stacks
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_arrangements(
    world_size: int,
    plans: list[Plan],
    folder: Path,
    stops: list[int | None] | None = None,
    timeout: float = 600,
) -> list[list[float]]:
    """Losses of each plan's steps, all run in one process group of `world_size` workers.

    `stops`: after which step each is interrupted, to go on in a second start. `timeout`: seconds.
    """
    result = folder / f"losses-{world_size}.json"
    names = [
        f"{plan.run_dir}/plan.json" + (f"@{stop}" if stop else "")
        for plan, stop in zip(plans, stops or [None] * len(plans), strict=True)
    ]
    torchrun(world_size, HERE / "arrangements.py", result, *names, timeout=timeout)
    losses = json.loads(result.read_text())
    return [losses[name] for name in names]
