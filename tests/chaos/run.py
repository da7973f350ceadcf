"""`make chaos`: all tests with that mark, then its figures as one JSON object on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SUMS = ("schedules", "survived", "steps_lost", "crash_states", "corruptions", "silent")
SUMS += ("hostile_inputs", "hostile_effects")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "figures.jsonl")
        environment = {**os.environ, "CHAOS_FIGURES": str(told)}
        command = [sys.executable, "-m", "pytest", "-m", "chaos", str(Path(__file__).parent.parent)]
        code = subprocess.run(
            [*command, *sys.argv[1:]], env=environment, stdout=sys.stderr, check=False
        ).returncode
        lines = told.read_text().splitlines() if told.exists() else []
    sys.stdout.write(json.dumps(figures([json.loads(line) for line in lines])) + "\n")
    return code


def figures(told: list[dict[str, float]]) -> dict[str, float | None]:
    """Sums of what the tests counted, percentiles of `recovery_seconds`; null for what none did."""
    found: dict[str, float | None] = {}
    for name in SUMS:
        values = [line[name] for line in told if name in line]
        found[name] = sum(values) if values else None
    times = sorted(line["recovery_seconds"] for line in told if "recovery_seconds" in line)
    for percent in (50, 95):
        at = -(-len(times) * percent // 100) - 1
        found[f"recovery_seconds_p{percent}"] = times[at] if times else None
    return found


if __name__ == "__main__":
    sys.exit(main())
