"""Simulated runs against runs computed by hand, against a plain clock that knows no shortcuts, and
against what must hold of every run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import numpy as np
import pytest

from trimpot.cluster import policy
from trimpot.cluster.policy import Limits
from trimpot.cluster.simulate import CAUSES, Costs, Job, Outcome, simulate
from trimpot.cluster.traces import Spot, Trace, draw_trace, parse_trace
from trimpot.runner.pace import FIRST_S, interval_s

COSTS = Costs(stall_s=1, save_s=4, restart_s=30, detect_s=15)
TWO = Limits(1, 2, micro_batches=2, preemptible=True)
JOB = Job(TWO, step_s=10, total_steps=10, every_steps=1000)
"""10 s a step with both workers, 20 with one."""


def run(lines: str, job: Job = JOB, costs: Costs = COSTS, nodes: int = 2) -> Outcome:
    return simulate(job, costs, parse_trace(lines, "test", nodes))


def times(outcome: Outcome) -> dict[str, float]:
    return {cause: seconds for cause, seconds in outcome.seconds.items() if seconds}


# --- by hand


def test_an_unbroken_run():
    outcome = run("")
    assert times(outcome) == {"restarting": 30, "training": 100, "saving": 4}
    assert (outcome.status, outcome.steps, outcome.restarts) == ("done", 10, 0)
    assert outcome.goodput == 100 / 134
    assert outcome.progress == 100 / 134
    assert outcome.paid_node_s == 2 * 134


def test_a_notice_loses_nothing_but_the_restart():
    """Step 3 is running at second 55 and ends at 60; the save at 64; one worker goes on at 94, and
    makes 7 steps of 20 s and the last save: 238. The second node is paid until second 175."""
    outcome = run("55,b,notice,120\n", dataclasses.replace(JOB), nodes=2)
    assert times(outcome) == {"restarting": 60, "training": 30 + 140, "saving": 8}
    assert outcome.elapsed_s == 238
    assert (outcome.noticed, outcome.unnoticed, outcome.steps_lost) == (1, 0, 0)
    assert outcome.worker_seconds["training"] == 2 * 30 + 140
    assert outcome.goodput == 200 / (2 * (30 + 30 + 4) + 30 + 140 + 4)
    assert outcome.paid_node_s == 238 + 175
    assert outcome.paid_share == 200 / (238 + 175)
    assert outcome.progress == 100 / 238


@pytest.mark.parametrize(("notice_s", "lost"), [(9, False), (8.9, True), (5, True), (4, True)])
def test_a_notice_must_be_longer_than_step_and_save(notice_s, lost):
    """At second 55 the running step has 5 s left, and the save takes 4."""
    outcome = run(f"55,b,notice,{notice_s}\n")
    gone = 55 + notice_s
    if not lost:
        assert outcome.steps_lost == 0
        assert outcome.elapsed_s == 238
        return
    steps = 2 if gone < 60 else 3
    assert outcome.steps_lost == steps
    assert outcome.seconds["redone"] == pytest.approx(min(gone, 60) - 30)
    assert outcome.seconds["saving"] == pytest.approx(max(0, gone - 60) + 4)
    assert outcome.elapsed_s == pytest.approx(gone + 15 + 30 + 200 + 4)


def test_without_notice_what_the_checkpoint_holds_is_kept():
    """A save of step 2 begins at second 50, stops training until 51 and is durable at 54. At 55
    the node goes: the 4 s of step 3 are lost. Missed at 70, started at 100, steps 3 and 4 until
    140."""
    job = dataclasses.replace(JOB, total_steps=4, every_steps=2)
    outcome = run("55,b,gone\n", job)
    assert times(outcome) == {
        "restarting": 60, "training": 20 + 40, "redone": 4, "saving": 1 + 4, "detecting": 15,
    }  # fmt: skip
    assert outcome.elapsed_s == 144
    assert (outcome.unnoticed, outcome.steps_lost, outcome.checkpoints) == (1, 0, 2)
    # While it was detected, one worker was left.
    assert outcome.worker_seconds["detecting"] == 15
    assert outcome.worker_seconds["redone"] == 8


def test_a_save_under_way_is_lost_with_the_node():
    job = dataclasses.replace(JOB, total_steps=4, every_steps=2)
    outcome = run("53,b,gone\n", job)
    assert times(outcome) == {
        "restarting": 60, "training": 80, "redone": 22, "saving": 1 + 1 + 4, "detecting": 15,
    }  # fmt: skip
    assert outcome.elapsed_s == 183
    assert outcome.steps_lost == 2


def test_room_that_came_back_is_grown_into_once_it_settled():
    """Back at second 200, and settled at 230. The step that runs then ends at 234 (94 + 7 · 20),
    saved at 238, two workers at 268: 10 steps are done, 90 take 900 s."""
    job = dataclasses.replace(JOB, total_steps=100)
    outcome = run("55,b,notice,120\n200,b,back\n", job)
    assert policy.SETTLE_S == 30
    assert (outcome.growths, outcome.noticed, outcome.restarts) == (1, 1, 2)
    assert times(outcome) == {"restarting": 90, "training": 30 + 140 + 900, "saving": 12}
    assert outcome.elapsed_s == 268 + 900 + 4


def test_growing_that_does_not_pay_is_left():
    """At second 230 four steps of 20 s are left: halving that wins less than a restart."""
    outcome = run("55,b,notice,120\n200,b,back\n")
    assert outcome.growths == 0
    assert outcome.elapsed_s == 238


def test_too_little_room_is_waited_for():
    """All gone at 35, while no step is done; missed at 50; one back at 100."""
    outcome = run("35,a,gone\n35,b,gone\n100,a,back\n", dataclasses.replace(JOB, total_steps=2))
    assert times(outcome) == {
        "restarting": 60, "redone": 5, "detecting": 15, "waiting": 50, "training": 40, "saving": 4,
    }  # fmt: skip
    assert outcome.worker_seconds["waiting"] == 0
    assert outcome.worker_seconds["detecting"] == 0
    assert outcome.unnoticed == 1


def test_no_room_ever_again():
    outcome = run("35,a,gone\n35,b,gone\n")
    assert (outcome.status, outcome.elapsed_s) == ("no room", 50)
    outcome = run("35,a,gone\n35,b,gone\n", dataclasses.replace(JOB, hours=1))
    assert (outcome.status, outcome.elapsed_s) == ("no room", 3600)


def test_a_node_that_goes_while_workers_start():
    outcome = run("20,b,gone\n", dataclasses.replace(JOB, total_steps=1))
    assert times(outcome) == {"restarting": 20 + 30, "detecting": 15, "training": 20, "saving": 4}


def test_a_notice_while_workers_start_is_heeded_after_their_first_step():
    outcome = run("20,b,notice,120\n", dataclasses.replace(JOB, total_steps=3))
    assert times(outcome) == {"restarting": 60, "training": 10 + 40, "saving": 8}


def test_idle_nodes_may_go():
    """Of 3 nodes, 2 workers of which 2 micro-batches can use are started."""
    outcome = run("55,c,notice,120\n60,d,gone\n", nodes=4)
    assert outcome.restarts in (0, 1)
    quiet = run("1,x,back\n55,x,gone\n", nodes=3)
    assert quiet.restarts == 0
    assert quiet.elapsed_s == 134


def test_the_pace_is_the_real_one():
    """The first save is due 60 s after the start, and begins with the step that ends then; the
    next after the interval of its measured cost."""
    job = Job(TWO, step_s=10, hours=0.5, prior_hours=24)
    outcome = run("", job)
    hours = policy.expected_hours_between_failures(24, 30 / 3600, 0)
    every = max(interval_s(_Took(4, 1), hours * 3600), 0)
    first = 30 + FIRST_S
    expected, at = 1, first + 1
    while (at := at + math.ceil(every / 10) * 10 + 1) - 1 + 4 <= 1800:
        expected += 1
    assert outcome.checkpoints == expected
    assert outcome.seconds["saving"] == expected
    assert (outcome.status, outcome.elapsed_s) == ("time is up", 1800)


@dataclasses.dataclass
class _Took:
    seconds: float
    stall_s: float


def test_where_nodes_may_not_go_the_run_gives_up():
    steady = dataclasses.replace(TWO, preemptible=False)
    lines = "".join(f"{100 + 300 * n},b,gone\n{200 + 300 * n},b,back\n" for n in range(9))
    steady = dataclasses.replace(steady, min_workers=2)
    job = dataclasses.replace(JOB, limits=steady, total_steps=100)
    outcome = run(lines, job)
    assert outcome.status == "given up"
    assert outcome.unnoticed == 4
    assert "4 failures without a new checkpoint" in outcome.why
    assert run(lines, dataclasses.replace(job, limits=TWO)).status == "done"


# --- against a plain clock


TICK = 0.25


class Lost(Exception):
    pass


class Plain:
    """The same rules on a clock that ticks four times a second: no spans, no jumps, no arrays."""

    def __init__(self, job: Job, costs: Costs, trace: Trace):
        self.job, self.costs = job, costs
        self.now = 0.0
        self.events = list(trace.happenings)
        self.up = {n: -1e9 for n, stands in enumerate(trace.standing) if stands}
        self.told: set[int] = set()
        self.used: set[int] = set()
        self.better_since: float | None = None
        self.fresh = True
        self.leave = ""
        self.done = self.saved = 0
        self.spent = dict.fromkeys(CAUSES, 0.0)
        self.history: list[policy.Failure] = []
        self.workers = 0

    def run(self) -> Plain:
        process = self.story()
        cause, left = next(process)
        try:
            while True:
                while left is not None and left <= 0:
                    cause, left = next(process)
                changed, lost = self.change()
                if lost:
                    cause, left = process.throw(Lost())
                elif changed and left is None:
                    cause, left = next(process)
                elif cause == "training":
                    self.consider()
                if left is not None and left <= 0:
                    continue
                self.spent[cause] += TICK
                self.now += TICK
                left = None if left is None else left - TICK
        except StopIteration:
            return self

    def change(self) -> tuple[bool, bool]:
        changed = lost = False
        while self.events and self.events[0].seconds == self.now:
            event, changed = self.events.pop(0), True
            if event.kind == "back":
                self.up[event.node] = self.now
            elif event.kind == "notice":
                self.told.add(event.node)
                self.leave = "preempted" if event.node in self.used else self.leave
            else:
                del self.up[event.node]
                self.told.discard(event.node)
                lost |= event.node in self.used
        return changed, lost

    def room(self) -> int:
        return sum(node not in self.told for node in self.up)

    def step_s(self) -> float:
        rounds = self.job.limits.rounds
        return self.job.step_s * rounds(self.workers) / rounds(self.job.limits.max_workers)

    def consider(self) -> None:
        """Looked at with every tick, as the real one is with every second."""
        if self.fresh or self.leave:
            return
        left_s = (self.job.total_steps - self.done) * self.step_s()
        restart_s = self.costs.restart_s + self.step_s()
        if policy.worth_growing(self.workers, self.room(), self.job.limits, left_s, restart_s):
            self.better_since = self.now if self.better_since is None else self.better_since
            if self.now - self.better_since >= self.job.grow_after_s:
                self.leave = "growing"
        else:
            self.better_since = None

    def story(self) -> Iterator[tuple[str, float | None]]:
        while self.done < self.job.total_steps:
            while (workers := policy.choose_workers(self.room(), self.job.limits)) is None:
                yield "waiting", None
            self.used = set(sorted(n for n in self.up if n not in self.told)[:workers])
            self.workers = workers
            try:
                yield from self.start()
            except Lost:
                self.used.clear()
                step, self.done = self.done, self.saved
                yield "detecting", self.costs.detect_s
                self.leave = ""
                failure = policy.Failure("node lost", "", step, self.saved)
                yield "waiting", policy.decide(failure, self.history, self.job.limits).wait_s
                self.history.append(failure)

    def start(self) -> Iterator[tuple[str, float | None]]:
        yield "restarting", self.costs.restart_s
        hours = policy.expected_hours_between_failures(
            self.job.prior_hours, self.now / 3600, len(self.history)
        )
        every_s, since = FIRST_S, self.now
        kept_s = self.spent["training"]
        flight: tuple[float, int, float] | None = None  # when durable, step, training until then
        self.fresh, self.better_since = True, None
        try:
            while True:
                yield "training", self.step_s()
                self.done += 1
                self.fresh = False
                if flight and flight[0] <= self.now:
                    _, self.saved, kept_s = flight
                    flight = None
                    every_s = interval_s(_Took(self.costs.save_s, self.costs.stall_s), hours * 3600)
                if self.leave or self.done == self.job.total_steps:
                    if flight:
                        yield "saving", flight[0] - self.now
                        _, self.saved, kept_s = flight
                        flight = None
                    yield "saving", self.costs.save_s
                    self.saved = self.done
                    self.used.clear()
                    self.leave = ""
                    return
                if flight is None and self.now - since >= every_s:
                    flight = (self.now + self.costs.save_s, self.done, self.spent["training"])
                    yield "saving", self.costs.stall_s
                    since = self.now
        except Lost:
            if flight and flight[0] <= self.now:
                _, self.saved, kept_s = flight
            self.spent["redone"] += self.spent["training"] - kept_s
            self.spent["training"] = kept_s
            raise


def on_the_grid(trace: Trace) -> Trace:
    moved = [
        dataclasses.replace(h, seconds=round(h.seconds / TICK) * TICK) for h in trace.happenings
    ]
    return dataclasses.replace(trace, happenings=tuple(moved))


@pytest.mark.parametrize("seed", range(24))
def test_a_plain_clock_says_the_same(seed):
    draw = np.random.default_rng(seed)
    nodes = int(draw.integers(2, 9))
    spot = Spot(
        nodes=nodes,
        hours_between=float(draw.choice([0.05, 0.15, 0.5])),
        life=("exponential", "weibull", "bathtub")[seed % 3],
        zones=2,
        zone_share=0.2,
        notice_s=float(draw.choice([0, 10, 40, 120])),
        noticed_share=0.7,
        back_s=float(draw.choice([60, 600])),
    )
    trace = on_the_grid(draw_trace(spot, 3.0, seed))
    limits = Limits(int(draw.integers(1, 3)), nodes, int(draw.integers(4, 30)), preemptible=True)
    job = Job(
        limits,
        step_s=float(draw.choice([0.25, 1.25, 5])) * limits.rounds(nodes),  # on the clock's grid
        total_steps=int(draw.integers(200, 600)),
        prior_hours=float(draw.choice([0.5, 4, 24])),
    )
    costs = Costs(
        stall_s=float(draw.choice([0.25, 2])), save_s=float(draw.choice([3, 12])),
        restart_s=float(draw.choice([15, 45])), detect_s=float(draw.choice([5, 20])),
    )  # fmt: skip
    ours, plain = simulate(job, costs, trace), Plain(job, costs, trace).run()
    for cause in CAUSES:
        assert ours.seconds[cause] == pytest.approx(plain.spent[cause], rel=1e-9), cause
    assert ours.elapsed_s == pytest.approx(plain.now, rel=1e-9)
    assert ours.steps == plain.done


# --- what must hold of every run

MEASURED = Costs(stall_s=0.05, save_s=1.0, restart_s=20.0, detect_s=20.0)
"""Rounded up from a run of two workers under Ray (LoRA of a tiny model, two cores that others used
too): stall 0.002 s, save 0.12 s, start 19.4 s. A lost node is known to Ray after 15 to 30 s."""
LIVES = ("exponential", "weibull", "bathtub")


def spot_runs(runs: int, costs: Costs = MEASURED, **changes: Any) -> list[Outcome]:
    """16 workers that 64 micro-batches keep busy, for 24 hours; one preemption in 0.7 to 10 hours,
    one of ten takes a quarter of the nodes."""
    draw, found = np.random.default_rng(0), []
    job = Job(Limits(1, 16, 64, preemptible=True), step_s=5, hours=24,
              prior_hours=policy.prior_hours(None, True))  # fmt: skip
    for seed in range(runs):
        between = math.exp(draw.uniform(math.log(0.7), math.log(10)))
        spot = Spot(16, between, LIVES[seed % 3], zones=4, zone_share=0.1)
        trace = draw_trace(dataclasses.replace(spot, **changes), 24, seed)
        found.append(simulate(job, costs, trace))
    return found


def goodputs(outcomes: list[Outcome]) -> tuple[float, float]:
    """(median, lowest)."""
    found = [outcome.goodput for outcome in outcomes]
    return median(found), min(found)


def reaches_the_bars(runs: int) -> None:
    for notice_s, wanted, least in ((120, 0.985, 0.97), (30, 0.985, 0.97), (0, 0.93, 0.84)):
        middle, lowest = goodputs(spot_runs(runs, notice_s=notice_s))
        assert middle >= wanted, notice_s
        assert lowest >= least, notice_s


def test_goodput_on_spot_nodes():
    reaches_the_bars(60)


@pytest.mark.chaos
def test_goodput_on_spot_nodes_in_many_runs():
    reaches_the_bars(1000)


def test_times_sum_up_and_shares_are_shares():
    changes = {"noticed_share": 0.5, "back_share": 0.7, "hours_between": 0.3}
    for outcome in spot_runs(12, **changes):
        assert sum(outcome.seconds.values()) == pytest.approx(outcome.elapsed_s, rel=1e-12)
        assert all(seconds >= 0 for seconds in outcome.seconds.values())
        assert 0 < outcome.paid_share <= outcome.goodput <= 1
        assert outcome.progress <= outcome.goodput
        held = sum(outcome.worker_seconds.values())
        assert held <= outcome.paid_node_s * (1 + 1e-12)
        left = outcome.noticed + outcome.unnoticed + outcome.growths
        assert 0 <= left - outcome.restarts <= 1  # the last may have had no time, or no room


def test_the_same_run_twice_is_the_same():
    assert spot_runs(3, notice_s=0) == spot_runs(3, notice_s=0)


def test_a_longer_notice_is_never_worse():
    """Over many runs; of one, other times of leaving may be luckier."""
    found = [
        mean(o.goodput for o in spot_runs(40, notice_s=notice_s)) for notice_s in (0, 3, 10, 120)
    ]
    assert all(longer > shorter - 5e-4 for shorter, longer in itertools.pairwise(found))
    assert found[-1] > found[0] + 0.003


def test_dearer_restarts_and_saves_lower_goodput():
    cheap, _ = goodputs(spot_runs(20))
    assert goodputs(spot_runs(20, dataclasses.replace(MEASURED, restart_s=120)))[0] < cheap - 0.01
    slow = dataclasses.replace(MEASURED, stall_s=20, save_s=30)
    assert goodputs(spot_runs(20, slow, notice_s=0))[0] < cheap - 0.01


def test_thousands_of_nodes():
    limits = Limits(64, 4000, 16000, preemptible=True)
    trace = draw_trace(Spot(4000, 0.7, zones=8, zone_share=0.2), 24, 0)
    outcome = simulate(Job(limits, 20, hours=24), MEASURED, trace)
    assert outcome.noticed > 15
    assert outcome.goodput > 0.97
    assert sum(outcome.seconds.values()) == pytest.approx(86400)


PLANTS: dict[str, tuple[Any, str, float]] = {
    "as few workers as are allowed": (
        ("choose_workers", lambda room, limits: 1 if room else None), "progress", 0.5,
    ),
    "never growing": (("worth_growing", lambda *_: None), "progress", 0.9),
    "growing all the time": (
        ("worth_growing", lambda workers, room, *_: workers), "goodput", 0.97,
    ),
    "never starting again": (
        ("decide", lambda *_: policy.Decision(False, 0, "no")), "steps", 8640,
    ),
    "waiting before each start": (
        ("decide", lambda *_: policy.Decision(True, 900, "later")), "progress", 0.95,
    ),
    "checkpoints as if nothing ever failed": (
        ("expected_hours_between_failures", lambda *_: 1e6), "goodput", 0.93,
    ),
    "checkpoints all the time": (
        ("expected_hours_between_failures", lambda *_: 1e-6), "goodput", 0.97,
    ),
}  # fmt: skip
"""(what is planted in policy.py, the figure that shows it, what it stays below)."""


@pytest.mark.parametrize("plant", PLANTS)
def test_a_bad_rule_shows(plant, monkeypatch):
    """The policy's own functions decide here: each planted fault lowers a figure that the rule as
    it is keeps."""
    (name, bad), figure, below = PLANTS[plant]
    costs = dataclasses.replace(MEASURED, stall_s=0.5, save_s=1.0)

    def found() -> float:
        return mean(getattr(o, figure) for o in spot_runs(12, costs, notice_s=0, back_share=1.0))

    good = found()
    monkeypatch.setattr(policy, name, bad)
    assert found() < min(below, good - 0.002)
    assert good >= below
