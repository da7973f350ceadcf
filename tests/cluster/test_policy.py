"""The rules by which a run goes on or ends: pure, so every corner is looked at."""

from __future__ import annotations

import itertools

import pytest

from trimpot.cluster.policy import (
    LONGEST_WAIT_S,
    Failure,
    Limits,
    choose_workers,
    decide,
    expected_hours_between_failures,
    prior_hours,
    worth_growing,
)
from trimpot.runner.config import CheckpointSection

LIMITS = Limits(1, 8, micro_batches=8)


def failed(kind="crash", step=5, saved=4, text="worker 1 died") -> Failure:
    return Failure(kind, text, step, saved)


def test_a_preemption_is_never_counted():
    history = [failed("preempted") for _ in range(50)]
    assert decide(failed("preempted"), history, LIMITS).restart
    assert decide(failed("crash"), history, LIMITS).restart


def test_a_lost_node_counts_unless_nodes_may_go():
    history = [failed("node lost") for _ in range(3)]
    assert not decide(failed("node lost"), history, LIMITS).restart
    spot = Limits(1, 8, 8, preemptible=True)
    assert decide(failed("node lost"), history * 9, spot).restart


def test_a_crash_loop_ends_and_progress_resets_the_count():
    history = [failed(step=i, saved=4) for i in range(3)]
    decision = decide(failed(), history, LIMITS)
    assert not decision.restart
    assert "4 failures without a new checkpoint" in decision.why
    assert decide(failed(step=9, saved=8), history, LIMITS).restart
    assert decide(failed(), history, Limits(1, 8, 8, max_failures=4)).restart


def test_no_failure_is_allowed_where_none_is():
    assert not decide(failed(), [], Limits(1, 1, 1, max_failures=0)).restart


@pytest.mark.parametrize("kind", ["exception", "out of memory"])
def test_the_same_error_at_the_same_step_is_a_bug(kind):
    decision = decide(failed(kind), [failed(kind)], LIMITS)
    assert not decision.restart
    assert "twice after step 5" in decision.why
    assert decide(failed(kind), [failed(kind, step=4)], LIMITS).restart
    assert decide(failed(kind), [failed(kind, text="another")], LIMITS).restart
    assert decide(failed(kind), [failed("crash")], LIMITS).restart


def test_a_mistake_is_never_retried():
    assert not decide(failed("mistake"), [], LIMITS).restart


def test_waits_grow_while_nothing_is_won():
    limits = Limits(1, 8, 8, max_failures=99)
    waits = [decide(failed(), [failed()] * n, limits).wait_s for n in range(12)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_S
    assert decide(failed(saved=9), [failed()] * 9, limits).wait_s == 0


def test_as_many_workers_as_save_a_round():
    limits = Limits(1, 8, micro_batches=8)
    assert [choose_workers(room, limits) for room in range(10)] == [
        None, 1, 2, 3, 4, 4, 4, 4, 8, 8,
    ]  # fmt: skip


def test_chosen_workers_are_allowed_fit_and_are_the_fewest():
    sizes = itertools.product(range(12), (1, 2, 3), (3, 4, 8), (1, 3, 6, 8, 12), (1, 2))
    for room, least, most, micros, split in sizes:
        limits = Limits(least, most, micros, split)
        chosen = choose_workers(room, limits)
        able = [w for w in range(split, min(room, most) + 1, split) if w >= least]
        if not able:
            assert chosen is None
            continue
        best = min(limits.rounds(w) for w in able)
        assert chosen == min(w for w in able if limits.rounds(w) == best), (room, limits)


def test_growing_must_pay():
    assert worth_growing(2, 8, LIMITS, left_s=3600, restart_s=30) == 8
    assert worth_growing(2, 8, LIMITS, left_s=60, restart_s=30) is None
    assert worth_growing(8, 8, LIMITS, left_s=3600, restart_s=30) is None
    # 5 workers need as many rounds as 4.
    assert worth_growing(4, 5, LIMITS, left_s=1e9, restart_s=1) is None


def test_failures_shorten_what_is_expected():
    assert expected_hours_between_failures(24, 0, 0) == 24
    assert expected_hours_between_failures(24, 240, 0) == 264
    assert expected_hours_between_failures(24, 100, 99) == pytest.approx(1.24)


def test_what_is_said_is_expected_and_else_less_where_nodes_may_go():
    assert prior_hours(11, True) == prior_hours(11, False) == 11
    assert prior_hours(None, False) == CheckpointSection().hours_between_failures == 24
    assert prior_hours(None, True) == 4
    assert CheckpointSection().hours_said is None
    assert CheckpointSection(hours_between_failures=24).hours_said == 24
