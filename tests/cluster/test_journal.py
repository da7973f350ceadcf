import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimpot.cluster import journal
from trimpot.cluster.journal import NAME, follow, history, read, whole_bytes
from trimpot.runner.errors import UserError


def start(at: float, resumed_from: int | None = None) -> dict[str, Any]:
    return {
        "kind": "start",
        "time": at,
        "run_dir": "/runs/one",
        "resumed_from": resumed_from,
        "config": {"tracking": {"run_name": None}},
    }


def step(number: int, at: float, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "time": at,
        "step": number,
        "loss": loss,
        "tokens": 100,
        "seconds": 2.0,
        "memory_bytes": 1000 + number,
        **more,
    }


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "time": 0.0, "step": number, "loss": loss}


def end(status: str, number: int, seconds: float, at: float, **more: Any) -> dict[str, Any]:
    return {"kind": "end", "time": at, "status": status, "step": number, "seconds": seconds, **more}


def sample(when: str, answer: str) -> dict[str, Any]:
    return {
        "kind": "sample",
        "time": 0.0,
        "when": when,
        "prompt": "p",
        "answer": answer,
        "reference": "r",
    }


def lines(events: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    events = [start(1.0), step(1, 2.0), {"kind": "warning", "time": 3.0, "text": "größer →"}]
    (tmp_path / NAME).write_bytes(lines(events))
    assert read(tmp_path) == events


@pytest.mark.parametrize("cut", range(1, len(lines([step(2, 3.0, text="→")])) - 1))
def test_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path, cut: int) -> None:
    whole, torn = [start(1.0), step(1, 2.0)], lines([step(2, 3.0, text="→")])[:-1]
    (tmp_path / NAME).write_bytes(lines(whole) + torn[:cut])
    assert read(tmp_path) == (whole if cut < len(torn) else [*whole, step(2, 3.0, text="→")])


def test_line_without_its_newline_is_whole(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(lines([start(1.0), step(1, 2.0)])[:-1])
    assert read(tmp_path) == [start(1.0), step(1, 2.0)]


@pytest.mark.parametrize("glue", [b"", b"\n"])
def test_start_behind_a_torn_line_is_kept(tmp_path: Path, glue: bytes) -> None:
    torn = lines([start(1.0) | {"config": {"optim": {"batch_size": 4}}}])[:-12]
    again = [start(9.0), step(1, 10.0)]
    if glue:  # the driver comes first, and ends the torn line
        again.insert(0, {"kind": "phase", "time": 8.0, "name": "ray", "seconds": 1.0})
    (tmp_path / NAME).write_bytes(lines([start(1.0)]) + torn + glue + lines(again))
    assert read(tmp_path) == [start(1.0), *again]


def test_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    before, after = [start(1.0)], [step(1, 2.0)]
    (tmp_path / NAME).write_bytes(lines(before) + b'\x00\xff{"kind"\n[1, 2]\n' + lines(after))
    events = read(tmp_path)
    assert [e["kind"] for e in events] == ["start", "warning", "warning", "step"]
    assert events[1]["text"] == "line 2 of journal.jsonl is damaged and left out"
    assert history(events).warnings == tuple(events[1:3])


def test_no_journal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"journal.jsonl is not there; give the folder of a run"):
        read(tmp_path / "nowhere")


def test_resume_supersedes_later_steps() -> None:
    first = [start(0.0), evaluation(0, 4.0), *(step(n, 10.0 * n) for n in range(1, 8))]
    first += [evaluation(4, 3.0), evaluation(6, 2.5), sample("before", "old")]
    second = [start(100.0, 4), step(5, 110.0, 0.5), evaluation(5, 2.0), sample("after", "new")]
    run = history([*first, *second, end("done", 5, 12.0, 112.0)])
    assert [s["step"] for s in run.steps] == [1, 2, 3, 4, 5]
    assert [s["loss"] for s in run.steps] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert run.held_out == [(0, 4.0), (4, 3.0), (5, 2.0)]
    assert [session.steps_redone for session in run.sessions] == [0, 3]
    assert run.start["resumed_from"] == 4
    # The first was killed at its last line; the second says itself how long it took.
    assert [session.seconds for session in run.sessions] == [0.0, 12.0]


def test_resume_that_has_done_nothing_yet() -> None:
    first = [start(0.0), *(step(n, 1.0) for n in range(1, 8)), evaluation(5, 3.0)]
    run = history([*first, start(9.0, 4)])
    assert [s["step"] for s in run.steps] == [1, 2, 3, 4]
    assert run.evals == ()
    assert run.last_step == 4


def test_killed_session_lasts_to_its_last_line() -> None:
    run = history([start(100.0), step(1, 130.0), start(500.0, 1), step(2, 507.5)])
    assert [session.seconds for session in run.sessions] == [30.0, 7.5]
    assert run.seconds == 37.5
    assert run.end is None


def test_answers_of_superseded_weights_are_dropped() -> None:
    first = [start(0.0), sample("before", "a"), *(step(n, 1.0) for n in (1, 2, 3))]
    again = [*first, sample("after", "of step 3"), start(9.0, 2), step(3, 10.0)]
    assert history(again).answers == [
        {"prompt": "p", "reference": "r", "before": "a", "after": None}
    ]
    longer = [*first, sample("after", "of step 3"), start(9.0, 3), step(4, 10.0)]
    assert history(longer).answers[0]["after"] == "of step 3"


def test_start_from_nothing_supersedes_all_but_the_warnings() -> None:
    warning = {"kind": "warning", "time": 2.0, "text": "w"}
    old = [start(0.0), evaluation(0, 9.0), sample("before", "x"), step(1, 1.0), warning]
    run = history([*old, start(5.0), evaluation(0, 4.0)])
    assert run.steps == ()
    assert run.held_out == [(0, 4.0)]
    assert run.samples == ()
    assert run.warnings == (warning,)


def test_a_straggler_is_a_warning() -> None:
    slow = {"kind": "straggler", "time": 2.0, "rank": 1, "text": "worker 1 is slow"}
    assert history([start(0.0), step(1, 1.0), slow]).warnings == (slow,)


def test_history_of_history_is_the_same() -> None:
    events = [start(0.0), step(1, 1.0), step(2, 2.0), start(3.0, 1), step(2, 4.0, 0.7)]
    run = history(events)
    assert [s["loss"] for s in run.steps] == [1.0, 0.7]
    assert history(run.steps).steps == run.steps


def test_phases_belong_to_the_last_start() -> None:
    def phase(name: str, seconds: float) -> dict[str, Any]:
        return {"kind": "phase", "time": 0.0, "name": name, "seconds": seconds}

    first = [phase("ray", 1.0), start(0.0), phase("model", 2.0), step(1, 1.0)]
    again = [phase("ray", 3.0), start(5.0, 1), phase("model", 4.0)]
    phases = history([*first, end("interrupted", 1, 1.0, 2.0), *again]).phases
    assert [(p["name"], p["seconds"]) for p in phases] == [("ray", 3.0), ("model", 4.0)]


def test_figures() -> None:
    steps = [step(1, 1.0), step(2, 2.0, held_out_loss=1.5), step(3, 3.0, seconds=6.0, tokens=700)]
    run = history([start(0.0), evaluation(0, 2.0), *steps])
    assert run.tokens == 900
    assert run.tokens_per_second == 90.0  # 900 tokens in 2 + 2 + 6 s
    assert run.memory_bytes == 1003
    assert (run.held_out_before, run.held_out_after) == (2.0, 1.5)
    assert run.last_step == 3
    assert run.name == "one"
    ended = history([start(0.0), *steps, end("done", 3, 9.0, 4.0, held_out_after=1.25)])
    assert ended.held_out_after == 1.25
    empty = history([])
    assert (empty.tokens_per_second, empty.memory_bytes, empty.held_out_after) == (None, None, None)


class Writer:
    """Writes `chunks` one after the other, and says when all are written."""

    def __init__(self, path: Path, chunks: list[bytes], pause_s: float = 0.01) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._write, args=(path, chunks, pause_s))
        self.thread.start()

    def _write(self, path: Path, chunks: list[bytes], pause_s: float) -> None:
        for chunk in chunks:
            with path.open("ab") as file:
                file.write(chunk)
            time.sleep(pause_s)
        self.done.set()


def test_follow_yields_whole_lines_of_a_writer_that_stutters(tmp_path: Path) -> None:
    events = [start(1.0), *(step(n, float(n), text="→" * n) for n in range(1, 20))]
    raw = lines(events)
    chunks = [raw[i : i + 37] for i in range(0, len(raw), 37)]  # cuts lines and characters
    writer = Writer(tmp_path / NAME, chunks, 0.002)
    followed = list(follow(tmp_path / NAME, writer.done.is_set, poll_s=0.001))
    writer.thread.join()
    assert followed == events


def test_follow_drains_what_was_written_before_the_stop(tmp_path: Path) -> None:
    path = tmp_path / NAME
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            path.write_bytes(lines([start(1.0), step(1, 2.0)]) + b'{"kind": "st')
        return asked == 2

    assert list(follow(path, stop, poll_s=0.001)) == [start(1.0), step(1, 2.0)]


def test_follow_yields_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(lines([start(1.0)]))
    stopped = threading.Event()
    events: Iterator[dict[str, Any]] = follow(path, stopped.is_set, poll_s=0.001)
    assert next(events) == start(1.0)
    with path.open("ab") as file:
        file.write(lines([step(1, 2.0)]))
    assert next(events) == step(1, 2.0)
    stopped.set()
    assert list(events) == []


def test_follow_from_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / NAME
    old, torn, new = lines([start(1.0), step(1, 2.0)]), b'{"kind": "step", "st', start(5.0, 1)
    path.write_bytes(old + torn)
    offset = whole_bytes(path)
    assert offset == len(old)
    for glue in (b"", b"\n"):  # a writer that appends, or that ends the torn line first
        path.write_bytes(old + torn + glue + lines([new]))
        assert list(follow(path, lambda: True, offset=offset)) == [new]


def test_follow_a_file_that_is_started_over(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(lines([start(1.0), step(1, 2.0), step(2, 3.0)]))
    offset = whole_bytes(path)
    path.write_bytes(lines([start(9.0)]))
    assert list(follow(path, lambda: True, offset=offset)) == [start(9.0)]


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 200_000])
def test_whole_bytes_over_long_lines(tmp_path: Path, length: int) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"abc\n" + b"x" * length)
    assert whole_bytes(path) == 4
    path.write_bytes(b"x" * length)
    assert whole_bytes(path) == 0
    assert whole_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (journal.duration(0.04), "0.0 s"),
        (journal.duration(9.94), "9.9 s"),
        (journal.duration(9.96), "10 s"),
        (journal.duration(59.6), "1 min 00 s"),
        (journal.duration(3599.7), "1 h 00 min"),
        (journal.duration(90061), "25 h 01 min"),
        (journal.duration(float("nan")), "–"),
        (journal.size(0), "–"),
        (journal.size(999), "999 bytes"),
        (journal.size(1_912_345_678), "1.9 GB"),
        (journal.size(141_000_000_000), "141 GB"),
        (journal.scientific(2e-4), "2e-4"),
        (journal.scientific(4.966e-5), "4.97e-5"),
        (journal.scientific(0.0), "0"),
        (journal.number(1234.5678), "1,234.568"),
        (journal.number(float("inf")), "inf"),
        (journal.number(None), "–"),
        (journal.change(4.0, 3.0), "25.0 % lower"),
        (journal.change(2.0, 2.5), "25.0 % higher"),
        (journal.change(2.0, 2.0), "unchanged"),
        (journal.change(None, 2.0), ""),
        (journal.change(2.0, float("nan")), ""),
    ],
)
def test_how_values_are_said(said: str, wanted: str) -> None:
    assert said == wanted
