"""RUN/journal.jsonl: one JSON object a line, written by rank 0 as things happen."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

from trimpot.runner.redact import redacted
from trimpot.runner.types import Event, StepReport

FILE = "journal.jsonl"
log = logging.getLogger(__name__)


class Journal:
    """Appends to a run's journal. Each line is one write: others may append or tail meanwhile."""

    def __init__(self, run_dir: Path, mend: bool = False):
        """`mend`: end the half line that a killed writer left. For the first to open it only."""
        path = run_dir / FILE
        torn = mend and path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        self.path, self.lost = path, 0
        self.file = path.open("ab", buffering=0)
        if torn:
            self.file.write(b"\n")

    def __call__(self, event: StepReport | Event) -> None:
        if isinstance(event, StepReport):
            values = {"kind": "step", **dataclasses.asdict(event)}
        else:
            values = {"kind": event.kind, **event.values}
        line = json.dumps(redacted({"time": time.time(), **values}), default=str)
        if self.lost:  # the first newline ends what may stand there of the line that failed
            text = f"{self.lost} lines were lost here: {self.path} could not be written"
            warning = {"time": time.time(), "kind": "warning", "text": text}
            line = f"\n{json.dumps(warning)}\n{line}"
        self._write(line.encode() + b"\n")

    def _write(self, raw: bytes) -> None:
        """A run is worth more than its journal: where it can't be written, the run goes on."""
        try:
            why = "" if self.file.write(raw) == len(raw) else "no room for a whole line"
        except OSError as error:
            why = error.strerror or str(error)
        if why and not self.lost:
            log.warning("%s can't be written: %s; the run goes on", self.path, why)
        self.lost = self.lost + 1 if why else 0

    def close(self) -> None:
        self.file.close()
