"""What a person sees while a run goes on: a live panel in a terminal, plain lines anywhere else.

Everything that comes out of a run (names, paths, prompts, answers) is stripped of control
characters before it is printed: a model's answer must not be able to move the cursor.
"""

from __future__ import annotations

import itertools
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trimpot.cluster.journal import (
    Event,
    bad_step,
    change,
    duration,
    history,
    number,
    packing,
    percentage,
    run_name,
    scientific,
    size,
)

PLAIN_STEP_S = 5.0
"""Least seconds between two plain lines about steps: an hour's log is 720 lines."""
WINDOW = 32
"""Steps over which speed and time left are averaged."""
_BARS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans({"→": "->", "×": "x", "·": "-", "–": "-", "…": "...", "“": '"', "”": '"'})


class Display:
    """Shows a run's events. A context manager: the summary is printed when it is left.

    The report is named in the summary if it is written by then.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.clock = clock
        self._run = _Progress()
        self._lock = threading.Lock()  # Live draws in a thread of its own
        self._last_line_at = float("-inf")
        self._unicode = self.console.encoding.lower().startswith("utf")
        lively = self.console.is_terminal and not self.console.is_dumb_terminal and self._unicode
        self._live = (
            Live(console=self.console, get_renderable=self._panel, refresh_per_second=4)
            if lively
            else None
        )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        if self._run.end:
            self._summary()

    def handle(self, event: Event) -> None:
        """Take one event of the journal. Kinds that are not known are passed over."""
        with self._lock:
            self._run.add(event, self.clock())
        if event["kind"] in ("warning", "straggler"):
            self._print(Text(f"warning: {clean(event['text'])}", style="yellow"))
        elif event["kind"] == "fetch":
            text = f"the checkpoint of step {event['step']} is from {event['url']}"
            self._print(Text(clean(f"{text} ({duration(event['seconds'])})")))
        elif event["kind"] in ("failure", "leave", "hang"):
            self._print(Text(clean(_parting(event)), style="yellow"))
        elif event["kind"] == "bad_step":
            self._print(Text(clean(bad_step(event)), style="yellow"))
        elif event["kind"] == "corruption":
            self._print(Text(clean(event["text"]), style="bold red"))
        elif self._live is None and (line := self._plain(event)):
            self._print(Text(line))

    def say(self, text: str) -> None:
        """Print a line, above the panel where there is one."""
        self._print(Text(clean(text)))

    def _panel(self) -> RenderableType:
        with self._lock:
            return _panel(self._run, self.clock(), self.console.width)

    def _print(self, text: Text) -> None:
        if not self._unicode:
            plain = text.plain.translate(_ASCII)
            encoding = self.console.encoding
            text = Text(plain.encode(encoding, "replace").decode(encoding), style=text.style)
        # One event stays one line in a log file; a terminal wraps by itself.
        self.console.print(text, soft_wrap=True)

    def _plain(self, event: Event) -> str | None:
        run = self._run
        match event["kind"]:
            case "start":
                return "\n".join(run.headings())
            case "phase":
                return f"start-up: {clean(event['name'])} {duration(event['seconds'])}"
            case "eval":
                when = f"after step {event['step']}" if event["step"] else "before training"
                return f"held-out loss {number(event['loss'], 4)} {when}"
            case "checkpoint":
                where, took = clean(event["path"]), duration(event["seconds"])
                return f"checkpoint of step {event['step']} in {where} ({took})"
            case "copy":
                where, took = clean(event["url"]), duration(event["seconds"])
                return f"checkpoint of step {event['step']} copied to {where} ({took})"
            case "sample":
                prompt, answer = (brief(event[key], 100) for key in ("prompt", "answer"))
                return f"sample {clean(event['when'])} training: {prompt} → {answer}"
            case "step":
                last = event["step"] == run.total_steps
                if not last and self.clock() - self._last_line_at < PLAIN_STEP_S:
                    return None
                self._last_line_at = self.clock()
                return run.step_line(self.clock())
            case _:
                return None

    def _summary(self) -> None:
        run, end = self._run, self._run.end or {}
        style = {"done": "bold green", "failed": "bold red"}.get(end["status"], "bold yellow")
        self._print(Text(""))
        self._print(Text(_outcome(run, end), style=style))
        before, after = end.get("held_out_before"), end.get("held_out_after")
        if after is not None:
            compared = f" ({change(before, after)})" if change(before, after) else ""
            text = f"held-out loss {number(before)} → {number(after)}{compared}"
            self._print(Text(text, style="bold"))
        for answer in history(run.samples).answers:
            self._print(Text(""))
            self._print(Text(self._filled(brief(answer["prompt"], 300), 0), style="bold"))
            for label in ("before", "after", "reference"):
                if answer[label] is not None:
                    self._print(Text(f"  {label}", style="dim"))
                    self._print(Text(self._filled(brief(answer[label], 600) or "(empty)", 4)))
        report = Path(run.start.get("run_dir") or ".") / "report.html"
        places = {"adapter": end.get("adapter"), "report": report if report.is_file() else None}
        if any(places.values()):
            self._print(Text(""))
        for label, path in places.items():
            if path:
                self._print(Text(f"{label:<9}{clean(str(path))}"))

    def _filled(self, text: str, indent: int) -> str:
        width = max(20, min(self.console.width, 100) - 1)
        return textwrap.fill(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * indent
        )


class _Progress:
    """Where the run stands, of its events so far."""

    def __init__(self) -> None:
        self.start: Event = {}
        self.end: Event | None = None
        self.step: Event | None = None
        self.samples: list[Event] = []
        self.phases: list[Event] = []
        self.evals: list[tuple[int, float]] = []
        self.checkpoint: int | None = None
        self.copied: int | None = None
        self.losses = Trend()
        self._recent: deque[tuple[float, Event]] = deque(maxlen=WINDOW)

    def add(self, event: Event, now: float) -> None:
        match event["kind"]:
            case "start":
                self.start, self.end = event, None
                self._recent.clear()
            case "phase":
                self.phases.append(event)
            case "sample":
                self.samples.append(event)
            case "eval":
                self._evaluated(event["step"], event["loss"])
            case "checkpoint":
                self.checkpoint = event["step"]
            case "copy":
                self.copied = event["step"]
            case "step":
                self.step = event
                self.losses.add(event["loss"])
                self._recent.append((now, event))
                if event.get("held_out_loss") is not None:
                    self._evaluated(event["step"], event["held_out_loss"])
                if event.get("checkpoint"):
                    self.checkpoint = event["step"]
            case "end":
                self.end = event
            case _:
                pass

    def _evaluated(self, step: int, loss: float) -> None:
        if (step, loss) not in self.evals:
            self.evals.append((step, loss))

    @property
    def total_steps(self) -> int:
        return self.start.get("total_steps") or 0

    @property
    def done_steps(self) -> int:
        return self.step["step"] if self.step else (self.start.get("resumed_from") or 0)

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(step["seconds"] for _, step in self._recent)
        return sum(s["tokens"] for _, s in self._recent) / seconds if seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """From when the last steps arrived, so that evaluations and checkpoints count too."""
        if not self._recent or not self.total_steps:
            return None
        (first_at, first), (last_at, last) = self._recent[0], self._recent[-1]
        done = last["step"] - first["step"]
        per_step = (last_at - first_at) / done if done > 0 else last["seconds"]
        return max(0.0, per_step * (self.total_steps - last["step"]) - (now - last_at))

    def headings(self) -> list[str]:
        s = self.start
        model = ((s.get("config") or {}).get("model") or {}).get("path") or ""
        what = [run_name(s), Path(model).name, str(s.get("method", ""))]
        workers, micro, accumulated = (
            s.get(key, 1)
            for key in ("world_size", "micro_batch_size", "gradient_accumulation_steps")
        )
        split = s.get("sequence_parallel_size", 1)
        who = f"{workers} worker{'s' * (workers != 1)}"
        if split > 1:
            who += f", {split} to a row: {workers // split}"
        full = workers // split * micro * accumulated
        batch = s.get("batch_size", full)
        rounds = accumulated if batch == full else f"up to {accumulated}"  # some idle in the last
        how = [
            f"{who} × {micro} × {rounds} = {batch} samples a step",
            f"ZeRO {s.get('zero_stage', 0)}",
            str(s.get("precision", "")),
        ]
        if s.get("resumed_from") is not None:
            how.append(f"resumed from step {s['resumed_from']}")
        lines = [what, how]
        if fill := s.get("fill"):
            packed = ((s.get("config") or {}).get("data") or {}).get("packing")
            lines.append([packing(fill)] if packed else [])
            lines[-1].append(f"{percentage(fill['computed_share'])} of computed tokens are real")
        return [clean(" · ".join(part for part in parts if part)) for parts in lines]

    def step_line(self, now: float) -> str:
        step = self.step or {}
        speed, left = self.tokens_per_second, self.seconds_left(now)
        return "  ".join(
            [
                f"step {step['step']}/{self.total_steps or '?'}",
                f"loss {number(step['loss'], 4)}",
                f"lr {scientific(step['learning_rate'])}",
                f"gradient {number(step['grad_norm'])}",
                f"{number(speed, 0)} tokens/s",
                size(step["memory_bytes"]),
            ]
            + ([f"{duration(left)} left"] if left else [])
            + ([] if step.get("health", "ok") == "ok" else [clean(step["health"])])
        )


class Trend:
    """The course of a number in bounded memory: when full, neighbours are averaged in pairs."""

    def __init__(self, room: int = 512) -> None:
        self._room = room
        self._each = 1  # how many numbers one entry stands for
        self._means: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        if value != value or value in (float("inf"), float("-inf")):
            return
        self._pending.append(value)
        if len(self._pending) == self._each:
            self._means.append(sum(self._pending) / self._each)
            self._pending = []
        if len(self._means) == self._room:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._each *= 2

    def sparkline(self, width: int) -> str:
        """The whole course in at most `width` bars; empty while there is no course to see."""
        means = self._means
        if len(means) < 2 or width < 2:
            return ""
        width = min(width, len(means))
        edges = [round(i * len(means) / width) for i in range(width + 1)]
        parts = [means[a:b] for a, b in itertools.pairwise(edges)]
        values = [sum(part) / len(part) for part in parts]
        low, high = min(values), max(values)
        spread = (high - low) or 1.0
        return "".join(_BARS[round(7 * (value - low) / spread)] for value in values)


def _parting(event: Event) -> str:
    """Why a start of the run ended, and what follows."""
    if event["kind"] == "hang":
        return event["text"]
    if event["kind"] == "leave":
        return f"{event['text']}: saving after this step, then starting again"
    text = f"{event['verdict']} after step {event['step']}: {event['text']}; {event['why']}"
    return text if event["restart"] else f"{text}; {event['advice']}"


def _panel(run: _Progress, now: float, width: int) -> RenderableType:
    if not run.start:
        phases = ", ".join(f"{clean(p['name'])} {duration(p['seconds'])}" for p in run.phases)
        return _line(f"starting: {phases or '…'}")
    name, *rest = run.headings()
    parts: list[RenderableType] = [_line(name, "bold"), *(_line(text, "dim") for text in rest)]
    parts.append(_bar(run, now))
    if run.step is None:
        phases = ", ".join(f"{clean(p['name'])} {duration(p['seconds'])}" for p in run.phases)
        parts.append(_line(f"starting: {phases or '…'}", "dim"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for label, value in _figures(run, width):
        grid.add_row(label, value)
    return Group(*parts, grid)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _bar(run: _Progress, now: float) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    left = run.seconds_left(now)
    state = f"{run.done_steps:,} of {run.total_steps or '?'} steps"
    if run.end:
        state += f" · {run.end['status']}"
    elif left is not None:
        state += f" · {duration(left)} left"
    bar = ProgressBar(
        total=run.total_steps or None,
        completed=run.done_steps,
        style="bright_black",
        complete_style="cyan",
        finished_style="green",
    )
    row.add_row(bar, state)
    return row


def _figures(run: _Progress, width: int) -> list[tuple[str, Text]]:
    rows: list[tuple[str, Text]] = []
    if step := run.step:
        loss = Text(f"{number(step['loss']):<8}", style="bold")
        loss.append(run.losses.sparkline(min(40, width - 28)), style="cyan")
        rows.append(("loss", loss))
    if run.evals:
        first, last = run.evals[0], run.evals[-1]
        text = number(first[1])
        if last is not first:
            text += f" → {number(last[1])}, {change(first[1], last[1])} (step {last[0]:,})"
        rows.append(("held-out", Text(text)))
    if step := run.step:
        speed = number(run.tokens_per_second, 0)
        rows.append(("speed", Text(f"{speed} tokens/s, {duration(step['seconds'])} a step")))
        rate, norm = scientific(step["learning_rate"]), number(step["grad_norm"])
        rows.append(("learning rate", Text(f"{rate}, gradient norm {norm}")))
        rows.append(("memory", Text(size(step["memory_bytes"]))))
    if run.checkpoint is not None:
        copied = f", copied: step {run.copied:,}" if run.copied is not None else ""
        rows.append(("saved", Text(f"step {run.checkpoint:,}{copied}")))
    return rows


def _outcome(run: _Progress, end: dict[str, Any]) -> str:
    steps, took = f"{end['step']:,}", duration(end.get("seconds"))
    total = f"{run.total_steps:,}" if run.total_steps else "?"
    match end["status"]:
        case "done":
            return f"done: {steps} steps in {took}"
        case "interrupted":
            return (
                f"interrupted after step {steps} of {total} ({took}); "
                "the same command goes on from there"
            )
        case _:
            why = clean(end.get("error") or "no reason is recorded")
            return f"failed after step {steps} of {total} ({took}): {why}"


def clean(text: str) -> str:
    """Without control characters: newlines and tabs become spaces, the rest is dropped."""
    spaced = "".join(" " if char in "\n\r\t" else char for char in str(text))
    return "".join(char for char in spaced if char.isprintable() or char == " ")


def brief(text: str | None, limit: int) -> str:
    """On one line, of at most `limit` characters."""
    line = " ".join(clean(text or "").split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
