"""The report of a run: one HTML file that needs nothing else, and asks nothing of any network.

What is said is decided here, how it looks in report.html.j2, the curves are plots.py's.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimpot.cluster.journal import (
    Run,
    bad_step,
    change,
    duration,
    history,
    number,
    packing,
    percentage,
    read,
    size,
)
from trimpot.cluster.plots import Line, Plot, draw, smooth, y_limits
from trimpot.runner.errors import StorageError, UserError
from trimpot.runner.redact import redact, without_secrets

NAME = "report.html"
MAX_ROWS = 20
"""Checkpoints, sessions and warnings that are listed, each; a long run has thousands."""
MAX_TEXT = 6000
"""Characters of one prompt or answer."""
FEW = 10
"""Steps below which a smoothed line would only repeat the raw one."""

# Control characters are no valid HTML, newline and tab apart.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from its journal, in one move: a reader never sees half a file.

    Raises UserError without a journal, StorageError where the file can't be written.
    """
    events = read(run_dir)
    try:
        page = render(history(events))
    except Exception as error:  # its values may be of any kind; ours are not, as the tests say
        fault = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{run_dir}/journal.jsonl can't be told ({type(error).__name__}: {fault}); it is "
            "damaged or of another program, and the run it is of is as it was"
        ) from error
    path = run_dir / NAME
    draft = run_dir / f".{NAME}.{os.getpid()}"
    try:
        # A journal may hold lone surrogates, which UTF-8 has no bytes for.
        draft.write_bytes(page.encode("utf-8", "replace"))
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise StorageError(
            f"{path} can't be written: {error.strerror}; make room or permit writing there, "
            f"then run `trimpot report {run_dir}`"
        ) from None
    return path


def render(run: Run) -> str:
    """The page. Everything from the journal is escaped; only our own drawings are not."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(run))


def _without_controls(value: Any) -> Any:
    if hasattr(value, "__html__"):
        return value
    return redact(value).translate(_CONTROLS) if isinstance(value, str) else value


def _content(run: Run) -> dict[str, Any]:
    start = run.start
    checkpoints = [
        {"step": f"{c['step']:,}", "path": c["path"], "seconds": duration(c["seconds"])}
        for c in run.checkpoints
    ]
    return {
        "name": run.name,
        "subtitle": _subtitle(run),
        "state": _state(run),
        "headline": _headline(run),
        "figures": _figures(run),
        "plots": _plots(run),
        "steps": len(run.steps),
        "answers": [{k: _cut(v) for k, v in row.items()} for row in run.answers],
        "phases": _phases(run),
        "phases_together": duration(sum(p["seconds"] for p in run.phases)),
        "arrangement": _arrangement(run),
        "kernels": [
            {"op": op, "backend": choice.get("backend", ""), "why": choice.get("why", "")}
            for op, choice in sorted((start.get("kernels") or {}).items())
        ],
        "checkpoints": checkpoints[-MAX_ROWS:],
        "checkpoints_left_out": len(checkpoints[:-MAX_ROWS]),
        "copied": run.copied,
        "sessions": _sessions(run)[-MAX_ROWS:],
        "sessions_left_out": len(run.sessions[:-MAX_ROWS]),
        "failures": _failures(run)[-MAX_ROWS:],
        "failures_left_out": len(run.failures[:-MAX_ROWS]),
        "health": _health(run),
        "warnings": _warnings(run),
        "config": _yaml(start.get("config") or {}),
        "versions": sorted((start.get("versions") or {}).items()),
        "adapter": (run.end or {}).get("adapter"),
        "run_dir": start.get("run_dir", ""),
        "version": start.get("version", ""),
    }


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    if not config:
        return ""
    return yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True)


def moment(time_s: float | None) -> str:
    if time_s is None:
        return "–"
    at = datetime.datetime.fromtimestamp(time_s, datetime.timezone.utc)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def _subtitle(run: Run) -> str:
    config = run.start.get("config") or {}
    model = Path((config.get("model") or {}).get("path") or "").name
    method = {"lora": "LoRA", "freeze": "part of the weights", "full": "all weights"}
    trained = method.get(run.start.get("method", ""), "")
    began = moment(run.sessions[0].start.get("time")) if run.sessions else ""
    return " · ".join(part for part in (model, trained, began) if part)


def _state(run: Run) -> dict[str, str] | None:
    """What a reader must know first, of a run that is not done."""
    total = run.start.get("total_steps")
    of = f" of {total:,}" if total else ""
    if run.end is None:
        text = f"No end is recorded after step {run.last_step:,}{of}: still going on, or killed."
        return {"kind": "open", "text": text}
    match run.end["status"]:
        case "done":
            return None
        case "interrupted":
            text = f"Interrupted after step {run.end['step']:,}{of}. The same command goes on."
            return {"kind": "open", "text": text}
        case _:
            why = run.end.get("error") or "no reason is recorded"
            text = f"Failed after step {run.end['step']:,}{of}: {why}"
            return {"kind": "failed", "text": text}


def _headline(run: Run) -> dict[str, Any] | None:
    before, after = run.held_out_before, run.held_out_after
    if before is None and after is None:
        return None
    samples = run.start.get("eval_samples")
    notes = ["nats per token"]
    if run.evals and (scored := run.evals[-1].get("samples") or samples):
        notes[0] += f" over {scored:,} samples that were not trained on"
    measured_at = run.held_out[-1][0] if run.held_out else 0
    if 0 < measured_at < run.last_step and (run.end or {}).get("status") != "done":
        notes.append(f"last measured after step {measured_at:,}")
    # Beyond e^20 the figure says nothing but that the loss is large.
    known = [x for x in (before, after) if x is not None and x < 20]
    if len(known) == 2:
        notes.append(f"perplexity {number(math.exp(known[0]), 1)} → {math.exp(known[1]):,.1f}")
    return {
        "before": number(before),
        "after": number(after),
        "change": change(before, after),
        "worse": change(before, after).endswith("higher"),
        "note": "; ".join(notes),
    }


def _figures(run: Run) -> list[tuple[str, str]]:
    total = run.start.get("total_steps")
    steps = f"{run.last_step:,}"
    if total and total != run.last_step:
        steps += f" of {total:,}"
    return [
        ("Steps", steps),
        ("Tokens", f"{run.tokens:,}"),
        ("Wall time", duration(run.seconds)),
        ("Tokens a second", number(run.tokens_per_second, 0)),
        ("Peak memory", size(run.memory_bytes)),
    ]


def _phases(run: Run) -> list[dict[str, Any]]:
    longest = max((p["seconds"] for p in run.phases), default=0) or 1
    return [
        {
            "name": phase["name"].replace("_", " "),
            "seconds": duration(phase["seconds"]),
            "percent": round(100 * max(0.0, phase["seconds"]) / longest, 1),
        }
        for phase in run.phases
    ]


def _arrangement(run: Run) -> list[tuple[str, str]]:
    s = run.start
    if not s:
        return []
    workers, micro, accumulated = (
        s.get(key) for key in ("world_size", "micro_batch_size", "gradient_accumulation_steps")
    )
    split = s.get("sequence_parallel_size", 1)
    rows = [
        ("Workers", number(workers, 0) + (f", {split} to a row" if split > 1 else "")),
        ("Micro-batch", f"{number(micro, 0)} samples"),
        ("Accumulation", f"{number(accumulated, 0)} micro-batches"),
        ("Batch", f"{number(s.get('batch_size'), 0)} samples a step"),
        ("ZeRO stage", str(s.get("zero_stage", "–"))),
        ("Precision", str(s.get("precision", "–"))),
        ("Parameters", number(s.get("parameters"), 0)),
    ]
    if (trained := s.get("trainable_parameters")) and s.get("parameters"):
        share = 100 * trained / s["parameters"]
        rows.append(("of these trained", f"{trained:,} ({share:.3g} %)"))
    rows += [
        ("Training samples", number(s.get("train_samples"), 0)),
        ("Held-out samples", number(s.get("eval_samples"), 0)),
        ("Tokens an epoch", number(s.get("tokens_per_epoch"), 0)),
    ]
    if fill := s.get("fill"):
        if ((s.get("config") or {}).get("data") or {}).get("packing"):
            rows.append(("Packed", packing(fill)))
        rows.append(("Real tokens of those computed", percentage(fill["computed_share"])))
    if run.checks:
        spent = sum(check["seconds"] for check in run.checks)
        whole = sum(step["seconds"] for step in run.steps)
        share = f", {100 * spent / whole:.2g} % of the time" if whole > 0 else ""
        each = size(run.checks[-1]["bytes"])
        rows.append(("Weights checked", f"{len(run.checks):,} times, {each} each{share}"))
    predicted, measured = s.get("memory_predicted_bytes"), run.memory_bytes
    rows.append(("Memory predicted", size(predicted)))
    off = f" ({change(predicted, measured)})" if change(predicted, measured) else ""
    rows.append(("Memory measured", size(measured) + off))
    return rows


def _sessions(run: Run) -> list[dict[str, str]]:
    rows = []
    for session in run.sessions:
        start, end = session.start, session.end
        resumed = start.get("resumed_from")
        began = "from the beginning" if resumed is None else f"from step {resumed:,}"
        if session.steps_redone:
            redone = session.steps_redone
            began += f", {redone:,} step{'s' * (redone != 1)} done again"
        if end:
            ended = f"{end['status']} after step {end['step']:,}"
        elif parting := session.parting:
            why = parting.get("verdict") or parting["reason"]
            why = "left, to grow," if why == "grow" else why
            ended = f"{why} after step {parting['step']:,}"
        else:
            ended = "no end recorded"
        rows.append(
            {
                "time": moment(start.get("time")),
                "began": began,
                "workers": number(start.get("world_size"), 0),
                "ended": ended,
                "seconds": duration(session.seconds),
            }
        )
    return rows


def _failures(run: Run) -> list[dict[str, str]]:
    return [
        {
            "time": moment(event.get("time")),
            "step": f"{event['step']:,}",
            "verdict": event["verdict"],
            "text": event["text"],
            "then": event["why"] if event["restart"] else f"{event['why']}; {event['advice']}",
        }
        for event in run.failures
    ]


def _health(run: Run) -> list[str]:
    """Steps and weights that could not be right; nothing of a run that had none."""
    lines = [event["text"] for event in run.corruptions]
    lines += [f"Step {event['step']:,}: {bad_step(event)}" for event in run.bad_steps]
    more = len(lines) - MAX_ROWS
    return lines[:MAX_ROWS] + ([f"… and {more:,} more, in journal.jsonl"] if more > 0 else [])


def _warnings(run: Run) -> list[str]:
    texts = Counter(warning["text"] for warning in run.warnings)
    if lost := sum(not math.isfinite(step["loss"]) for step in run.steps):
        texts[f"The loss of {lost:,} steps is not a finite number; the plots leave them out."] = 1
    lines = [text if n == 1 else f"{text} ({n:,} times)" for text, n in texts.items()]
    more = len(lines) - MAX_ROWS
    return lines[:MAX_ROWS] + ([f"… and {more:,} more, in journal.jsonl"] if more > 0 else [])


def _plots(run: Run) -> dict[str, Any] | None:
    """{name: drawing}; None of a run without a step."""
    import markupsafe

    if not run.steps:
        return None
    x = [step["step"] for step in run.steps]
    marks = [s.start["resumed_from"] for s in run.sessions if s.start.get("resumed_from")]
    wide = _loss_plot(run, x, marks, "loss", 960, 340)
    narrow = _loss_plot(run, x, marks, "loss-narrow", 380, 300)
    speed = [s["tokens"] / s["seconds"] if s["seconds"] > 0 else math.nan for s in run.steps]
    mean = number(run.tokens_per_second, 0)
    small = [
        _small("speed", "Tokens a second", f"Over the whole run: {mean}.", x, speed, marks),
        _small(
            "rate",
            "Learning rate",
            "The learning rate of each step.",
            x,
            [step["learning_rate"] for step in run.steps],
            marks,
            smoothed=False,
        ),
        _small(
            "norm",
            "Gradient norm",
            "The norm of the gradient of each step, before clipping.",
            x,
            [step["grad_norm"] for step in run.steps],
            marks,
        ),
    ]
    return {
        "loss": markupsafe.Markup(draw(wide)),
        "loss_narrow": markupsafe.Markup(draw(narrow)),
        "small": [(plot.title, markupsafe.Markup(draw(plot))) for plot in small],
        "smoothed": len(x) >= FEW,
        "held_out": bool(run.held_out),
        "resumed": bool(marks),
    }


def _loss_plot(
    run: Run, x: Sequence[int], marks: Sequence[int], name: str, width: int, height: int
) -> Plot:
    raw = [step["loss"] for step in run.steps]
    mean = smooth(raw, _window(raw))
    lines = _lines(x, raw, mean)
    held = run.held_out
    if held:
        held_x, held_y = zip(*held, strict=True)
        lines.append(Line(held_x, held_y, "held", 2.0, markers=True))
    told = f"Training loss goes from {number(mean[0])} to {number(mean[-1])}."
    if held:
        told += f" Held-out loss goes from {number(held[0][1])} to {number(held[-1][1])}."
    limits = y_limits(raw, mean, [loss for _, loss in held])
    return Plot(name, "Loss by step", told, lines, width, height, marks=marks, y_range=limits)


def _small(
    name: str,
    title: str,
    told: str,
    x: Sequence[int],
    raw: Sequence[float],
    marks: Sequence[int],
    smoothed: bool = True,
) -> Plot:
    mean = smooth(raw, _window(raw))
    lines = _lines(x, raw, mean) if smoothed else [Line(x, raw)]
    limits = y_limits(raw if smoothed else [], mean if smoothed else raw, from_zero=True)
    return Plot(name, title, told, lines, 320, 200, marks, limits)


def _lines(x: Sequence[int], raw: Sequence[float], mean: Sequence[float]) -> list[Line]:
    if len(x) < FEW:
        return [Line(x, raw)]
    return [Line(x, raw, "raw", 1.25), Line(x, mean)]


def _window(raw: Sequence[float]) -> int:
    return max(5, len(raw) // 12)
