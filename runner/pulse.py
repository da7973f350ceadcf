"""A worker's pulse: where it is, told once a second to whoever watches the run.

The training thread only sets attributes. A thread beside it writes them into a file of its own,
with what the flight recorder of torch.distributed knows of the newest collective. Each write
opens the file, puts one block at its start and closes it: over NFS a reader then sees it at once,
where a file that is replaced by name may stay hidden for as long as its folder is cached (30 s).
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import logging
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.runner.types import NODE

FOLDER = "TRIMPOT_PULSE"
"""Environment variable that a launcher sets: the folder for this start's pulses. Without it there
are none."""
BLOCK = 1024
"""Bytes of a pulse's file: within a page, so that a reader sees one write or the other."""
RECORDED = "16"
"""Collectives that the flight recorder keeps, unless the environment says otherwise: reading them
takes 0.3 ms, of torch's own 2,000 it takes 30."""
OWN = ("data", "forward")
"""Sections in which a worker computes and, but under ZeRO-3 and split rows, waits for nobody."""
WINDOW = 20
"""Steps that a worker's own time is the median of."""
COMPILERS = ("/triton/compiler/", "/torch/_inductor/", "/torch/utils/cpp_extension.py")
"""Files of Python code that compiles. Kernels meet new shapes in the middle of a run."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """What a pulse says. Seconds are of the worker's own clock."""

    rank: int
    count: int
    """How many were written before: it grows as long as the process runs."""
    pid: int
    born: float
    """When the process started, in seconds since the epoch: pids are given again."""
    node: str
    host: str
    section: str
    step: int
    marks: int
    """Sections entered so far."""
    held_s: float
    """In this section."""
    collectives: int
    """Collectives begun so far, those of DeepSpeed included."""
    collective: str
    """The newest one: its name and the sizes of what it sends."""
    waiting: bool
    """It is not over."""
    steps: int
    """Steps timed so far, the first one of a start left out."""
    step_s: float
    """Median of the last ones."""
    longest_s: float
    save_s: float
    """The longest save so far."""
    own_s: float
    """Median over the last WINDOW steps of the time in OWN sections; 0 before there are as many."""
    token_s: float
    """The same of a token."""
    over: bool
    """The worker has ended by itself."""


class Pulse:
    """Of this process. Without `start`, it keeps the marks and tells nobody."""

    def __init__(self) -> None:
        self.section, self.outer, self.step, self.marks = "start", "", 0, 0
        self.since = self.began = time.monotonic()
        self.collectives, self.collective, self.waiting, self.over = 0, "", False, False
        self.tokens, self.apart_s, self.save_s = 0, 0.0, 0.0
        self.times: deque[float] = deque(maxlen=256)
        self.own: deque[float] = deque(maxlen=WINDOW)
        self.each: deque[float] = deque(maxlen=WINDOW)
        self.stamp: Callable[[], Any] = time.perf_counter
        self.elapsed: Callable[[Any, Any], float] = lambda a, b: b - a
        self._begun = 0
        self._open: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._writer: _Writer | None = None

    def enter(self, section: str) -> None:
        """From now on the worker is in this section, of a step or of what `within` says."""
        if self._open is not None:
            self._spans.append((self._open, self.stamp()))
            self._open = None
        if section in OWN and not self.outer and self.step:
            self._open = self.stamp()
        self.section, self.since = section, time.monotonic()
        self.marks += 1

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Something beside the steps: evaluate, generate, save."""
        before, self.outer = self.outer, self.outer or name
        began = time.monotonic()
        self.enter(name)
        try:
            yield
        finally:
            took = time.monotonic() - began
            if not before:
                self.apart_s += took
            if name == "save":
                self.save_s = max(self.save_s, took)
            self.outer = before
            self.enter("between")

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """A collective that the worker waits for."""
        before = self.section
        self.enter("collective")
        try:
            yield
        finally:
            self.enter(before)

    def begin_step(self, step: int) -> None:
        """Step number `step` begins, and the one before it is over."""
        now = time.monotonic()
        self.enter("step")
        spans = self._spans
        if self._begun > 1:  # the first step of a start compiles and warms up
            self.times.append(now - self.began - self.apart_s)
            own = sum(self.elapsed(*span) for span in spans)
            self.own.append(own)
            self.each.append(own / max(1, self.tokens))
        self._begun += 1
        self._spans, self.tokens, self.apart_s = [], 0, 0.0
        self.step, self.began = step, now

    def computes(self, tokens: int) -> None:
        """So many more tokens, padding included, go through the model in this step."""
        if not self.outer:
            self.tokens += tokens

    def measure_gpu(self) -> None:
        """Take OWN times on the GPU's clock, which the host runs ahead of. They are read at the
        next step, when the stream is past them."""
        import torch

        def stamp() -> Any:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        self.stamp, self.elapsed = stamp, lambda a, b: a.elapsed_time(b) / 1e3

    def start(self, rank: int, world: int) -> None:
        """Tell from now on, where a launcher has said into which folder. To be called before the
        process group is made. SIGUSR1 writes all threads' stacks beside the pulse."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
        self._writer = _Writer(self, Path(folder), rank, world)
        self._writer.start()

    def end(self) -> None:
        """The worker is done, or raises: its silence means nothing from here on."""
        self.over = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Writer(threading.Thread):
    def __init__(self, pulse: Pulse, folder: Path, rank: int, world: int):
        import psutil

        super().__init__(name="pulse", daemon=True)
        self.pulse, self.every_s = pulse, period_s(world)
        self.path, self.count = pulse_file(folder, rank), 0
        self.facts: dict[str, Any] = {
            "rank": rank,
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "node": os.environ.get(NODE, ""),
            "host": socket.gethostname(),
        }
        self.over = threading.Event()
        # Kept open, and by this name only: the handler may not open anything.
        self.stacks = stacks_file(folder, rank).open("w")
        faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
        self.path.touch()

    def run(self) -> None:
        while True:
            try:
                self.write()
            except FileNotFoundError:  # the folder was removed: this start is over
                return
            except Exception as error:  # a full disk costs beats; nothing may end them for good
                log.debug("no pulse of rank %s: %s", self.facts["rank"], error)
            if self.over.wait(self.every_s):
                return

    def write(self) -> None:
        text = json.dumps(dataclasses.asdict(self.beat())).encode()
        handle = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(handle, text.ljust(BLOCK - 1) + b"\n", 0)
        finally:
            os.close(handle)

    def beat(self) -> Beat:
        pulse = self.pulse
        section = pulse.section
        if pulse.outer and section != pulse.outer:
            section = f"{pulse.outer}: {section}"
        if _compiles():
            section = "compile"
        pulse.collectives, pulse.collective, pulse.waiting = _newest_collective()
        self.count += 1
        times, own, each = list(pulse.times), list(pulse.own), list(pulse.each)
        full = len(own) == len(each) == WINDOW
        return Beat(
            count=self.count,
            section=section,
            step=pulse.step,
            marks=pulse.marks,
            held_s=round(time.monotonic() - pulse.since, 3),
            collectives=pulse.collectives,
            collective=pulse.collective[:200],
            waiting=pulse.waiting,
            steps=len(times),
            step_s=statistics.median(times[-64:]) if times else 0.0,
            longest_s=max(times, default=0.0),
            save_s=pulse.save_s,
            own_s=statistics.median(own) if full else 0.0,
            token_s=statistics.median(each) if full else 0.0,
            over=pulse.over,
            **self.facts,
        )

    def close(self) -> None:
        self.over.set()
        self.join()
        with contextlib.suppress(OSError):
            self.write()
        faulthandler.unregister(signal.SIGUSR1)
        self.stacks.close()


def _newest_collective() -> tuple[int, str, bool]:
    """(how many were begun, the last one's name and sizes, whether it is under way), of all
    process groups of this process."""
    recorder = _recorder()
    entries = json.loads(recorder()).get("entries", []) if recorder is not None else []
    if not entries:
        return 0, "", False
    last = max(entries, key=lambda entry: entry["record_id"])
    sizes = "".join(str(size) for size in last["input_sizes"][:2])
    return last["record_id"] + 1, f"{last['profiling_name']} {sizes}".strip(), not last["retired"]


@functools.cache
def _recorder() -> Callable[[], str] | None:
    """torch's flight recorder; private, and not in each version."""
    import torch.distributed

    if not torch.distributed.is_available():
        return None
    import torch._C._distributed_c10d as c10d

    return getattr(c10d, "_dump_fr_trace_json", None)


def _compiles() -> bool:
    """Whether any thread is inside a compiler."""
    for frame in list(sys._current_frames().values()):
        at, depth = frame, 0
        while at is not None and depth < 64:
            if any(part in at.f_code.co_filename for part in COMPILERS):
                return True
            at, depth = at.f_back, depth + 1
    return False


def period_s(world: int) -> float:
    """Between two beats of a worker: the folder is one, and its storage shared."""
    return max(1.0, world / 64)


def pulse_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-rank-{rank}.txt"


def read_beats(folder: Path, world: int) -> dict[int, Beat]:
    """The newest beat of each rank; without those that have none yet, or half of one."""
    found: dict[int, Beat] = {}
    for rank in range(world):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[rank] = Beat(**json.loads(pulse_file(folder, rank).read_bytes()))
    return found


PULSE = Pulse()
"""The pulse of this process."""
