"""A run over a preemption trace, on a simulated clock: where its time goes, and what it costs.

What is decided is decided by the code of the real run: `policy.py` says whether and with how many
workers it goes on, whether it grows, and which failures shorten what is expected; `runner/pace.py`
says when a checkpoint is due. Only what takes time is made up, of the costs given:

- A start takes `restart_s`, from the workers' leaving to the beginning of their first step.
- A step takes time in proportion to its rounds: the micro-batches that a worker computes in turn.
- A checkpoint that is due stops training for `stall_s` and is durable `save_s` after it began.
- A notice: the running step is finished, a checkpoint made and waited for (after the one that may
  be under way), then as many workers start as there is room for on nodes without a notice. One
  that comes while workers start is heeded after their first step.
- A node that goes while its workers still run: found out `detect_s` later; all since the newest
  durable checkpoint is lost. A save that was under way is lost with it.
- Room that would pay all through `grow_after_s`, and after the first step of a start, is grown into
  as after a notice.
- Less room than the fewest workers: the run holds nothing, and waits, `start_timeout_s` at most.

Goodput is the share of the time of the workers that were held that went into steps that were kept:
"Runtime Goodput" of Google's ML Productivity Goodput (2024), and the effective training time ratio
of Kokolis et al. 2025 ("Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
HPCA), but weighted by workers, since their number changes. Start-up is held time and no step, the
first one included; waiting for room holds nothing. Having fewer workers is thus no loss of goodput.
It is one of `progress`: steps done against those that all workers would have done, never broken, in
the same time. `paid_share` is the useful part of all that was paid: idle and waiting nodes, too.
Evaluations are no part of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trimpot.cluster import policy
from trimpot.cluster.policy import Failure, Kind, Limits
from trimpot.cluster.traces import FOREVER, Trace
from trimpot.runner.pace import Pace, interval_s

Cause = Literal["training", "saving", "restarting", "detecting", "redone", "waiting"]
CAUSES: dict[Cause, str] = {
    "training": "steps that were kept",
    "saving": "stopped for checkpoints",
    "restarting": "workers that start",
    "detecting": "a lost node not missed yet",
    "redone": "steps that were lost",
    "waiting": "for room",
}
Status = Literal["done", "time is up", "no room", "given up"]


@dataclass(frozen=True)
class Costs:
    """Seconds of what is no training. A run's own are in its journal (`costs.py`).

    The defaults are of LoRA on a few nodes. Restarts: two workers of this project took 19 s on two
    busy cores; the literature has 20 s at 1,024 GPUs with standby machines (TrainMover, 2026) and
    150 s at 4,800 (FlashRecovery, 2025). Stalls: 6.3 s for all of a model of 7 billion parameters
    (PyTorch's asynchronous checkpoints), for adapters 100 times less; CheckFreq (Mohan et al. 2021)
    keeps them under 3.5 % of the time. A head of Ray knows of a lost node after 15 to 30 s.
    """

    stall_s: float = 0.2
    """Of each checkpoint, how long training stands still."""
    save_s: float = 3.0
    """From the beginning of a checkpoint until it is durable, the stall included."""
    restart_s: float = 30.0
    """From workers that leave to the beginning of the next ones' first step."""
    detect_s: float = 20.0
    """From the loss of a node without notice until that is known."""


@dataclass(frozen=True)
class Job:
    """What is run."""

    limits: Limits
    step_s: float
    """Of a step with all of `limits.max_workers`."""
    total_steps: int | None = None
    hours: float | None = None
    """When the simulation ends, whatever is done by then. One of both must be given."""
    workers_per_node: int = 1
    every_steps: int | Literal["auto"] = "auto"
    """Between checkpoints; auto: as `Pace` says."""
    prior_hours: float = policy.STEADY_HOURS
    """checkpoint.hours_between_failures: what is expected before any failure was met."""
    grow_after_s: float = policy.SETTLE_S
    start_timeout_s: float = FOREVER
    """How long too little room is waited for before the run ends."""


@dataclass
class Outcome:
    """What became of a run over one trace."""

    status: Status
    elapsed_s: float = 0.0
    seconds: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    """By cause; they sum to `elapsed_s`."""
    worker_seconds: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    """The same, each second as often as workers were held in it."""
    paid_node_s: float = 0.0
    """Of all nodes that stood, used or not."""
    steps: int = 0
    """Done, each once."""
    steps_lost: int = 0
    """Whole ones, that had to be done again."""
    restarts: int = 0
    """Starts after the first."""
    noticed: int = 0
    """Times that workers left after a notice, with everything saved."""
    unnoticed: int = 0
    """Times that a node went with workers on it."""
    growths: int = 0
    checkpoints: int = 0
    goodput: float = 0.0
    paid_share: float = 0.0
    progress: float = 0.0
    why: str = ""
    """Of a run that gave up: what the policy said."""


class _TimeIsUp(Exception):
    pass


@dataclass
class _Save:
    """One that is under way."""

    step: int
    trained: tuple[float, float]
    """Seconds and worker-seconds of the steps in it."""
    ends: float
    """When it is durable."""


@dataclass(frozen=True)
class _Took:
    seconds: float
    stall_s: float


def simulate(job: Job, costs: Costs, trace: Trace) -> Outcome:
    """Deterministic. After the trace's last line nothing changes any more."""
    assert job.total_steps is not None or job.hours is not None
    return _Run(job, costs, trace).run()


class _Run:
    def __init__(self, job: Job, costs: Costs, trace: Trace):
        self.job, self.costs = job, costs
        self.out = Outcome("done")
        self.now = 0.0
        self.end = FOREVER if job.hours is None else job.hours * 3600
        # The fleet.
        self.events = trace.happenings
        self.at = 0
        """Of the next event."""
        self.up = np.array(trace.standing, bool)
        self.standing = int(self.up.sum())
        self.told = np.zeros(len(self.up), bool)
        """Nodes under notice."""
        self.load = np.zeros(len(self.up), int)
        """Workers on each node."""
        # The workers.
        self.starts = 0
        self.workers = 0
        self.held = 0
        self.leave: Literal["", "preempted", "growing"] = ""
        """Why the workers are to leave after this step."""
        self.grows = FOREVER
        """When they will, if the room for more of them stands until then."""
        self.fresh = True
        """They have made no step yet."""
        self.done = 0
        self.saved = 0
        self.kept = (0.0, 0.0)
        """Seconds and worker-seconds of the steps in the newest durable checkpoint."""
        self.save: _Save | None = None
        self.history: list[Failure] = []
        self.verdict: Kind = "node lost"
        """On the newest loss of workers."""

    def run(self) -> Outcome:
        try:
            while self._wait_for_room():
                goes_on = self._train() if self._start() else self._lost()
                if not goes_on:
                    break
        except _TimeIsUp:
            self.out.status = "time is up"
        return self._sum_up()

    def _sum_up(self) -> Outcome:
        out = self.out
        out.elapsed_s, out.steps, out.restarts = self.now, self.done, max(0, self.starts - 1)
        useful, held = out.worker_seconds["training"], sum(out.worker_seconds.values())
        paid = out.paid_node_s * self.job.workers_per_node
        out.goodput = useful / held if held else 0.0
        out.paid_share = useful / paid if paid else 0.0
        out.progress = self.done * self.job.step_s / self.now if self.now else 0.0
        return out

    # The fleet

    def _next(self) -> float:
        """When the fleet next changes."""
        return self.events[self.at].seconds if self.at < len(self.events) else FOREVER

    def _to(self, when: float, cause: Cause) -> None:
        """Let time pass in which the fleet stays as it is."""
        up = when > self.end
        seconds = max(0.0, (self.end if up else when) - self.now)
        self.out.seconds[cause] += seconds
        self.out.worker_seconds[cause] += seconds * self.held
        self.out.paid_node_s += seconds * self.standing
        self.now += seconds
        if up:
            raise _TimeIsUp

    def _change(self) -> Kind | None:
        """Apply everything that happens now → what went wrong, if workers were lost."""
        lost: Kind | None = None
        while self.at < len(self.events) and self.events[self.at].seconds <= self.now:
            event = self.events[self.at]
            self.at += 1
            node, workers = event.node, int(self.load[event.node])
            match event.kind:
                case "back":
                    self.up[node] = True
                    self.standing += 1
                case "notice":
                    self.told[node] = True
                    if workers:
                        self.leave = "preempted"
                case "gone":
                    if workers:
                        lost = "preempted" if self.told[node] else lost or "node lost"
                    self.up[node] = self.told[node] = False
                    self.standing -= 1
                    self.held -= workers
                    self.load[node] = 0
        self.verdict = lost or "node lost"
        return lost

    def _room(self) -> int:
        """Workers that fit on nodes without a notice."""
        return int((self.up & ~self.told).sum()) * self.job.workers_per_node

    def _spend(self, seconds: float, cause: Cause) -> bool:
        """→ whether the workers are all still there. What ends as a node goes has ended."""
        end = self.now + seconds
        while (when := self._next()) < end:
            self._to(when, cause)
            if self._change():
                return False
        self._to(end, cause)
        return True

    # Starting and leaving

    def _wait_for_room(self) -> bool:
        """→ whether there is room at last."""
        deadline = self.now + self.job.start_timeout_s
        while policy.choose_workers(self._room(), self.job.limits) is None:
            if (when := min(self._next(), deadline)) == FOREVER:
                when = self.end  # what stands is paid for until then, if it is known when
            if when < FOREVER:
                self._to(when, "waiting")
            if when in (FOREVER, self.end, deadline):
                self.out.status = "no room"
                return False
            self._change()
        return True

    def _start(self) -> bool:
        """→ whether the workers are all still there."""
        workers = policy.choose_workers(self._room(), self.job.limits)
        assert workers is not None
        each = self.job.workers_per_node
        nodes = np.flatnonzero(self.up & ~self.told)[: -(-workers // each)]
        self.load[nodes] = each
        self.load[nodes[-1]] = workers - each * (len(nodes) - 1)
        self.workers = self.held = workers
        self.starts += 1
        return self._spend(self.costs.restart_s, "restarting")

    def _lost(self) -> bool:
        """Workers were lost with their node → whether the run goes on."""
        self.out.unnoticed += 1
        kind, step = self.verdict, self.done
        if self.save is not None and self.save.ends <= self.now:
            self._durable()
        kept = dict(zip(("seconds", "worker_seconds"), self.kept, strict=True))
        for name, amount in kept.items():
            table: dict[Cause, float] = getattr(self.out, name)
            table["redone"] += table["training"] - amount
            table["training"] = amount
        self.out.steps_lost += self.done - self.saved
        self.done = self.saved
        self.load[:] = 0  # the others can't go on, and are held until that is known
        self.grows = FOREVER
        self._spend(self.costs.detect_s, "detecting")
        self._release()
        return self._decide(Failure(kind, "a node went", step, self.saved))

    def _release(self) -> None:
        self.load[:] = 0
        self.held = 0
        self.leave, self.grows = "", FOREVER
        self.save = None

    def _save_and_leave(self) -> bool:
        """→ whether the run goes on."""
        whole = self._spend(self._under_way(), "saving")
        if whole and self.save is not None:
            self._durable()
        began = self.now
        self._begin(began)
        if not (whole and self._spend(self.costs.save_s, "saving")):
            return self._lost()
        self._durable()
        why = self.leave
        self._release()
        if self.done == self.job.total_steps:
            return False
        if why == "growing":
            self.out.growths += 1
        else:
            self.out.noticed += 1
        return True

    def _decide(self, failure: Failure) -> bool:
        decision = policy.decide(failure, self.history, self.job.limits)
        self.history.append(failure)
        if not decision.restart:
            self.out.status, self.out.why = "given up", decision.why
            return False
        return self._spend(decision.wait_s, "waiting")

    # Training

    def _step_s(self) -> float:
        limits = self.job.limits
        return self.job.step_s * limits.rounds(self.workers) / limits.rounds(limits.max_workers)

    def _train(self) -> bool:
        """The steps of one start, until its workers leave → whether the run goes on."""
        hours = policy.expected_hours_between_failures(
            self.job.prior_hours, self.now / 3600, len(self.history)
        )
        pace = Pace(hours, lambda: self.now)
        step_s = self._step_s()
        self.fresh = True
        while True:
            if not self._steps(self._until_look(pace, step_s), step_s):
                return self._lost()
            if self.save is not None and self.save.ends <= self.now:
                self._durable()
                pace.measured(_Took(self.costs.save_s, self.costs.stall_s))
            if self.leave or self.done == self.job.total_steps:
                return self._save_and_leave()
            if not self._is_due(pace):
                continue
            if not self._spend(self._under_way(), "saving"):
                return self._lost()
            if self.save is not None:
                self._durable()
            self._begin(self.now)
            if not self._spend(self.costs.stall_s, "saving"):
                return self._lost()
            pace.begun()
            self._consider_growing()
            self._skip(pace, step_s)

    def _until_look(self, pace: Pace, step_s: float) -> int:
        """Steps until the run is over, a save is due, or the one under way is durable."""
        every, steps = self.job.every_steps, []
        if self.leave or self.fresh:
            return 1
        if self.job.total_steps is not None:
            steps.append(self.job.total_steps - self.done)
        if self.save is not None:
            steps.append(math.ceil(self._under_way() / step_s))
        if every != "auto":
            steps.append(every - self.done % every)
        elif self.save is None:
            steps.append(math.ceil(pace.due_in() / step_s))
        return max(1, min(steps))

    def _steps(self, steps: int, step_s: float) -> bool:
        """Make so many steps, or fewer where the workers are to leave → whether they are all
        still there."""
        begin = self.now
        try:
            while (when := min(self._next(), self.grows)) < begin + steps * step_s:
                self._to(when, "training")
                lost = self._change()
                made = math.floor((self.now - begin) / step_s)
                if lost:
                    self.done += made
                    return False
                self._consider_growing(made)
                if self.leave:  # the running step is finished
                    steps = made + 1
            self._to(begin + steps * step_s, "training")
        except _TimeIsUp:
            self.done += math.floor((self.now - begin) / step_s)
            raise
        self.done += steps
        if self.fresh:
            self.fresh = False
            self._consider_growing()
        return True

    def _consider_growing(self, made: int = 0) -> None:
        """`made`: steps that are not in `done` yet."""
        limits, step_s = self.job.limits, self._step_s()
        if self.leave or self.fresh or self.workers == limits.max_workers:
            self.grows = FOREVER
            return
        left_s = self.end - self.now
        if self.job.total_steps is not None:
            left_s = min(left_s, (self.job.total_steps - self.done - made) * step_s)
        restart_s = self.costs.restart_s + step_s
        better = policy.worth_growing(self.workers, self._room(), limits, left_s, restart_s)
        if not better:
            self.grows = FOREVER
        elif self.grows == FOREVER:
            self.grows = self.now + self.job.grow_after_s
        if self.grows <= self.now:
            self.leave, self.grows = "growing", FOREVER

    # Saving

    def _is_due(self, pace: Pace) -> bool:
        if self.job.every_steps == "auto":
            return pace.due() and self.save is None
        return self.done % self.job.every_steps == 0

    def _under_way(self) -> float:
        """Seconds until the save under way is durable."""
        return max(0.0, self.save.ends - self.now) if self.save is not None else 0.0

    def _begin(self, began: float) -> None:
        trained = (self.out.seconds["training"], self.out.worker_seconds["training"])
        self.save = _Save(self.done, trained, began + self.costs.save_s)

    def _durable(self) -> None:
        assert self.save is not None
        self.saved, self.kept = self.save.step, self.save.trained
        self.out.checkpoints += 1
        self.save = None

    def _skip(self, pace: Pace, step_s: float) -> None:
        """Pass over whole rounds of steps and save while nothing else happens.

        A day with a save every two minutes is 720 of them, and every one is like the other. What
        is left are the last two before something happens.
        """
        if self.job.every_steps != "auto" or self.save is None or self.leave:
            return
        if pace.every_s != interval_s(_Took(self.costs.save_s, self.costs.stall_s), pace.failure_s):
            return  # not measured yet
        steps = max(1, math.ceil(pace.every_s / step_s))
        whole_s = steps * step_s + self.costs.stall_s
        rounds = FOREVER
        if (quiet_till := min(self._next(), self.grows, self.end)) < FOREVER:
            rounds = (quiet_till - self.now) // whole_s - 2
        if self.job.total_steps is not None:
            rounds = min(rounds, (self.job.total_steps - self.done) // steps - 2)
        rounds = int(rounds)
        if rounds < 1 or self._under_way() > steps * step_s:
            return
        self._to(self.now + rounds * steps * step_s, "training")
        self._to(self.now + rounds * self.costs.stall_s, "saving")
        self.done += rounds * steps
        self.out.checkpoints += rounds - 1
        self._begin(self.now - self.costs.stall_s)
        newest = self.save
        seconds = steps * step_s
        before = (newest.trained[0] - seconds, newest.trained[1] - seconds * self.held)
        self.save = _Save(self.done - steps, before, self.now)
        self._durable()
        self.save = newest
        pace.begun()
