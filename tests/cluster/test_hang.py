"""The rules of hang.py, over pulses as workers would write them; 1,000 simulated hours of them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest

from trimpot.cluster.hang import (
    FLOOR_S,
    LONG_S,
    NO_PULSE_S,
    WINDOWS,
    Sights,
    Stragglers,
    find_hang,
    limit_s,
)
from trimpot.runner.pulse import WINDOW, Beat

CALM = Beat(
    rank=0, count=1, pid=1, born=0.0, node="n", host="h", section="forward", step=9, marks=90,
    held_s=0.0, collectives=30, collective="gloo:all_reduce [5]", waiting=False, steps=20,
    step_s=1.0, longest_s=1.5, save_s=0.0, own_s=0.0, token_s=0.0, over=False,
)  # fmt: skip


def beat(rank: int, **changes) -> Beat:
    return dataclasses.replace(CALM, rank=rank, **changes)


def watched(
    *beats: Beat, seconds: float, silent: tuple[int, ...] = (), world: int | None = None
) -> tuple[Sights, float]:
    """Sights of workers that were in these places for so long, looked at each second."""
    sights = Sights(world or len(beats))
    now = 0.0
    while True:
        count = 1 + int(now)
        sights.observe(
            {b.rank: b if b.rank in silent else dataclasses.replace(b, count=count) for b in beats},
            now,
        )
        if now >= seconds:
            return sights, now
        now = min(seconds, now + 1)


def found(*beats: Beat, **options):
    return find_hang(*watched(*beats, **options))


def later(sights: Sights, now: float, **changes):
    """What is found once another beat of worker 1, from where it was, has come."""
    sights.observe({1: beat(1, count=int(1000 * now), **changes)}, now)
    return find_hang(sights, now)


WAITING = {"section": "collective", "waiting": True, "collectives": 31}


def test_a_worker_that_stopped_is_named():
    hang = found(beat(0, **WAITING), beat(1), beat(2, **WAITING), seconds=6, silent=(1,))
    assert hang is not None
    assert (hang.rank, hang.ranks, hang.silent) == (1, (1,), (1,))
    assert "worker 1 on h stood still for 6 s in forward of step 9" in hang.text
    assert "its process does not run" in hang.text
    assert "after gloo:all_reduce [5], number 30" in hang.text
    assert "workers 0, 2 wait in gloo:all_reduce [5], number 31" in hang.text


def test_the_last_pulse_of_a_stopped_worker_may_be_of_its_start():
    """Steps of 0.05 s: it was stopped in the 12th, and told last of its engine."""
    early = beat(1, section="engine", step=0, steps=0, collectives=2)
    fast = {"steps": 10, "step_s": 0.05, "longest_s": 0.06}
    hang = found(beat(0, **WAITING, **fast), early, seconds=6, silent=(1,))
    assert hang is not None and hang.rank == 1
    # As long as nobody has timed a step, or its pulse arrives, it may well be there.
    assert found(beat(0, **WAITING, steps=2), early, seconds=60, silent=(1,)) is None
    assert found(beat(0, **WAITING, **fast), early, seconds=60) is None


def test_a_worker_that_others_wait_for_is_named():
    hang = found(beat(0, **WAITING), beat(1, section="data"), seconds=6)
    assert hang is not None and hang.rank == 1 and hang.silent == ()
    assert "in data of step 9" in hang.text
    # Where the recorder is not there, who is at the lower step.
    blind = {"collectives": 0, "collective": ""}
    hang = found(beat(0, **blind, step=10), beat(1, **blind), seconds=6)
    assert hang is not None and hang.rank == 1


def test_nobody_is_named_where_all_wait_alike():
    hang = found(beat(0, **WAITING), beat(1, **WAITING), seconds=6)
    assert hang is not None and hang.rank is None
    assert "all 2 workers stood still" in hang.text and "network" in hang.text


def test_one_worker_alone_is_named():
    hang = found(beat(0, section="data"), seconds=6)
    assert hang is not None and hang.rank == 0


def test_one_that_moves_is_enough():
    sights, now = watched(beat(0, **WAITING), beat(1), seconds=4)
    sights.observe({1: beat(1, count=99, marks=91)}, now)
    assert later(sights, now + 4.9, marks=91) is None
    assert later(sights, now + 5.1, marks=91) is not None


@pytest.mark.parametrize(
    ("place", "allowed_s"),
    [
        ({}, FLOOR_S),
        ({"step_s": 4.0, "longest_s": 5.0}, 12.0),
        ({"step_s": 4.0, "longest_s": 20.0}, 30.0),
        ({"steps": 2}, LONG_S),
        ({"section": "compile"}, LONG_S),
        ({"section": "generate: answer"}, LONG_S),
        ({"section": "evaluate: forward"}, 60.0),
        ({"section": "evaluate: forward", "step_s": 9.0, "longest_s": 9.0}, 90.0),
        ({"section": "save"}, LONG_S),
        ({"section": "save: collective", "save_s": 90.0}, 900.0),
    ],
)
def test_each_section_has_its_time(place, allowed_s):
    assert limit_s(beat(0, **place)) == allowed_s
    waits = {**WAITING, "step_s": place.get("step_s", 1.0)}
    # Those that wait have what the one that they wait for has.
    assert found(beat(0, **waits), beat(1, **place), seconds=allowed_s - 0.5) is None
    hang = found(beat(0, **waits), beat(1, **place), seconds=allowed_s + 0.5)
    assert hang is not None and hang.rank == 1


def test_storage_that_stands_still_is_given_more_time():
    both = (beat(0), beat(1))
    assert found(*both, seconds=NO_PULSE_S - 1, silent=(0, 1)) is None
    hang = found(*both, seconds=NO_PULSE_S + 1, silent=(0, 1))
    assert hang is not None and "no pulse arrives" in hang.text


def test_a_worker_that_never_came_is_named():
    start = {"steps": 0, "section": "start"}
    assert found(beat(0, **start), seconds=LONG_S - 1, world=2) is None
    hang = found(beat(0, **start), seconds=LONG_S + 1, world=2)
    assert hang is not None and hang.rank == 1
    assert "worker 1 gave no sign of life" in hang.text


def test_those_that_ended_are_not_waited_for():
    assert found(beat(0, over=True), beat(1, over=True), seconds=999) is None
    hang = found(beat(0, over=True), beat(1, section="data"), seconds=6)
    assert hang is not None and hang.rank == 1


def test_a_watcher_that_was_stopped_blames_nobody():
    sights, now = watched(beat(0), beat(1), seconds=3)
    sights.forgive(100.0)
    assert later(sights, now + 101) is None
    assert later(sights, now + 103) is not None


# --- 1,000 hours without a hang


def simulated(hours: float, median_s: float, sigma: float, seed: int) -> Iterator[tuple]:
    """(when the watcher looks, {rank: beat}) of two workers whose steps are log-normal.

    Each step is data, forward, backward, collective; one in 200 has a garbage collection of up to
    3 s in it, one in 100 is followed by an evaluation of up to 30 s without a mark, one in 100 by a
    save of up to 300 s. A beat is up to a second old, and 1 % of them reach the watcher up to 3 s
    late. Only the last look before each change is made: in between nothing but time goes by. An
    odd seed has no flight recorder: nobody is seen to wait.
    """
    draw = random.Random(seed)
    clocks = [draw.uniform(0, 3600) for _ in range(2)]  # a beat says nothing of them
    times: list[float] = []
    blind = seed % 2 == 1
    timed = {"steps": 0, "step_s": 0.0, "longest_s": 0.0}
    now, marks, step, shown = 0.0, 0, 0, 0.0

    def moved(section: str, took_s: list[float]) -> Iterator[tuple]:
        """Both enter a section and are in it for so long each; the first to leave it waits."""
        nonlocal now, marks, shown
        marks += 1
        late = draw.uniform(0, 1) + (draw.uniform(0, 3) if draw.random() < 0.01 else 0.0)
        seen = max(shown, now + late)
        ends = [now + took + 1.0 for took in took_s]  # when the watcher may still not see it
        for at in (seen, min(ends), max(ends) - 0.001):
            if at < shown:
                continue
            shown = at
            met = [0 if blind else int(at >= end) for end in ends]
            yield at, {
                rank: beat(
                    rank, count=int(at + clocks[rank]), section=section, step=step, marks=marks,
                    waiting=bool(met[rank]), collectives=30 + met[rank],
                    **timed,
                )
                for rank in range(2)
            }  # fmt: skip
        now += max(took_s)

    while now < hours * 3600:
        step += 1
        began = now
        slowed = draw.uniform(0, 3) if draw.random() < 1 / 200 else 0.0
        for section, share in (("data", 0.02), ("forward", 0.3), ("backward", 0.68)):
            took = [median_s * share * math.exp(sigma * draw.gauss(0, 1)) for _ in range(2)]
            if section == "backward":
                took[draw.randrange(2)] += slowed
            yield from moved(section, took)
        times.append(now - began)
        del times[:-256]
        recent = sorted(times[-64:])
        timed = {
            "steps": len(times), "step_s": recent[len(recent) // 2], "longest_s": max(times)
        }  # fmt: skip
        if draw.random() < 0.01:
            yield from moved("evaluate: forward", [draw.uniform(0, 30)] * 2)
        if draw.random() < 0.01:
            yield from moved("save", [draw.uniform(0, 300), 0.0])


SIMULATED = [(5, 0.5, 0.3), (15, 2.0, 0.4), (50, 6.0, 0.4), (230, 30.0, 0.4), (700, 120.0, 0.3)]
"""Hours, median seconds of a step, sigma of its logarithm: 1,000 hours together."""


@pytest.mark.parametrize(("hours", "median_s", "sigma"), SIMULATED)
def test_no_false_alarm(hours, median_s, sigma):
    sights, looks = Sights(2), 0
    for now, beats in simulated(hours, median_s, sigma, seed=int(hours) // 5):
        sights.observe(beats, now)
        hang = find_hang(sights, now)
        assert hang is None, (now, hang)
        looks += 1
    assert looks > 1000


@pytest.mark.parametrize(("hours", "median_s", "sigma"), SIMULATED)
def test_a_simulated_hang_is_named_in_time(hours, median_s, sigma):
    """The same worlds in which worker 1 stops after a while."""
    sights, now, beats = Sights(2), 0.0, {}
    for now, beats in simulated(hours, median_s, sigma, seed=int(hours) // 5):
        sights.observe(beats, now)
        if beats[1].step > 300 and beats[1].section == "forward":
            break
    stopped = now
    while True:
        now += 1
        moved = dataclasses.replace(beats[0], count=beats[0].count + int(now), **WAITING)
        sights.observe({0: moved, 1: beats[1]}, now)
        if (hang := find_hang(sights, now)) is not None:
            break
    assert (hang.rank, hang.silent) == (1, (1,))
    longest = max(FLOOR_S, 3 * beats[1].step_s, 1.5 * beats[1].longest_s)
    assert now - stopped <= longest + 5


# --- stragglers


def windows(ratio: float, sigma: float, count: int, seed: int, world: int = 4) -> Iterator[dict]:
    """Beats after each WINDOW steps; worker 2 takes `ratio` times as long."""
    draw = random.Random(seed)
    for window in range(1, count + 1):
        own = {
            rank: sorted(
                math.exp(sigma * draw.gauss(0, 1)) * (ratio if rank == 2 else 1.0)
                for _ in range(WINDOW)
            )[WINDOW // 2]
            for rank in range(world)
        }
        yield {
            rank: beat(rank, step=window * WINDOW, step_s=2.0, own_s=s, token_s=s / 64)
            for rank, s in own.items()
        }


def told(beats: Iterator[dict], world: int = 4) -> list[tuple[int, int]]:
    rule = Stragglers()
    return [
        (number, slow.rank) for number, b in enumerate(beats, 1) for slow in rule.observe(b, world)
    ]


def test_a_slow_worker_is_told_once():
    assert told(windows(1.8, 0.05, 50, seed=1)) == [(WINDOWS, 2)]


def test_one_with_more_to_do_is_not_slow():
    more = [
        {
            rank: dataclasses.replace(b, own_s=2 * b.own_s) if rank == 2 else b
            for rank, b in beats.items()
        }
        for beats in windows(1.0, 0.05, 50, seed=1)
    ]
    assert told(iter(more)) == []


def test_it_is_told_again_when_it_got_worse_or_came_back():
    parts = [windows(r, 0.05, 10, seed=s) for s, r in enumerate((2.0, 4.0, 1.0, 2.0))]
    beats, step = [], 0
    for part in parts:
        for b in part:
            step += WINDOW
            beats.append({r: dataclasses.replace(x, step=step) for r, x in b.items()})
    assert [rank for _, rank in told(iter(beats))] == [2, 2, 2]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_no_straggler_is_seen_in_noise(world):
    """20,000 windows are 1,000 hours of steps of 9 s."""
    assert told(windows(1.0, 0.5, 20_000 // world, seed=world, world=world), world) == []
