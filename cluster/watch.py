"""Watches a start's workers through their pulses: tells of stragglers, and ends a hang.

Needs shared storage only to see; to dump stacks and to end workers it asks their nodes, through
`OnNodes`, which `launch.py` makes of Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from trimpot.cluster.hang import Hang, Sights, Stragglers, find_hang
from trimpot.runner.errors import HangError
from trimpot.runner.pulse import Beat, period_s, read_beats, stacks_file
from trimpot.runner.types import Event

log = logging.getLogger(__name__)
PAUSED_S = 1.0
"""A look that comes later than it should by more than this is the watcher's own fault."""
STACKS_S = 3.0
"""A process that runs has written its stacks by then."""

Process = tuple[int, float, str]
"""(pid, when it was born, where it writes its stacks)."""
OnNodes = Callable[[Callable[..., Any], Mapping[str, Any]], Mapping[str, Any]]
"""(function, {node: its argument}) → {node: result}, called on each node; without those that did
not answer."""


class Watch(threading.Thread):
    """A context manager: looks while workers run. `error` says that, and how, they hung."""

    def __init__(
        self,
        folder: Path,
        run: Path,
        world: int,
        tell: Callable[[Event], None],
        on_nodes: OnNodes,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`folder`: of this start's pulses. `run`: where the stacks of a hang are kept."""
        super().__init__(name="watch", daemon=True)
        self.folder, self.run_dir, self.tell, self.on_nodes = folder, run, tell, on_nodes
        self.clock, self.every_s = clock, period_s(world)
        self.sights, self.stragglers = Sights(world), Stragglers()
        self.error: HangError | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        last = self.clock()
        while not self._over.wait(self.every_s):
            beats = read_beats(self.folder, self.sights.world)
            now = self.clock()
            late_s = now - last - self.every_s
            if late_s > PAUSED_S:
                self.sights.forgive(late_s)
            last = now
            self.sights.observe(beats, now)
            for slow in self.stragglers.observe(beats, self.sights.world):
                values = {"rank": slow.rank, "node": slow.node, "ratio": round(slow.ratio, 2)}
                self.tell(Event("straggler", {**values, "text": slow.text}))
            if (hang := find_hang(self.sights, now)) is not None:
                self._end(hang)
                return

    def _end(self, hang: Hang) -> None:
        """Tell, dump, and end the workers."""
        beats = {rank: sight.beat for rank, sight in self.sights.of.items()}
        path = self.run_dir / f"hang-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.txt"
        beat = beats.get(hang.rank) if hang.rank is not None else next(iter(beats.values()))
        text = f"{hang.text}; stacks of all workers in {path}"
        values = {
            "rank": hang.rank,
            "ranks": list(hang.ranks),
            "node": beat.node if beat else None,
            "host": beat.host if beat else None,
            "section": beat.section if beat else None,
            "step": beat.step if beat else None,
            "seconds": round(hang.seconds, 2),
            "last_collective": beat.collective if beat else None,
            "collectives": beat.collectives if beat else None,
            "silent": list(hang.silent),
            "stacks_file": str(path),
            "text": f"hang: {text}",
        }
        self.error = HangError(text, hang.rank)
        self.tell(Event("hang", values))
        nodes = processes_by_node(beats, self.folder)
        found = self.on_nodes(dump, nodes)
        with contextlib.suppress(OSError):  # a full disk must not keep them from being ended
            path.write_text(_page(hang, beats, nodes, found), encoding="utf-8", errors="replace")
        self.on_nodes(end, nodes)


def processes_by_node(beats: Mapping[int, Beat], folder: Path) -> dict[str, dict[int, Process]]:
    """{node: {rank: Process}} of the workers that have not ended."""
    nodes: dict[str, dict[int, Process]] = {}
    for rank, beat in beats.items():
        if not beat.over:
            process = (beat.pid, beat.born, str(stacks_file(folder, rank)))
            nodes.setdefault(beat.node, {})[rank] = process
    return nodes


def _page(
    hang: Hang,
    beats: Mapping[int, Beat],
    nodes: Mapping[str, Mapping[int, Process]],
    found: Mapping[str, Mapping[int, str]],
) -> str:
    """What a person reads of a hang: the finding, each worker's place, each worker's stacks."""
    parts = [hang.text, ""]
    for rank, beat in sorted(beats.items()):
        where = "ended by itself" if beat.over else f"in {beat.section} for {beat.held_s:.1f} s"
        collective = f"{beat.collective}, number {beat.collectives}" if beat.collectives else "none"
        state = "under way" if beat.waiting else "over"
        parts.append(
            f"worker {rank} on {beat.host}, pid {beat.pid}: step {beat.step}, {where}; last "
            f"collective {collective} ({state})"
        )
    texts: dict[int, str] = {}
    for node, processes in nodes.items():
        answer = found.get(node, {})
        texts |= {rank: answer.get(rank, "its node does not answer\n") for rank in processes}
    for rank, text in sorted(texts.items()):
        parts += ["", f"--- stacks of worker {rank}", text.rstrip()]
    return "\n".join(parts) + "\n"


def dump(processes: Mapping[int, Process]) -> dict[int, str]:
    """The stacks of all threads of these processes of this node, or why there are none."""
    texts: dict[int, str] = {}
    asked: dict[int, tuple[Path, int]] = {}
    for rank, (pid, born, stacks) in processes.items():
        process = _process(pid, born)
        if process is None:
            texts[rank] = "its process is gone"
            continue
        try:
            stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            if stopped:
                texts[rank] = "its process is stopped (SIGSTOP, or a debugger): it tells nothing"
                continue
            path = Path(stacks)
            asked[rank] = path, path.stat().st_size
            os.kill(pid, signal.SIGUSR1)
        except (OSError, psutil.Error) as error:
            asked.pop(rank, None)
            texts[rank] = f"no stacks: {error}"
    deadline = time.monotonic() + STACKS_S
    for rank, (path, before) in asked.items():
        texts[rank] = _grown(path, before, deadline)
    return texts


def _grown(path: Path, before: int, deadline: float) -> str:
    """What was added to a file, once it has not grown for 0.2 s."""
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = path.stat().st_size
        if now == size > before:
            break
        size = now
    text = path.read_bytes()[before:].decode(errors="replace")
    return text or f"it wrote none in {STACKS_S:g} s: its process does not run"


def end(processes: Mapping[int, Process]) -> None:
    """SIGKILL to these processes of this node."""
    for pid, born, _ in processes.values():
        if _process(pid, born) is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _process(pid: int, born: float) -> psutil.Process | None:
    """The process of this pid, if it is still the one that was meant."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - born) < 2 else None
    except psutil.Error:
        return None
