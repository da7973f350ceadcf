"""Traces of preemptions: what a file may say, and that what is drawn has the stated statistics."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from trimpot.cluster.traces import (
    HEADER,
    Happening,
    Spot,
    draw_trace,
    parse_trace,
    read_trace,
    to_csv,
)
from trimpot.runner.errors import DataError

# --- files


def test_a_file_is_read():
    trace = parse_trace(
        f"{HEADER}\n# of last Tuesday\n55,spot-1,notice,120\n\n60.5, spot-0 , GONE\n"
        "300,spot-1,back,\n310,spot-2,back\n",
        "t.csv",
        nodes=4,
    )
    assert trace.nodes == ("spot-1", "spot-0", "spot-2", "node-0")
    assert trace.standing == (True, True, False, True)
    assert trace.happenings == (
        Happening(55, 0, "notice"),
        Happening(60.5, 1, "gone"),
        Happening(175, 0, "gone"),
        Happening(300, 0, "back"),
        Happening(310, 2, "back"),
    )


def test_a_gone_line_says_more_than_the_notice():
    lines = "55,a,notice,120\n62,a,gone\n70,b,notice\n90,b,gone\n"
    found = [(h.seconds, h.kind) for h in parse_trace(lines, "t").happenings]
    assert found == [(55, "notice"), (62, "gone"), (70, "notice"), (90, "gone")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("5,a\n", "line 1: 2 values; seconds,node,event,notice_s are wanted"),
        ("5,a,gone,,\n", "line 1: 5 values"),
        ("5,a,gone\nx,b,gone\n", "line 2: seconds is 'x'; a number, 0 or more"),
        ("-5,a,gone\n", "line 1: seconds is '-5'"),
        ("nan,a,gone\n", "line 1: seconds is 'nan'"),
        ("1e999,a,gone\n", "line 1: seconds is '1e999'"),
        ("5,a,gone\n4,b,gone\n", "line 2: second 4 comes after second 5; sort"),
        ("5,,gone\n", "line 1: no node"),
        ("5,a,vanished\n", "line 1: event is 'vanished'; notice, gone or back"),
        ("5,a,gone,30\n", "line 1: notice_s stands beside gone"),
        ("5,a,notice,soon\n", "line 1: notice_s is 'soon'"),
        ("5,a,gone\n6,a,gone\n", "line 2: a is gone; before gone a back is wanted"),
        ("5,a,back\n6,a,back\n", "line 2: a is back, and was not gone"),
        ("5,a,notice,30\n6,a,notice,30\n", "line 2: a is under notice since line 1"),
        ("5,b,gone\n5,a,notice\n", "line 2: when a goes is not said; give notice_s"),
        ("5,a,notice,30\n6,a,back\n", "line 2: a is back at second 6, and goes at second 35"),
        ("seconds,host,event\n", "line 1: columns seconds, host, event; seconds,node,event"),
        ('5,"a,gone\n', "line 1: unexpected end of data"),
        ("", "has no event"),
    ],
)
def test_a_bad_line_is_named(lines, says):
    with pytest.raises(DataError) as caught:
        parse_trace(lines, "t.csv")
    assert str(caught.value).startswith("t.csv")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "none.csv", tmp_path / "binary", tmp_path):
        with pytest.raises(DataError, match="a trace is CSV"):
            read_trace(path)


def test_what_is_written_reads_back(tmp_path):
    spot = Spot(8, 0.2, "weibull", zones=2, zone_share=0.3, noticed_share=0.5, back_share=0.7)
    trace = draw_trace(spot, 6, seed=3)
    path = tmp_path / "trace.csv"
    path.write_text(to_csv(trace))
    back = read_trace(path, nodes=8)
    assert len(trace.happenings) > 20
    assert [back.nodes[h.node] for h in back.happenings] == [
        trace.nodes[h.node] for h in trace.happenings
    ]
    assert [h.kind for h in back.happenings] == [h.kind for h in trace.happenings]
    for ours, theirs in zip(back.happenings, trace.happenings, strict=True):
        assert ours.seconds == pytest.approx(theirs.seconds, abs=6e-4)


# --- statistics


def firsts(spot: Spot, hours: float, seeds: range) -> list[list[Happening]]:
    """The first words of preemptions: notices, and nodes that went without one."""
    found = []
    for seed in seeds:
        told: set[int] = set()
        words = []
        for happening in draw_trace(spot, hours, seed).happenings:
            if happening.kind == "notice":
                told.add(happening.node)
                words.append(happening)
            elif happening.kind == "gone" and happening.node not in told:
                words.append(happening)
            elif happening.kind == "gone":
                told.discard(happening.node)
        found.append(words)
    return found


@pytest.mark.parametrize("life", ["exponential", "weibull", "bathtub"])
def test_preemptions_come_as_often_as_asked_at_all_times(life):
    """300 nodes for 20 hours, one preemption in half an hour: 40 each. A quarter of the time has a
    quarter of them: what stands at second 0 is in the middle of its life."""
    spot = Spot(300, 0.5, life, back_s=1.0)
    seeds = range(30)
    times = [h.seconds for words in firsts(spot, 20, seeds) for h in words]
    expected = 40 * len(seeds)
    assert len(times) == pytest.approx(expected, abs=4 * math.sqrt(expected))
    for part in range(4):
        count = sum(part * 18000 <= t < (part + 1) * 18000 for t in times)
        assert count == pytest.approx(expected / 4, abs=4 * math.sqrt(expected / 4))


def ends(life: str, hours_between: float) -> np.ndarray:
    """How long nodes that came back stood then, in units of the mean: one node, for long."""
    spot = Spot(1, hours_between, life, notice_s=0, back_s=0.0)
    times = [h.seconds for words in firsts(spot, 3000 * hours_between, range(3)) for h in words]
    lives = np.diff(times)
    return lives[lives > 0] / (hours_between * 3600)


def test_lives_have_their_distribution():
    """Against the distribution functions, in closed form: no gap over that of 1 in 1,000 chances
    (Kolmogorov)."""
    longest = 2 / (1 / 24 + 1 - 1 / 30)
    known = {
        "exponential": lambda t: 1 - np.exp(-t),
        "weibull": lambda t: 1 - np.exp(-((t * math.gamma(1 + 1 / 0.7)) ** 0.7)),
        "bathtub": lambda t: np.where(
            t >= longest,
            1.0,
            (1 - np.exp(-24 * t / longest) + np.exp(30 * (t - longest) / longest)) / 2,
        ),
    }
    for life, cdf in known.items():
        lives = np.sort(ends(life, 2.0))
        assert len(lives) > 5000
        assert lives.mean() == pytest.approx(1, rel=0.06)
        steps = np.arange(len(lives)) / len(lives)
        assert np.abs(cdf(lives) - steps).max() < 1.95 / math.sqrt(len(lives)), life


def test_a_zone_goes_together():
    spot = Spot(12, 1.0, zones=3, zone_share=1.0, notice_s=30, back_s=60)
    for words in firsts(spot, 24, range(5)):
        times = sorted({h.seconds for h in words})
        assert times
        for at in times:
            nodes = {h.node for h in words if h.seconds == at}
            assert nodes <= {n for n in range(12) if n % 3 == min(nodes) % 3}
        assert np.mean([sum(h.seconds == at for h in words) for at in times]) > 3


def test_shares_are_kept():
    spot = Spot(400, 0.1, noticed_share=0.7, back_share=0.6, notice_s=30)
    happenings = [h for seed in range(4) for h in draw_trace(spot, 24, seed).happenings]
    kinds = {k: sum(h.kind == k for h in happenings) for k in ("notice", "gone", "back")}
    assert kinds["notice"] / kinds["gone"] == pytest.approx(0.7, abs=0.06)
    assert kinds["back"] / kinds["gone"] == pytest.approx(0.6, abs=0.06)
    silent = draw_trace(dataclasses.replace(spot, notice_s=0), 24, 0).happenings
    assert not any(h.kind == "notice" for h in silent)


def test_the_same_seed_draws_the_same():
    spot = Spot(16, 1.0, "bathtub", zones=4, zone_share=0.2)
    assert draw_trace(spot, 24, 7) == draw_trace(spot, 24, 7)
    assert draw_trace(spot, 24, 7) != draw_trace(spot, 24, 8)
