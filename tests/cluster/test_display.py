import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from trimpot.cluster.display import Display, Trend


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    steps: int, run_dir: str = "/runs/manual", seconds: float = 0.5, **first: Any
) -> list[dict[str, Any]]:
    """The events of a run that is done, with an evaluation and a checkpoint every 100 steps."""
    start = {
        "kind": "start",
        "run_dir": run_dir,
        "resumed_from": None,
        "world_size": 2,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "batch_size": 16,
        "zero_stage": 1,
        "precision": "fp32",
        "method": "lora",
        "total_steps": steps,
        "config": {"model": {"path": "/models/SmolLM2-135M-Instruct"}},
    }
    sample = {"kind": "sample", "prompt": "What is it?", "reference": "A thing."}
    events = [
        start | first,
        {"kind": "phase", "name": "model", "seconds": 3.4},
        sample | {"when": "before", "answer": "No idea."},
        {"kind": "eval", "step": 0, "loss": 4.0},
    ]
    for n in range(1, steps + 1):
        events.append(
            {
                "kind": "step",
                "step": n,
                "loss": 2.0 + 2.0 / n,
                "learning_rate": 2e-4,
                "grad_norm": 0.9,
                "tokens": 600,
                "seconds": seconds,
                "memory_bytes": 1_900_000_000,
                "held_out_loss": None,
                "checkpoint": None,
                "health": "ok",
            }
        )
        if n % 100 == 0:
            events.append({"kind": "eval", "step": n, "loss": 3.0})
            events.append({"kind": "checkpoint", "step": n, "path": "/c", "seconds": 0.2})
    end = {
        "kind": "end",
        "status": "done",
        "step": steps,
        "seconds": 61.0,
        "held_out_before": 4.0,
        "held_out_after": 3.0,
        "adapter": f"{run_dir}/adapter",
        "error": None,
    }
    return [*events, sample | {"when": "after", "answer": "A thing indeed."}, end]


def shown(events: list[dict[str, Any]], encoding: str = "utf-8", **console: Any) -> str:
    """What is printed; a step takes as long as it says."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    clock = Clock()
    with Display(Console(file=file, **{"width": 80, **console}), clock) as display:
        for event in events:
            clock.now += event.get("seconds", 0.0) if event["kind"] == "step" else 0.0
            display.handle(event)
    file.flush()
    return raw.getvalue().decode(encoding)


def screen(events: list[dict[str, Any]], width: int) -> list[str]:
    """The panel that a terminal of this width holds after the events."""
    clock = Clock()
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={}
    )
    display = Display(console, clock)
    for event in events:
        clock.now += event.get("seconds", 0.0) if event["kind"] == "step" else 0.0
        display.handle(event)
    with console.capture() as capture:
        console.print(display._panel())
    return capture.get().splitlines()


def test_plain_lines_of_a_run() -> None:
    lines = shown(run(100)).splitlines()
    for wanted in (
        "manual · SmolLM2-135M-Instruct · lora",
        "2 workers × 4 × 2 = 16 samples a step · ZeRO 1 · fp32",
        "start-up: model 3.4 s",
        "sample before training: What is it? → No idea.",
        "held-out loss 4.0000 before training",
        "step 1/100  loss 4.0000  lr 2e-4  gradient 0.900  1,200 tokens/s  1.9 GB  50 s left",
        "held-out loss 3.0000 after step 100",
        "checkpoint of step 100 in /c (0.2 s)",
        "done: 100 steps in 1 min 01 s",
        "held-out loss 4.000 → 3.000 (25.0 % lower)",
        "    A thing indeed.",
        "adapter  /runs/manual/adapter",
    ):
        assert wanted in lines, wanted
    assert not any(line.startswith("report") for line in lines)  # none is written


FILL = {
    "documents": 2000,
    "rows": 757,
    "least_rows": 757,
    "row_tokens": 512,
    "row_share": 0.99912,
    "computed_share": 1.0,
}


def test_log_says_how_full_rows_are() -> None:
    packed = {"data": {"packing": True}}
    lines = shown(run(1, fill=FILL, config=packed)).splitlines()
    assert (
        "2,000 samples in 757 rows of 512 tokens, 99.9 % full (the fewest there can be)"
        " · 100 % of computed tokens are real"
    ) in lines
    more = FILL | {"least_rows": 756, "computed_share": 0.99996}
    assert "full (at least 756 are needed) · 99.9 %" in shown(run(1, fill=more, config=packed))
    assert "99.9 % of computed tokens are real" in shown(run(1, fill=more)).splitlines()


def test_copies_to_a_store_are_told() -> None:
    events = run(1)
    store = {"step": 1, "seconds": 2.0}
    events.insert(0, {"kind": "fetch", "url": "s3://bucket/run", **store})
    events.insert(-1, {"kind": "copy", "url": "s3://bucket/run/step-1", **store})
    lines = shown(events).splitlines()
    assert "the checkpoint of step 1 is from s3://bucket/run (2.0 s)" in lines
    assert "checkpoint of step 1 copied to s3://bucket/run/step-1 (2.0 s)" in lines
    events.insert(-1, {"kind": "checkpoint", "step": 1, "path": "/c", "seconds": 0.2})
    assert any("step 1, copied: step 1" in line for line in screen(events, 80))


def test_log_says_how_many_workers_are_on_a_row() -> None:
    lines = shown(run(1, world_size=4, sequence_parallel_size=2)).splitlines()
    assert "4 workers, 2 to a row: 2 × 4 × 2 = 16 samples a step · ZeRO 1 · fp32" in lines


def test_log_says_where_some_workers_idle_in_the_last_round() -> None:
    lines = shown(run(1, world_size=3)).splitlines()
    assert "3 workers × 4 × up to 2 = 16 samples a step · ZeRO 1 · fp32" in lines


def test_log_names_who_stands_still_and_who_is_slow() -> None:
    events = run(4)
    events[-1:-1] = [
        {"kind": "straggler", "rank": 1, "node": "n", "ratio": 2.0, "text": "worker 1 is slow"},
        {"kind": "hang", "rank": 1, "text": "hang: worker 1 stood still"},
    ]
    lines = shown(events).splitlines()
    assert "warning: worker 1 is slow" in lines
    assert "hang: worker 1 stood still" in lines


def test_plain_steps_are_thinned_but_nothing_else_is() -> None:
    text = shown(run(2000, seconds=0.1))  # 200 s
    steps = re.findall(r"^step (\d+)/2000", text, re.MULTILINE)
    assert steps[0] == "1"
    assert steps[-1] == "2000"
    assert 35 <= len(steps) <= 42  # one in 5 s
    assert len(re.findall(r"^held-out loss .* after step", text, re.MULTILINE)) == 20
    assert len(re.findall(r"^checkpoint of step", text, re.MULTILINE)) == 20


def test_slow_steps_are_all_printed() -> None:
    text = shown(run(20, seconds=30.0))
    assert len(re.findall(r"^step \d+/20 ", text, re.MULTILINE)) == 20


def test_report_is_named_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("")
    assert f"report   {tmp_path}/report.html" in shown(run(2, str(tmp_path))).splitlines()


def test_no_control_characters_get_through() -> None:
    attack = "a\x1b[2J\x1b]0;title\x07b\r\nc\u202e\x9bd\ud800[red]e[/red]"
    events = run(3, config={"tracking": {"run_name": attack}})
    for event in events:
        for key in ("prompt", "answer", "reference", "path", "adapter"):
            if key in event:
                event[key] = attack
        if event["kind"] == "phase":
            event["name"] = attack
    events.insert(5, {"kind": "warning", "text": attack})
    events[-1] |= {"status": "failed", "error": attack}
    text = shown(events)
    assert not set(text) & {"\x1b", "\x07", "\r", "\u202e", "\x9b"}
    assert text.count("[red]e[/red]") >= 8
    assert "\x1b[2J" not in "".join(screen(events, 80))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_panel_fits_its_terminal(width: int) -> None:
    config = {"tracking": {"run_name": "long" * 60}, "data": {"packing": True}}
    events = run(100, config=config, fill=FILL, world_size=4, sequence_parallel_size=2)
    for n in (1, 2, 4, 5, 30, len(events)):
        rows = screen(events[:n], width)
        assert rows
        assert max(cell_len(row) for row in rows) <= width
        assert len(rows) <= 10


def test_panel_at_60_columns_shows_all_figures() -> None:
    rows = screen(run(200)[:125], 60)  # step 120
    text = "\n".join(rows)
    for wanted in (
        "2 workers × 4 × 2 = 16 samples a step · ZeRO 1 · fp32",
        "119 of 200 steps · 40 s left",
        "4.000 → 3.000, 25.0 % lower (step 100)",
        "1,200 tokens/s, 0.5 s a step",
        "2e-4, gradient norm 0.900",
        "1.9 GB",
        "step 100",
    ):
        assert wanted in text, wanted
    assert re.search(r"loss +2\.017 +█[▁▂▃▄▅▆▇█]+▁", text)


def test_time_left_counts_evaluations_and_runs_down() -> None:
    clock = Clock()
    display = Display(Console(file=io.StringIO(), width=80), clock)
    events = run(100)
    steps = [e for e in events if e["kind"] == "step"]
    display.handle(events[0])
    for event in steps[:10]:
        clock.now += 3.0  # 0.5 s of it in the step
        display.handle(event)
    assert display._run.seconds_left(clock.now) == pytest.approx(270.0)
    assert display._run.seconds_left(clock.now + 2.0) == pytest.approx(268.0)
    assert display._run.tokens_per_second == pytest.approx(1200.0)


def test_live_in_a_terminal_ends_with_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = {"force_terminal": True, "width": 60, "_environ": {"TERM": "xterm-256color"}}
    text = shown(run(30), **terminal)
    assert "\x1b[?25l" in text  # cursor hidden,
    assert text.index("\x1b[?25h") < text.index("done: 30 steps in 1 min 01 s")  # then shown
    assert re.search(r"\x1b\[1;3[26]m", text)
    assert "sample before" not in text


def test_no_color_is_respected() -> None:
    environment = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    text = shown(run(30), force_terminal=True, width=60, _environ=environment)
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", text))
    assert codes <= {"0", "1", "2"}  # bold and dim are no colours


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_dumb_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    text = shown(run(3), force_terminal=True, _environ=environment)
    assert "\x1b[?25l" not in text
    assert "step 1/3" in text


def test_ascii_terminal_gets_ascii() -> None:
    text = shown(run(3, config={"tracking": {"run_name": "größer"}}), encoding="ascii")
    assert "gr??er - lora" in text
    assert "2 workers x 4 x 2 = 16" in text
    assert "held-out loss 4.000 -> 3.000 (25.0 % lower)" in text


def test_interrupted_and_failed() -> None:
    *events, end = run(3)
    interrupted = end | {"status": "interrupted", "step": 2, "held_out_after": None}
    assert "interrupted after step 2 of 3 (1 min 01 s); the same command goes on" in shown(
        [*events, interrupted]
    )
    failed = end | {"status": "failed", "step": 2, "error": "the loss is nan"}
    assert "failed after step 2 of 3 (1 min 01 s): the loss is nan" in shown([*events, failed])


def test_run_without_a_step_or_an_end() -> None:
    assert "done" not in shown(run(3)[:2])
    assert screen([], 60) == ["starting: …"]


def test_loss_that_is_not_a_number() -> None:
    events = run(30)
    events[10]["loss"] = math.nan
    events[11]["loss"] = math.inf
    assert "nan" in "\n".join(screen(events[:11], 60))
    assert "▁" in "\n".join(screen(events, 60))


def test_trend_keeps_the_course_in_bounded_memory() -> None:
    trend = Trend(room=64)
    for n in range(10_000):
        trend.add(float(n))
    assert len(trend._means) < 64
    assert trend.sparkline(8) == "▁▂▃▄▅▆▇█"
    assert Trend().sparkline(8) == ""
    flat = Trend()
    for _ in range(5):
        flat.add(1.0)
    assert flat.sparkline(8) == "▁" * 5


def test_bad_steps_and_weights_are_one_line_each() -> None:
    bad = {"kind": "bad_step", "step": 57, "loss": math.nan, "grad_norm": math.nan}
    bad |= {"why": "the loss of step 57 is nan", "samples": list(range(12, 0, -1))}
    corruption = {"kind": "corruption", "step": 58, "ranks": [1]}
    corruption["text"] = "the trained weights of worker 1 differ\x1b[2J at the end of step 58"
    first, *rest = run(100)
    told = [bad | {"action": "skip", "to": None}, bad | {"action": "rewind", "to": 40}, corruption]
    lines = shown([first, *told, *rest]).splitlines()
    for wanted in (
        "the loss of step 57 is nan (samples 1, 2, 3, 4, 5, 6, 7, 8 and 4 more): "
        "it updated nothing",
        "the loss of step 57 is nan (samples 1, 2, 3, 4, 5, 6, 7, 8 and 4 more): "
        "back to the weights of step 40, and on with the next samples",
        "the trained weights of worker 1 differ[2J at the end of step 58",
    ):
        assert lines.count(wanted) == 1
