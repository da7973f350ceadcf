"""Copying checkpoints to an object store beside training: worker 0's, one upload at a time.

A thread of its own takes the newest checkpoint that was offered; those that came between are not
copied. A copy that fails is told once, and the next checkpoint's turn comes. Only at the run's end
is it waited for, and tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trimpot.runner import copies
from trimpot.runner import engine as engines
from trimpot.runner.copies import name_of
from trimpot.runner.errors import StorageError, StoreError, WorkerStorageError
from trimpot.runner.fetch import fetch_newest
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint, Event, Plan

T = TypeVar("T")
ALIVE_S = 5.0
"""Between two signs of life while worker 0 is busy: the others' collectives have time limits."""
LONGEST_PAUSE_S = 30.0
"""Between two attempts at the run's end."""


@dataclass(frozen=True)
class Copied:
    step: int
    url: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Uncopied:
    step: int
    why: str


class Copier:
    """`offer` never waits. What became of each upload is told by `outcomes`."""

    def __init__(self, store: Store, keep: int, verify: bool, there: copies.Found | None):
        """`there`: what the store holds, where that is known."""
        self.store, self.keep, self.verify = store, keep, verify
        self.names = {copy.name for copy in there.copies} if there else set[str]()
        self.spoilt: set[str] = set()
        """Copies that were found damaged."""
        self.trouble = ""
        """Why the newest copy failed, while none has succeeded since."""
        self._change = threading.Condition()
        self._next: Checkpoint | None = None
        self._now: Checkpoint | None = None
        self._ended: list[Copied | Uncopied] = []
        # A daemon: what it has not copied when the process ends, the next start will.
        threading.Thread(target=self._run, name="copier", daemon=True).start()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint copied, unless it was, or a newer one is offered before its turn."""
        with self._change:
            if not self._has(checkpoint) and checkpoint != self._now:
                self._next = checkpoint
                self._change.notify_all()

    def _has(self, checkpoint: Checkpoint) -> bool:
        return name_of(checkpoint.step, checkpoint.digest) in self.names - self.spoilt

    def wanted(self) -> set[Path]:
        """Checkpoints that are being read, or will be."""
        with self._change:
            return {one.path for one in (self._now, self._next) if one is not None}

    def outcomes(self) -> list[Copied | Uncopied]:
        """What ended since the last call."""
        with self._change:
            ended, self._ended = self._ended, []
        return ended

    def finish(self, last: Checkpoint, wait_s: float) -> str:
        """Wait until `last` is in the store; a copy that fails is tried again for `wait_s`
        → "", or why it isn't there."""
        pause_s, deadline = 1.0, 0.0
        while True:
            self.offer(last)
            with self._change:
                self._change.wait_for(lambda: self._now is None and self._next is None)
                if self._has(last):
                    return ""
            deadline = deadline or time.monotonic() + wait_s
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return self.trouble
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._next is not None)
                self._now, self._next = self._next, None
            assert self._now is not None
            outcome = self._copy(self._now)
            with self._change:
                self._now = None
                self._ended.append(outcome)
                self._change.notify_all()

    def _copy(self, checkpoint: Checkpoint) -> Copied | Uncopied:
        began = time.perf_counter()
        name = name_of(checkpoint.step, checkpoint.digest)
        try:
            size = copies.upload(self.store, checkpoint, self.verify)
            self.names.add(name)
            self.spoilt.discard(name)
            copies.prune(self.store, name, self.keep, self.spoilt)
        except Exception as error:  # whatever it is: it must be told, and not end the run
            self.trouble = " ".join(str(error).split()) or type(error).__name__
            return Uncopied(checkpoint.step, self.trouble)
        self.trouble = ""
        url = f"{self.store.url}/{name}"
        return Copied(checkpoint.step, url, size, time.perf_counter() - began)


def together(work: Callable[[], T]) -> T | None:
    """Have worker 0 do something that may take long → what that returned, None on the others.

    Every worker must call; all wait until it is done, and raise where it does.
    """
    result: list[T] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=run, daemon=True)
    first = engines.ranks()[0] == 0
    if first:
        thread.start()
    while True:
        state = "waiting"
        if first:
            thread.join(ALIVE_S)
            if not thread.is_alive():
                state = f"failed: {faults[0]}" if faults else "done"
        state = engines.texts(state)[0]
        if state == "done":
            return result[0] if first else None
        if state.startswith("failed: "):
            raise faults[0] if first else StorageError(state.removeprefix("failed: "))


def begin(
    plan: Plan,
    data_digest: str,
    found: Checkpoint | None,
    report: Callable[[Event], None],
    token: str,
) -> tuple[Copier | None, bool]:
    """Look into the run's store → worker 0's Copier, and whether a checkpoint newer than `found`
    was fetched into RUN/checkpoints. Every worker must call.

    Raises CheckpointError where the store holds another run's, StorageError where nothing can be
    copied there, WorkerStorageError where it does not answer and there is no other checkpoint.
    """
    if plan.config.checkpoint.copy_to is None:
        return None, False
    made = together(lambda: _begin(plan, data_digest, found, report, token))
    fetched = engines.first_text("fetched" if made and made[1] else "")
    return (made[0] if made else None), bool(fetched)


def _begin(
    plan: Plan,
    data_digest: str,
    found: Checkpoint | None,
    report: Callable[[Event], None],
    token: str,
) -> tuple[Copier, bool]:
    section = plan.config.checkpoint
    assert section.copy_to is not None
    store = Store(section.copy_to)

    def warn(text: str) -> None:
        report(Event("warning", {"text": text}))

    try:
        began = time.perf_counter()
        there = copies.look(store)
        if not (found and found.plan_digest != plan.digest):  # which is refused in its own words
            copies.check_same(there, store.url, plan.digest, data_digest)
        folder = Path(plan.run_dir, "checkpoints")
        after = found.step if found else 0
        fetched, spoilt = fetch_newest(store, there, folder, after, token, warn)
    except StoreError as error:
        if found is None:  # to begin anew would lose what may be there
            raise (error if error.lasting else WorkerStorageError(str(error))) from error
        warn(f"{error}; the run goes on from {found.path}")
        return Copier(store, section.keep, section.copy_verify, None), False
    copier = Copier(store, section.keep, section.copy_verify, there)
    copier.spoilt |= spoilt
    if fetched is not None:
        seconds = time.perf_counter() - began
        values = {"step": fetched.step, "path": str(fetched.path), "seconds": seconds}
        report(Event("fetch", {**values, "url": store.url}))
    elif found is not None:
        copier.offer(found)
    return copier, fetched is not None
