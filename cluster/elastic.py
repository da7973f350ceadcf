"""A run from its first start to its end: start, see how it ends, ask policy.py, start again.

Workers leave between two steps, saved and with nothing lost, when a node that holds some has been
given notice, or when new room is worth a restart. They are asked through the file RUN/leave; as
through RUN/stop, all of them see it at the same step.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimpot.cluster.launch import Outcome, run_plan
from trimpot.cluster.policy import (
    ADVICE,
    FINAL,
    Decision,
    Failure,
    Limits,
    choose_workers,
    decide,
    expected_hours_between_failures,
    prior_hours,
    worth_growing,
)
from trimpot.cluster.rooms import Rooms
from trimpot.cluster.verdict import verdict
from trimpot.runner.errors import ClusterError, TrimpotError, WorkerError
from trimpot.runner.plan.plan import for_workers
from trimpot.runner.types import Event, Plan

log = logging.getLogger(__name__)
LOOK_S = 1.0
"""Between two looks at the cluster's nodes."""
RELEASE_S = 3.0
"""What workers that just ended held is free again by then."""
RESTART_S = 60.0
"""What a restart is taken to cost until one was seen."""


def limits_of(plan: Plan) -> Limits:
    """What the plan's config allows its fleet to become."""
    fleet = plan.config.fleet
    least, most = fleet.worker_range or (plan.world_size, plan.world_size)
    return Limits(
        min_workers=least,
        max_workers=most,
        micro_batches=plan.micro_batches,
        sequence_parallel_size=plan.sequence_parallel_size,
        max_failures=fleet.max_failures,
        preemptible=fleet.preemptible,
    )


class Elastic:
    """One run. `hear` is to be called with every event of its journal, in the thread of `run`."""

    def __init__(
        self,
        ray: Any,
        plan: Plan,
        watch: Callable[[Callable[[], bool]], None],
        tell: Callable[[Event], None],
        local: bool,
    ):
        """`watch`: as of `run_plan`. `tell`: writes an event into the journal. `local`: the
        cluster was started for this run, on this machine."""
        self.plan, self.watch, self.tell, self.local = plan, watch, tell, local
        self.limits = limits_of(plan)
        self.rooms = Rooms(ray, plan)
        self.run_dir = Path(plan.run_dir)
        self.course = Course(plan)
        self.failures: list[Failure] = []
        self.began = time.monotonic()

    def hear(self, event: dict[str, Any]) -> None:
        self.course.add(event)

    def run(self) -> Outcome:
        """Returns once the run is done or was told to stop. Raises TrimpotError where policy.py
        gives up, the error of the last start; ClusterError where there is no room."""
        while True:
            with self.rooms.answering():
                workers = self._find_room()
            if workers is None:
                return Outcome(self.course.step, complete=False)
            outcome = self._start(workers)
            if outcome is not None and (outcome.complete or self._told_to_stop()):
                return outcome

    def _told_to_stop(self) -> bool:
        return (self.run_dir / "stop").exists()

    def _find_room(self) -> int | None:
        """How many workers to start now; None when told to stop while waiting. Asks an autoscaler
        for the most, where there is one. Raises ClusterError."""
        wait_s = 0.0 if self.local else self.plan.config.fleet.start_timeout_s
        began, asked = time.monotonic(), False
        deadline = began + wait_s
        while True:
            workers = choose_workers(self.rooms.workers(), self.limits)
            if self.limits.elastic:  # others may use the cluster; a fixed run queues behind them
                free = choose_workers(self.rooms.workers(ours=0), self.limits)
                if free != workers and time.monotonic() > began + RELEASE_S:
                    workers = free
                elif free != workers:
                    workers, deadline = None, max(deadline, began + 2 * RELEASE_S)
            if workers is not None:
                return workers
            if self._told_to_stop():
                return None
            if time.monotonic() > deadline:
                raise ClusterError(self.rooms.missing(self.limits.min_workers, wait_s))
            if not asked:
                self.rooms.request(self.limits.max_workers)
                asked = True
            time.sleep(0.2)

    def _start(self, workers: int) -> Outcome | None:
        """One start of the workers; None where it failed and another is due."""
        plan = self._plan_for(workers)
        self.course.begin()
        overseer = Overseer(self.rooms, self.course, self.limits, workers, self.plan, self.tell)
        try:
            with overseer:
                outcome = run_plan(plan, self.watch, self.tell)
        except TrimpotError as error:
            self._judge(error, overseer)
            return None
        self.course.step = max(self.course.step, outcome.step)
        if not (outcome.complete or self._told_to_stop() or overseer.asked):
            text = "a worker was sent SIGTERM: its node will go"
            self.tell(Event("leave", {"reason": "preempted", "text": text, "step": outcome.step}))
        return outcome

    def _plan_for(self, workers: int) -> Plan:
        plan = for_workers(self.plan, workers) if workers != self.plan.world_size else self.plan
        section = plan.config.checkpoint
        hours = expected_hours_between_failures(
            prior_hours(section.hours_said, self.limits.preemptible),
            (time.monotonic() - self.began) / 3600,
            len(self.failures),
        )
        changed = section.model_copy(update={"hours_between_failures": hours})
        return replace(plan, config=plan.config.model_copy(update={"checkpoint": changed}))

    def _judge(self, error: TrimpotError, overseer: Overseer) -> None:
        """Raises `error` unless the run is to go on."""
        course = self.course
        with self.rooms.answering(str(error)):
            self.rooms.release()
            lost = frozenset() if self.local else self.rooms.settle(course.nodes)
            leaving = self.rooms.leaving() | overseer.leaving
        failure = verdict(
            error,
            step=course.step,
            saved=course.saved,
            nodes=course.nodes,
            leaving=leaving,
            lost=lost,
        )
        decision = decide(failure, self.failures, self.limits)
        self.failures.append(failure)
        with self.rooms.answering(str(error)):
            address = "" if self.local else self.rooms.address(failure.node)
        text = f"{error} (node {address})" if address else str(error)
        if failure.kind not in FINAL:  # those are told once, as what ended the run
            self._tell_failure(failure, decision, text)
        if not decision.restart:
            if isinstance(error, WorkerError):
                text = f"{text}; {decision.why}; {ADVICE[failure.kind]}"
                raise WorkerError(f"{text}; see {self.run_dir}/failure.log") from error.__cause__
            raise error
        until = time.monotonic() + decision.wait_s
        while time.monotonic() < until and not self._told_to_stop():
            time.sleep(0.2)

    def _tell_failure(self, failure: Failure, decision: Decision, text: str) -> None:
        values = {
            "verdict": failure.kind,
            "text": text,
            "rank": failure.rank,
            "node": failure.node,
            "step": failure.step,
            "saved": failure.saved,
            "restart": decision.restart,
            "why": decision.why,
            "advice": ADVICE[failure.kind],
        }
        self.tell(Event("failure", values))


class Course:
    """Where a run stands, of the events of its journal."""

    def __init__(self, plan: Plan):
        self.total = plan.total_steps or 0
        self.step = self.saved = 0
        self.nodes: list[str] = []
        """Of each rank, once the workers have told."""
        self.recent: deque[float] = deque(maxlen=32)
        self.restart_s = RESTART_S
        self.began = time.monotonic()

    def begin(self) -> None:
        self.nodes, self.began = [], time.monotonic()
        self.recent.clear()

    def add(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "start":
                self.nodes = list(event.get("nodes") or [])
                self.step = self.saved = event.get("resumed_from") or 0
            case "step":
                if not self.recent:
                    self.restart_s = time.monotonic() - self.began
                self.step = event["step"]
                self.recent.append(event["seconds"])
            case "checkpoint":
                self.saved = max(self.saved, event["step"])
            case _:
                pass

    def left_s(self) -> float | None:
        """Until the run's end at its present speed; None before it has one."""
        if not self.recent:
            return None
        return (self.total - self.step) * statistics.median(self.recent)


class Overseer(threading.Thread):
    """Looks at the cluster while workers run, and asks them to leave where that is better."""

    def __init__(
        self,
        rooms: Rooms,
        course: Course,
        limits: Limits,
        workers: int,
        plan: Plan,
        tell: Callable[[Event], None],
    ):
        super().__init__(name="overseer", daemon=True)
        self.rooms, self.course, self.limits = rooms, course, limits
        self.workers, self.flag, self.tell = workers, Path(plan.run_dir, "leave"), tell
        self.settle_s = plan.config.fleet.grow_after_s
        self.leaving: frozenset[str] = frozenset()
        """Nodes with workers of ours that said that they would go."""
        self.asked = False
        self._over = threading.Event()
        self._better_since: float | None = None

    def __enter__(self) -> Overseer:
        self.flag.unlink(missing_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self.flag.unlink(missing_ok=True)

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                if self._look():
                    return
            except Exception as error:  # the head may be gone, too: that is Ray Train's to tell
                log.debug("the cluster does not answer: %s", error)

    def _look(self) -> bool:
        """Whether the workers were asked to leave."""
        self.leaving |= self.rooms.leaving() & {*self.course.nodes}
        if self.leaving:
            count = sum(node in self.leaving for node in self.course.nodes)
            self._ask("preempted", f"{count} of {self.workers} workers are on nodes that will go")
            return True
        if not self.limits.elastic:
            return False
        left_s = self.course.left_s()
        room = self.rooms.workers(ours=self.workers)
        better = left_s is not None and worth_growing(
            self.workers, room, self.limits, left_s, self.course.restart_s
        )
        if not better:
            self._better_since = None
            return False
        now = time.monotonic()
        self._better_since = self._better_since or now
        if now - self._better_since < self.settle_s:
            return False
        self._ask("grow", f"there is room for {better} workers, {self.workers} run")
        return True

    def _ask(self, reason: str, text: str) -> None:
        self.flag.write_text(reason, encoding="utf-8")
        self.asked = True
        self.tell(Event("leave", {"reason": reason, "text": text, "step": self.course.step}))
