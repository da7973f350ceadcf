"""`trimpot bench saves`: what it reads of a run, and one small round of it."""

import json
import sys
from pathlib import Path

import pytest
from tiny import chat_data

from trimpot.cluster import cli
from trimpot.cluster.bench_saves import read


def test_a_runs_saves_are_read(tmp_path: Path) -> None:
    events = [{"kind": "step", "time": 10.0 + n, "step": n} for n in range(1, 11)]
    # The first one is of the steps that are not counted, the last one of the run's end.
    for number, seconds in ((2, 0.1), (5, 0.2), (7, 0.4), (10, 0.1)):
        save = {"kind": "checkpoint", "step": number, "seconds": seconds, "stall_seconds": 0.01}
        events.append(save | {"time": 0.0})
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    course = read(tmp_path)
    assert (course.seconds_per_step, course.saves) == (1.0, 2)
    assert course.stall_share == pytest.approx(0.02 / 7)
    assert course.save_s == pytest.approx(0.3)


@pytest.mark.chaos
def test_a_round(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["--model", str(model), "--data", str(chat_data(tmp_path, 40)), "--workers", "1"]
    arguments += ["--steps", "5", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["trimpot", "bench", "saves", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["saves"] == [0]  # the run is over before the first one is due
    assert result["step_ratio"]["median"] > 0
    assert result["stall_share"]["median"] == 0
