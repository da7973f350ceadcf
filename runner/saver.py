"""Saving beside training: one worker's part of it, at most one save at a time.

What is saved is copied in the step's way and written behind its back, by a thread: hashing,
writing and fsync all leave Python's lock to the training thread. Where every worker writes a
shard, the workers tell each other how far they are with the sums that each step makes anyway, and
worker 0 commits once all have written. A save that fails is told, and the run goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimpot.runner import durable
from trimpot.runner import engine as engines
from trimpot.runner.checkpoint import (
    STATE,
    commit,
    prune,
    read_shards,
    staging,
    write_shard,
    write_state,
)
from trimpot.runner.engine import Share, State
from trimpot.runner.pulse import PULSE
from trimpot.runner.types import Checkpoint


@dataclass(frozen=True)
class Saved:
    checkpoint: Checkpoint
    seconds: float
    """From the step's end until it was durable."""
    stall_s: float
    """Of these, how long training stood still."""


@dataclass(frozen=True)
class Failed:
    step: int
    why: str


@dataclass
class Job:
    """One save of one worker."""

    step: int
    facts: dict[str, Any]
    """What `commit` is given: step, cursor, complete, facts."""
    partial: Path
    sharded: bool
    began: float
    stall_s: float
    spare: Callable[[int], bool] | None
    thread: threading.Thread = field(init=False)
    told: bool = False
    """Sharded: every worker knows that all have written."""
    error: str = ""
    checkpoint: Checkpoint | None = None
    ended: float = 0.0


class Saver:
    """Every worker has one, and all call the same methods at the same steps."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        rank: int,
        world: int,
        token: str,
        reading: Callable[[], Collection[Path]] = tuple,
    ):
        """`token`: the same on all workers, of this start of the run only. `reading`: which
        checkpoints somebody is reading now."""
        self.folder, self.keep, self.token, self.reading = folder, keep, token, reading
        self.rank, self.world = rank, world
        self.job: Job | None = None

    def begin(
        self,
        content: State | Share,
        *,
        sharded: bool,
        began: float,
        step: int,
        spare: Callable[[int], bool] | None = None,
        **facts: Any,
    ) -> None:
        """Start to write. `content`: of the whole run on worker 0 (`sharded` False: the others do
        nothing), or each worker's share. No save may be under way.

        `began`: time.perf_counter() when the copying began. `spare`: as of `prune`.
        """
        assert self.job is None
        if self.rank and not sharded:
            return
        stall_s = time.perf_counter() - began
        partial = staging(self.folder, step, self.token)
        job = Job(step, {"step": step, **facts}, partial, sharded, began, stall_s, spare)
        self.job = job

        def write() -> None:
            if sharded:
                write_shard(partial, content, self.rank, self.world)  # pyright: ignore[reportArgumentType]
            else:
                self._commit(job, {STATE: write_state(partial, content)})  # pyright: ignore[reportArgumentType]

        self._start(job, write)

    def _start(self, job: Job, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # whatever it is: it must be told, and not end the run
                job.error = str(error) or type(error).__name__
                if not job.sharded or job.told:
                    durable.remove(job.partial)
            job.ended = time.perf_counter()

        # Not a daemon: an interpreter that ends waits for a save that is under way.
        job.thread = threading.Thread(target=run, name=f"save-{job.step}")
        job.thread.start()

    def _commit(self, job: Job, files: dict[str, Any]) -> None:
        job.checkpoint = commit(job.partial, files, **job.facts)
        prune(self.folder, job.checkpoint, self.keep, self.token, job.spare, self.reading())

    def make_room(self, newest: Checkpoint) -> None:
        """Keep no checkpoint but the newest. The others may have begun the next save already."""
        prune(self.folder, newest, 1, self.token, reading=self.reading())

    def progress(self) -> tuple[float, float]:
        """(1 if this worker's shard is written, 1 if that failed), for `advance` to be given the
        sums over all workers."""
        job = self.job
        if job is None or not job.sharded or job.told or job.thread.is_alive():
            return 0.0, 0.0
        return float(not job.error), float(bool(job.error))

    def advance(self, written: float, failed: float) -> list[Saved | Failed]:
        """Go on with a save as far as it can → how it ended, on worker 0; a shard that could not
        be written, on all workers. Every worker must call with the same sums."""
        job = self.job
        if job is None:
            return []
        if job.sharded and not job.told:
            if failed:
                return [self._drop(job)]
            if written == self.world:
                job.told = True
                self.job = None if self.rank else job
                if not self.rank:
                    self._start(
                        job, lambda: self._commit(job, read_shards(job.partial, self.world))
                    )
            return []
        if job.thread.is_alive():
            return []
        self.job = None
        if job.checkpoint is None:
            return [Failed(job.step, job.error)]
        return [Saved(job.checkpoint, job.ended - job.began, job.stall_s)]

    @PULSE.within("save")
    def _drop(self, job: Job) -> Failed:
        job.thread.join()
        why = engines.first_text(job.error)
        if not self.rank:
            durable.remove(job.partial)
        self.job = None
        return Failed(job.step, why)

    @PULSE.within("save")
    def finish(self) -> list[Saved | Failed]:
        """Wait until nothing is under way → as `advance`. Every worker must call."""
        ended: list[Saved | Failed] = []
        if self.job is not None and self.job.sharded and not self.job.told:
            self.job.thread.join()
            written, failed = engines.sum_over_workers([*self.progress()])
            ended += self.advance(written, failed)
        if self.job is not None:
            self.job.thread.join()
            ended += self.advance(0.0, 0.0)
        return ended

    def close(self) -> None:
        """Wait for this worker's own writing, whatever became of the others'."""
        if self.job is not None:
            self.job.thread.join()
