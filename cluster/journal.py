"""journal.jsonl: what a run wrote down, one JSON object a line.

Rank 0 of the run writes it, the driver follows it while the run goes on, and the report reads it
afterwards. A writer may be killed in the middle of a line, and a resumed run appends to the same
file; both are normal here. How the values are said to a person stands at the end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.runner.errors import UserError
from trimpot.runner.reading import check_file

NAME = "journal.jsonl"

Event = dict[str, Any]

MAX_TORN = 100
"""Places in a damaged line at which an event is looked for."""
_AHEAD_OF_START = ("phase", "warning")
"""What the driver writes of a session before its rank 0 writes the start."""


@dataclass(frozen=True)
class Session:
    """One start of a run up to its end, or up to where its lines stop."""

    start: Event
    end: Event | None
    seconds: float
    """Wall time: the end's own figure, or first to last line of a session that was killed."""
    steps_redone: int
    """Steps that the session before had done and this one did again."""
    parting: Event | None = None
    """The `failure` that ended it, or the `leave` that its workers were asked to take."""


@dataclass(frozen=True)
class Run:
    """What counts of a journal: each step once, as the last session that did it wrote it."""

    start: Event
    """The last one; {} of an empty journal."""
    steps: tuple[Event, ...]
    evals: tuple[Event, ...]
    samples: tuple[Event, ...]
    checkpoints: tuple[Event, ...]
    warnings: tuple[Event, ...]
    phases: tuple[Event, ...]
    """Start-up of the last session."""
    end: Event | None
    """None while the last session runs, or when it was killed."""
    sessions: tuple[Session, ...]
    failures: tuple[Event, ...] = ()
    """What ended starts of the run, those that came to no step included."""
    bad_steps: tuple[Event, ...] = ()
    """Steps that updated nothing, each as the last session that met it wrote it."""
    corruptions: tuple[Event, ...] = ()
    checks: tuple[Event, ...] = ()
    """Comparisons of the weights that found all well."""
    copied: Event | None = None
    """The newest copy of a checkpoint in an object store."""

    @property
    def seconds(self) -> float:
        return sum(session.seconds for session in self.sessions)

    @property
    def tokens(self) -> int:
        return sum(step["tokens"] for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all steps over the seconds spent in them: no start-up, no evaluation."""
        seconds = sum(step["seconds"] for step in self.steps)
        return self.tokens / seconds if seconds > 0 else None

    @property
    def memory_bytes(self) -> int | None:
        return max((step["memory_bytes"] for step in self.steps), default=None)

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else (self.start.get("resumed_from") or 0)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, loss) in order. An eval line wins over the figure in its step's own line."""
        losses = {
            s["step"]: s["held_out_loss"] for s in self.steps if s.get("held_out_loss") is not None
        }
        losses |= {e["step"]: e["loss"] for e in self.evals}
        return sorted(losses.items())

    @property
    def held_out_before(self) -> float | None:
        if self.end and self.end.get("held_out_before") is not None:
            return self.end["held_out_before"]
        return next((loss for step, loss in self.held_out if step == 0), None)

    @property
    def held_out_after(self) -> float | None:
        """Of the weights as they stand at the end; None when they were not evaluated."""
        if self.end and self.end.get("held_out_after") is not None:
            return self.end["held_out_after"]
        after = [loss for step, loss in self.held_out if step > 0]
        return after[-1] if after else None

    @property
    def name(self) -> str:
        return run_name(self.start)

    @property
    def answers(self) -> list[dict[str, str | None]]:
        """Samples by prompt: {prompt, reference, before, after}, in order of first sight."""
        rows: dict[str, dict[str, str | None]] = {}
        for sample in self.samples:
            row = rows.setdefault(
                sample["prompt"],
                {
                    "prompt": sample["prompt"],
                    "reference": sample.get("reference"),
                    "before": None,
                    "after": None,
                },
            )
            row[sample["when"]] = sample["answer"]
        return list(rows.values())


def read(run_dir: Path) -> list[Event]:
    """Every whole line of the run's journal, superseded ones included; `history` sorts them out.

    A torn line is left out: the last one of a killed writer, or the one a later start follows.
    Any other line that is no event becomes a warning event in its place.
    Raises UserError where there is no journal.
    """
    path = run_dir / NAME
    try:
        check_file(path)
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is not there; give the folder of a run, the output_dir of its run.yaml"
        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    *lines, torn = raw.split(b"\n")
    if (last := _event(torn)) is not None:  # whole, only its newline is missing
        lines.append(json.dumps(last).encode())
    events: list[Event] = []
    damaged: list[Event] = []
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is None:
            if line.strip():
                damaged.append(_damage(f"line {number} of {NAME} is damaged and left out"))
            continue
        if event["kind"] == "start":
            damaged = []  # torn: the writer before was killed
        elif event["kind"] not in _AHEAD_OF_START:
            events += [{**warning, "time": event.get("time", 0)} for warning in damaged]
            damaged = []
        events.append(event)
    return events + damaged


def history(events: Iterable[Event]) -> Run:
    """Fold the lines of all sessions into one run.

    A session that resumed from step k supersedes what was written about later steps; one that
    resumed from nothing supersedes everything but the warnings.
    """
    fold = _Fold()
    for event in events:
        fold.add(event)
    return fold.run()


class _Fold:
    def __init__(self) -> None:
        self.steps: dict[int, Event] = {}
        self.evals: dict[int, Event] = {}
        self.checkpoints: dict[int, Event] = {}
        self.copied: Event | None = None
        self.samples: dict[tuple[str, str], tuple[int, Event]] = {}  # with the step they are of
        self.phases: dict[str, Event] = {}
        self.warnings: list[Event] = []
        self.failures: list[Event] = []
        self.corruptions: list[Event] = []
        self.bad_steps: dict[int, Event] = {}
        self.checks: dict[int, Event] = {}
        self.sessions: list[Session] = []
        self.session: list[Event] = []
        self.steps_redone = 0

    def add(self, event: Event) -> None:
        match event["kind"]:
            case "start":
                self._start(event)
            case "step":
                self.steps[event["step"]] = event
            case "eval":
                self.evals[event["step"]] = event
            case "checkpoint":
                self.checkpoints[event["step"]] = event
            case "copy":
                self.copied = event
            case "sample":
                self.samples[event["when"], event["prompt"]] = (max(self.steps, default=0), event)
            case "phase":
                self.phases[event["name"]] = event
            case "warning" | "straggler":
                self.warnings.append(event)
            case "failure":
                self.failures.append(event)
            case "bad_step":
                self.bad_steps[event["step"]] = event
            case "check":
                self.checks[event["step"]] = event
            case "corruption":
                self.corruptions.append(event)
            case _:  # "end" is found in its session; a newer version's kinds are none of ours
                pass
        self.session.append(event)

    def _start(self, event: Event) -> None:
        # Phases may be written ahead of the start line that they belong to.
        ahead: list[Event] = []
        while self.session and self.session[-1]["kind"] in _AHEAD_OF_START:
            ahead.insert(0, self.session.pop())
        self._close_session()
        self.session = ahead
        self.phases = {e["name"]: e for e in ahead if e["kind"] == "phase"}
        kept_to = event.get("resumed_from")
        kept_to = -1 if kept_to is None else kept_to
        self.steps_redone = max(0, max(self.steps, default=0) - max(kept_to, 0))
        for table in (self.steps, self.evals, self.checkpoints, self.bad_steps, self.checks):
            for step in [step for step in table if step > kept_to]:
                del table[step]
        self.samples = {k: (s, e) for k, (s, e) in self.samples.items() if s <= kept_to}

    def _close_session(self) -> None:
        start = next((e for e in self.session if e["kind"] == "start"), None)
        if start is None:
            return
        end = next((e for e in reversed(self.session) if e["kind"] == "end"), None)
        times = [e["time"] for e in self.session if "time" in e]
        span = times[-1] - times[0] if times else 0.0
        seconds = end["seconds"] if end and end.get("seconds") is not None else span
        told = (e for e in reversed(self.session) if e["kind"] in ("failure", "leave"))
        parting = next(told, None)
        self.sessions.append(Session(start, end, max(0.0, seconds), self.steps_redone, parting))

    def run(self) -> Run:
        self._close_session()
        last = self.sessions[-1] if self.sessions else None
        return Run(
            start=last.start if last else {},
            steps=tuple(self.steps[step] for step in sorted(self.steps)),
            evals=tuple(self.evals[step] for step in sorted(self.evals)),
            samples=tuple(event for _, event in self.samples.values()),
            checkpoints=tuple(self.checkpoints[step] for step in sorted(self.checkpoints)),
            warnings=tuple(self.warnings),
            phases=tuple(self.phases.values()),
            end=last.end if last else None,
            sessions=tuple(self.sessions),
            failures=tuple(self.failures),
            bad_steps=tuple(self.bad_steps[step] for step in sorted(self.bad_steps)),
            corruptions=tuple(self.corruptions),
            checks=tuple(self.checks[step] for step in sorted(self.checks)),
            copied=self.copied,
        )


def whole_bytes(path: Path) -> int:
    """Byte offset behind the last whole line: where to follow a resumed run from. 0 of no file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            while end > 0:
                begin = max(0, end - 65536)
                file.seek(begin)
                newline = file.read(end - begin).rfind(b"\n")
                if newline >= 0:
                    return begin + newline + 1
                end = begin
    except FileNotFoundError:
        pass
    return 0


def follow(
    path: Path, stop: Callable[[], bool], poll_s: float = 0.1, offset: int = 0
) -> Iterator[Event]:
    """Yield the events behind byte `offset` as they are written, never a half line.

    Ends when `stop()` is true and what was written until then is yielded. The file need not be
    there yet. One that shrinks below the offset was started over and is read from its beginning.
    """
    rest = b""
    first = offset > 0
    while True:
        stopping = stop()  # asked before reading: what was written before the stop is drained
        chunk, begin = _read_from(path, offset)
        rest = chunk if begin < offset else rest + chunk
        offset = begin + len(chunk)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            event = _event(line)
            if event is not None:
                yield event
            # Behind the offset may come the other half of a line that a killed writer began.
            elif line.strip() and not first:
                yield _damage(f"a line of {path.name} is damaged and left out")
            first = False
        if stopping:
            return
        if not chunk:
            time.sleep(poll_s)


def _read_from(path: Path, offset: int) -> tuple[bytes, int]:
    """(bytes, where they begin). Opened anew each time: on NFS an open handle sees stale data."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            begin = offset if size >= offset else 0
            file.seek(begin)
            return file.read(), begin
    except FileNotFoundError:
        return b"", offset


def _event(line: bytes) -> Event | None:
    """The event of a line; of one that was appended to a torn line, the last; else None."""
    start = line.find(b"{")
    for _ in range(MAX_TORN):
        if start < 0:
            break
        try:
            event = json.loads(line[start:])
        except (ValueError, RecursionError):
            start = line.find(b'{"', start + 1)
            continue
        return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
    return None


def _damage(text: str) -> Event:
    return {"kind": "warning", "time": time.time(), "text": text}


# How the values are said.


def run_name(start: Event) -> str:
    """The run's name as its config gives it, or its folder's."""
    tracking = (start.get("config") or {}).get("tracking") or {}
    return tracking.get("run_name") or Path(start.get("run_dir") or "run").name


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if math.isfinite(value) else str(value)


def scientific(value: float | None) -> str:
    """2e-04 → 2e-4, with up to two decimals."""
    if value is None or not math.isfinite(value):
        return number(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float | None) -> str:
    """Decimal units, as GPUs and disks are sold."""
    if not n_bytes:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            digits = 1 if n_bytes < 100 * factor else 0
            return f"{n_bytes / factor:.{digits}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def percentage(part: float) -> str:
    """Rounded down, so that 100 % is all of it."""
    return "100 %" if part >= 1 else f"{math.floor(1000 * part) / 10:.1f} %"


def bad_step(event: Event) -> str:
    """What was wrong with a step, of which samples, and what followed."""
    shown = ", ".join(map(str, sorted(event["samples"])[:8]))
    more = f" and {len(event['samples']) - 8:,} more" if len(event["samples"]) > 8 else ""
    then = {
        "skip": "it updated nothing",
        "rewind": f"back to the weights of step {event['to']}, and on with the next samples",
        "stop": "the run stops",
    }
    return f"{event['why']} (samples {shown}{more}): {then.get(event['action'], event['action'])}"


def packing(fill: dict[str, Any]) -> str:
    """What became of a run's samples, packed: how many rows, how full, and the least there can be.

    `fill`: as in the `start` event.
    """
    rows, least = fill["rows"], fill["least_rows"]
    best = "the fewest there can be" if rows == least else f"at least {least:,} are needed"
    return (
        f"{fill['documents']:,} samples in {rows:,} rows of {fill['row_tokens']:,} tokens, "
        f"{percentage(fill['row_share'])} full ({best})"
    )


def change(before: float | None, after: float | None) -> str:
    """'31.0 % lower'; empty where there is nothing to compare."""
    if not before or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    percent = 100 * (after - before) / abs(before)
    if abs(percent) < 0.05:
        return "unchanged"
    return f"{abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}"
