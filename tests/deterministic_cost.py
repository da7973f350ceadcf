"""What `deterministic: true` costs: `python tests/deterministic_cost.py MODEL DATA.jsonl [k=v …]`.

Runs a config with and without it, in turn, under torchrun in a network namespace of its own (root),
whose loopback counts the bytes. The last line is one JSON object: median seconds of a step, and
bytes that one worker sends per step, measured and by formula. Settings: workers, batch_size,
micro_batch_size, precision, lora_rank, steps, rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import config, prepared

from trimpot.runner.plan.plan import for_workers, plan_to_json

SETTINGS: dict[str, Any] = {
    "workers": 2, "batch_size": 16, "micro_batch_size": 2, "precision": "fp32", "lora_rank": 16,
    "steps": 8, "rounds": 3,
}  # fmt: skip
SHORT = 2
"""Steps of the run whose bytes are taken off: weights are sent at the start, too."""
INSIDE = 'ip link set lo up && "$@" >/dev/null && grep lo: /proc/net/dev'  # received, …, sent, …


def measured(folder: Path, given: dict[str, Any], steps: int, deterministic: bool) -> tuple:
    """(seconds of each step after the first two, bytes over loopback, trained parameters)"""
    model, data = folder / "model", folder / "data.jsonl"
    checked = config(
        model,
        data,
        folder / f"run-{steps}-{deterministic}",
        deterministic=deterministic,
        precision=given["precision"],
        adapter={"lora_rank": given["lora_rank"], "lora_alpha": 2 * given["lora_rank"]},
        data={"max_length": 512},
        optim={key: given[key] for key in ("batch_size", "micro_batch_size")}
        | {"max_steps": steps, "warmup_steps": 0},
        fleet={"zero_stage": 0},
        evaluation={"max_samples": 1},
    )
    plan = for_workers(prepared(checked), given["workers"])
    path = Path(plan.run_dir, "plan.json")
    path.write_text(plan_to_json(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={given['workers']}", "-m", "trimpot.runner.worker", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", INSIDE, "sh", *command],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    sent = int(done.stdout.split(":")[1].split()[8])
    lines = (Path(plan.run_dir) / "journal.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    seconds = [e["seconds"] for e in events if e["kind"] == "step"][2:]
    start = next(e for e in events if e["kind"] == "start")
    return seconds, sent, start["trainable_parameters"]


def main() -> None:
    model, data, *rest = sys.argv[1:]
    given = dict(SETTINGS)
    for key, value in (text.split("=") for text in rest):
        given[key] = type(SETTINGS[key])(value)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    found: dict[str, Any] = {"settings": given}
    workers, item = given["workers"], 2 if given["precision"] == "bf16" else 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").symlink_to(Path(model).resolve())
        (folder / "data.jsonl").symlink_to(Path(data).resolve())
        for _ in range(given["rounds"]):
            for kind in (False, True):
                seconds[kind] += measured(folder, given, given["steps"], kind)[0]
        accumulated = -(-given["batch_size"] // given["micro_batch_size"] // workers)
        for kind, per_parameter in ((False, 2 * item), (True, accumulated * item + 4)):
            few = measured(folder, given, SHORT, kind)
            _, sent, trained = measured(folder, given, given["steps"], kind)
            found["deterministic" if kind else "plain"] = {
                "step_seconds": statistics.median(seconds[kind]),
                "sent_bytes": (sent - few[1]) / (given["steps"] - SHORT) / workers,
                "sent_bytes_by_formula": (workers - 1) / workers * trained * per_parameter,
            }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
