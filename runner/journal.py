"""RUN/journal.jsonl: one JSON object a line, written by rank 0 as things happen."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from trimpot.runner.types import Event, StepReport

FILE = "journal.jsonl"


class Journal:
    """Appends to a run's journal. Each line is one write: others may append or tail meanwhile."""

    def __init__(self, run_dir: Path, mend: bool = False):
        """`mend`: end the half line that a killed writer left. For the first to open it only."""
        path = run_dir / FILE
        torn = mend and path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        self.file = path.open("ab", buffering=0)
        if torn:
            self.file.write(b"\n")

    def __call__(self, event: StepReport | Event) -> None:
        if isinstance(event, StepReport):
            values = {"kind": "step", **dataclasses.asdict(event)}
        else:
            values = {"kind": event.kind, **event.values}
        line = json.dumps({"time": time.time(), **values}, default=str)
        self.file.write(line.encode() + b"\n")

    def close(self) -> None:
        self.file.close()
