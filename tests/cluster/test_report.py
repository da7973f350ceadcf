import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimpot.cluster import report
from trimpot.cluster.journal import NAME, history
from trimpot.cluster.plots import MAX_POINTS, envelope, smooth, thin, y_limits
from trimpot.cluster.report import render, write_report
from trimpot.runner.errors import StorageError, UserError

CONFIG = {
    "model": {"path": "/data/models/SmolLM2-135M-Instruct", "revision": None},
    "task": "causal_lm",
    "method": "lora",
    "precision": "fp32",
    "seed": 0,
    "output_dir": "/data/runs/manual",
    "adapter": {"lora_rank": 16, "lora_alpha": 32.0, "target_modules": "all-linear"},
    "data": {"train": "/data/manual/train.jsonl", "max_length": 256, "packing": False},
    "optim": {"batch_size": 16, "max_steps": 68, "learning_rate": 5e-4, "warmup_steps": 4},
    "samples": {"prompts": 2, "max_new_tokens": 48},
    "tracking": {"sinks": [], "project": "trimpot", "run_name": None},
}


def start(steps: int, at: float, resumed_from: int | None = None, **changes: Any) -> dict[str, Any]:
    event = {
        "kind": "start",
        "time": at,
        "run_dir": "/data/runs/manual",
        "version": "0.1.0",
        "resumed_from": resumed_from,
        "world_size": 2,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "zero_stage": 1,
        "precision": "fp32",
        "method": "lora",
        "batch_size": 16,
        "total_steps": steps,
        "first_step": (resumed_from or 0) + 1,
        "parameters": 139_399_488,
        "trainable_parameters": 4_884_480,
        "train_samples": 1_560,
        "eval_samples": 82,
        "tokens_per_epoch": 104_211,
        "kernels": {
            "pack": {"backend": "native", "why": "AVX2 is there"},
            "lora_linear": {"backend": "torch", "why": "the tensors are on the CPU"},
        },
        "config": CONFIG,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0"},
        "memory_predicted_bytes": 1_840_000_000,
    }
    return event | changes


def step(number: int, steps: int, at: float, noise: random.Random) -> dict[str, Any]:
    loss = 2.55 + 1.3 * math.exp(-4 * number / steps) + noise.gauss(0, 0.12)
    return {
        "kind": "step",
        "time": at,
        "step": number,
        "loss": loss,
        "learning_rate": 5e-4 * min(number / 4, (1 + math.cos(math.pi * number / steps)) / 2),
        "grad_norm": abs(noise.gauss(0.9, 0.2)),
        "tokens": noise.randint(900, 1300),
        "trained_tokens": 700,
        "seconds": abs(noise.gauss(2.4, 0.1)) + 0.1,
        "memory_bytes": 1_912_345_678,
        "held_out_loss": None,
        "checkpoint": None,
        "health": "ok",
    }


def session(
    first: int, last: int, steps: int, at: float, resumed_from: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """A session's lines but for its end."""
    noise = random.Random(seed)
    events = [start(steps, at, resumed_from)]
    phases = {"imports": 4.1, "ray": 2.2, "workers": 1.6, "model": 3.4, "first_step": 2.9}
    events += [
        {"kind": "phase", "time": at, "name": name, "seconds": s} for name, s in phases.items()
    ]
    every = max(1, steps // 8)
    for number in range(first, last + 1):
        at += 2.5
        events.append(step(number, steps, at, noise))
        if number % every == 0:
            loss = 2.6 + 1.24 * math.exp(-4 * number / steps)
            events.append(
                {
                    "kind": "eval",
                    "time": at,
                    "step": number,
                    "loss": loss,
                    "tokens": 6000,
                    "samples": 82,
                }
            )
            path = f"/data/runs/manual/checkpoints/step-{number:06d}"
            events.append(
                {"kind": "checkpoint", "time": at, "step": number, "path": path, "seconds": 0.21}
            )
    return events


def whole_run(steps: int = 68, at: float = 1_763_800_000.0) -> list[dict[str, Any]]:
    events = session(1, steps, steps, at)
    begun = next(i for i, e in enumerate(events) if e["kind"] == "step")
    prompt = "What does `textwrap.dedent` do?"
    reference = "Remove any common leading whitespace from every line in `text`."
    answers = {
        "before": "`textwrap.dedent` is a Python module that provides a way to wrap text.",
        "after": "Remove any common leading whitespace from every line in text.",
    }
    samples = {
        when: {
            "kind": "sample",
            "time": at,
            "when": when,
            "prompt": prompt,
            "answer": answer,
            "reference": reference,
        }
        for when, answer in answers.items()
    }
    first = {"kind": "eval", "time": at, "step": 0, "loss": 3.842, "tokens": 6000, "samples": 82}
    end = {
        "kind": "end",
        "time": at + 200,
        "status": "done",
        "step": steps,
        "seconds": 203.4,
        "held_out_before": 3.842,
        "held_out_after": 2.651,
        "adapter": "/data/runs/manual/adapter",
        "error": None,
    }
    return [*events[:begun], samples["before"], first, *events[begun:], samples["after"], end]


def written(folder: Path, events: list[dict[str, Any]]) -> str:
    (folder / NAME).write_text("".join(json.dumps(event) + "\n" for event in events))
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Which elements and attributes a browser would see, and the text between them."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_says_what_the_journal_says(tmp_path: Path) -> None:
    events = whole_run()
    page = Page(written(tmp_path, events))
    steps = [e for e in events if e["kind"] == "step"]
    tokens = sum(e["tokens"] for e in steps)
    speed = tokens / sum(e["seconds"] for e in steps)
    for wanted in (
        "3.842 → 2.651 31.0 % lower",
        "perplexity 46.6 → 14.2",  # e^3.842, e^2.651
        f"Tokens {tokens:,}",
        f"Tokens a second {speed:,.0f}",
        "Wall time 3 min 23 s",
        "Memory predicted 1.8 GB",
        "Memory measured 1.9 GB (3.9 % higher)",
        "4,884,480 (3.5 %)",
        "first step 2.9 s together 14 s",
        "lora_linear torch the tensors are on the CPU",
        "torch 2.13.0+cpu",
        "Remove any common leading whitespace from every line in `text`.",
        "/data/runs/manual/checkpoints/step-000064",
    ):
        assert wanted in page.text, wanted
    assert not page.open
    config = "".join(page.words)
    assert "learning_rate: 0.0005\n  warmup_steps: 4" in config


def test_says_who_shares_rows_and_how_full_they_are(tmp_path: Path) -> None:
    fill = {"documents": 2000, "rows": 757, "least_rows": 756, "row_tokens": 512}
    fill |= {"row_share": 0.99912, "computed_share": 0.9949}
    packed = CONFIG | {"data": CONFIG["data"] | {"packing": True}}
    events = whole_run()
    events[0] |= {"world_size": 4, "sequence_parallel_size": 2, "fill": fill, "config": packed}
    text = Page(written(tmp_path, events)).text
    assert "Workers 4, 2 to a row" in text
    rows = "2,000 samples in 757 rows of 512 tokens, 99.9 % full (at least 756 are needed)"
    assert f"Packed {rows}" in text
    assert "Real tokens of those computed 99.4 %" in text
    events[0]["config"] = CONFIG
    apart = Page(written(tmp_path, events)).text
    assert "Packed" not in apart and "Real tokens of those computed 99.4 %" in apart


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    attack = '</td><script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J\x00\ud800'
    events = whole_run()
    for event in events:
        if event["kind"] == "sample":
            event.update(prompt=attack, answer=attack, reference=attack)
    events[0]["config"] = {"tracking": {"run_name": attack}, "model": {"path": attack}, attack: 1}
    events[0]["kernels"] = {attack: {"backend": attack, "why": attack}}
    events[0]["versions"] = {attack: attack}
    events[0]["run_dir"] = attack
    events[-1].update(status="failed", error=attack, adapter=attack)
    for kind, key in (("phase", "name"), ("checkpoint", "path")):
        next(e for e in events if e["kind"] == kind)[key] = attack
    events.append({"kind": "warning", "time": 0, "text": attack})
    events.append({"kind": "copy", "time": 0, "step": 8, "url": f"s3://b/{attack}", "seconds": 1.0})
    html = written(tmp_path, events)
    page = Page(html)
    assert not page.open
    assert page.text.count("<script>alert(1)</script>") >= 12
    assert "Newest copy: step 8 in s3://b/" in page.text
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert not set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html))


def test_needs_no_network_and_forbids_scripts(tmp_path: Path) -> None:
    html = written(tmp_path, whole_run())
    page = Page(html)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script-src" not in policy
    assert "//" not in html.replace("</", "")
    assert not re.search(r"@import|url\((?!#)", html)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("href", "src", "xlink:href")]
    assert links
    assert all(link and link.startswith("#") for link in links)


def test_drawings_can_be_told_and_share_no_ids(tmp_path: Path) -> None:
    page = Page(written(tmp_path, whole_run()))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) == 5
    for drawing in drawings:
        assert drawing["role"] == "img"
        labels = (drawing["aria-labelledby"] or "").split()
        assert len(labels) == 2
        assert set(labels) <= set(ids)
    assert "Held-out loss goes from 3.842 to 2.629." in page.text


def test_same_journal_same_bytes() -> None:
    run = history(whole_run())
    assert render(run) == render(run)


def test_colours_are_left_to_the_page(tmp_path: Path) -> None:
    html = written(tmp_path, whole_run())
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert not [d for d in drawings if re.search(r"#[0-9a-f]{6}\b", d)]
    assert all(re.search(r"stroke: var\(--(smooth|raw)\)", d) for d in drawings)


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 10])
def test_few_steps(tmp_path: Path, steps: int) -> None:
    page = Page(written(tmp_path, session(1, steps, 68, 0.0)))
    assert f"Steps {steps} of 68" in page.text
    assert f"No end is recorded after step {steps} of 68" in page.text
    assert ("nothing to plot" in page.text) == (steps == 0)
    assert ("training, smoothed" in page.text) == (steps >= 10)


def test_empty_journal(tmp_path: Path) -> None:
    assert "No held-out loss was measured." in Page(written(tmp_path, [])).text


def test_interrupted_run_says_where_it_was_last_measured(tmp_path: Path) -> None:
    events = whole_run()
    end = events[-1] | {"status": "interrupted", "step": 30, "held_out_after": 2.902}
    cut = next(i for i, e in enumerate(events) if e["kind"] == "step" and e["step"] == 31)
    page = Page(written(tmp_path, [*events[:cut], end]))
    assert "Interrupted after step 30 of 68." in page.text
    assert "last measured after step 24" in page.text


def test_resumed_run_lists_every_start_and_counts_steps_once(tmp_path: Path) -> None:
    first = session(1, 40, 68, 1000.0)
    second = session(33, 68, 68, 5000.0, resumed_from=32, seed=2)
    page = Page(written(tmp_path, [*first, *second, whole_run()[-1]]))
    assert "from step 32, 8 steps done again" in page.text
    assert "from the beginning 2 no end recorded 1 min 40 s" in page.text  # 40 steps of 2.5 s
    steps = [e for e in (*first, *second) if e["kind"] == "step"]
    kept = {e["step"]: e["tokens"] for e in steps}
    assert f"Tokens {sum(kept.values()):,}" in page.text


def test_loss_that_is_not_a_number(tmp_path: Path) -> None:
    events = whole_run()
    lost = [e for e in events if e["kind"] == "step"][10:13]
    for event, value in zip(lost, (math.nan, math.inf, -math.inf), strict=True):
        event["loss"] = value
    page = Page(written(tmp_path, events))
    assert "The loss of 3 steps is not a finite number" in page.text
    assert not [a for _, a in page.tags if re.search("nan|inf", a.get("d") or "", re.IGNORECASE)]


def test_smoothed_line_is_the_mean_around_each_step() -> None:
    noise = random.Random(1)
    values = [noise.gauss(2, 1) for _ in range(50)]
    values[20] = math.nan
    for window in (1, 5, 8):
        half = window // 2
        for i, mean in enumerate(smooth(values, window)):
            around = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
            if around:
                assert mean == pytest.approx(sum(around) / len(around))
            else:
                assert math.isnan(mean)


def test_thinned_lines_keep_their_spikes() -> None:
    values = [1.0] * 50_000
    values[33_333], values[7] = 9.0, -3.0
    values[40_000:40_500] = [math.nan] * 500
    x, y = thin(range(50_000), values)
    assert len(x) <= MAX_POINTS
    assert x == sorted(x)
    assert (x[0], x[-1]) == (0, 49_999)
    assert dict(zip(x, y, strict=True))[33_333] == 9.0
    assert dict(zip(x, y, strict=True))[7] == -3.0
    assert any(math.isnan(v) for v in y)
    _, low, high = envelope(range(50_000), values)
    assert (min(low), max(high)) == (-3.0, 9.0)
    assert sum(v != 1.0 for v in (*low, *high)) == 2


def test_one_wild_step_does_not_flatten_the_plot() -> None:
    values = [2.0 + 0.01 * (n % 10) for n in range(1000)]
    values[500] = 1e6
    limits = y_limits(values, [2.5])
    assert limits is not None
    assert limits[0] < 2.0
    assert 2.5 < limits[1] < 2.6
    few = y_limits([2.0, 3.0, 50.0])  # of few steps, each is shown
    assert few is not None
    assert few[1] == pytest.approx(50 + 0.06 * 48)
    assert y_limits([math.nan]) is None


def test_hundred_thousand_steps_stay_small(tmp_path: Path) -> None:
    events = session(1, 100_000, 100_000, 0.0)
    events += [
        {"kind": "checkpoint", "time": 0, "step": n, "path": f"/c/{n}", "seconds": 1.0}
        for n in range(100, 100_000, 100)
    ]
    events += [{"kind": "warning", "time": 0, "text": f"number {n}"} for n in range(1000)]
    html = written(tmp_path, events)
    assert len(html.encode()) < 3_000_000
    assert len(html) < 500_000  # in truth; 3 MB is the promise
    assert "/c/99900" in html
    assert "fill: var(--raw)" in html  # a band, in place of a line of 100,000 points
    assert "and 980 more, in journal.jsonl" in html


def test_long_texts_are_cut(tmp_path: Path) -> None:
    events = whole_run()
    next(e for e in events if e["kind"] == "sample")["answer"] = "word " * 100_000
    html = written(tmp_path, events)
    assert "… (494,000 more characters)" in html
    assert len(html) < 100_000


def test_no_secrets(tmp_path: Path) -> None:
    events = whole_run()
    events[0]["config"] = {
        "api_key": "hush-1",
        "data": {"train": "https://me:hush-2@host/x"},
        "max_new_tokens": 48,
    }
    html = written(tmp_path, events)
    assert "hush" not in html
    assert "max_new_tokens: 48" in html


def test_missing_journal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"journal.jsonl is not there; give the folder of a run"):
        write_report(tmp_path)


def test_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    written(tmp_path, whole_run())
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()  # nothing can be moved onto a folder, not even by root
    with pytest.raises(StorageError, match="can't be written"):
        write_report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "report.html"]


def test_readers_never_see_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written(tmp_path, whole_run())

    def disk_is_full(self: Path, page: bytes) -> int:
        with self.open("wb") as file:
            file.write(page[: len(page) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_bytes", disk_is_full)
    with pytest.raises(StorageError, match="No space left on device; make room"):
        write_report(tmp_path)
    monkeypatch.undo()
    with (tmp_path / "report.html").open(encoding="utf-8") as reader:
        beginning = reader.read(1000)
        new = written(tmp_path, whole_run(30))
        assert beginning + reader.read() == old != new
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "report.html"]


def test_failed_draft_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written(tmp_path, whole_run())

    def no_move(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report.Path, "replace", no_move)
    with pytest.raises(StorageError, match="Permission denied"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "report.html"]


def test_bad_steps_and_weights_are_told(tmp_path: Path) -> None:
    """Of a step that a later session did again, what that one says."""
    at = 1_763_800_000.0
    bad = {"kind": "bad_step", "time": at, "loss": math.nan, "grad_norm": 1.0, "to": None}
    first = bad | {"step": 7, "why": "the loss of step 7 is nan", "samples": [3, 1]}
    again = bad | {"step": 9, "why": "the loss of step 9 is nan", "samples": [4]}
    corruption = {"kind": "corruption", "time": at, "step": 10, "ranks": [1], "text": "1 <differs>"}
    check = {"kind": "check", "time": at, "step": 5, "bytes": 540_000_000, "seconds": 0.5}
    events = [*session(1, 10, 20, at), first | {"action": "skip"}, again | {"action": "skip"}]
    events += [check, corruption, start(20, at + 100, resumed_from=8)]
    events += [again | {"action": "rewind", "to": 4}, step(9, 20, at + 101, random.Random(0))]
    text = Page(written(tmp_path, events)).text
    assert "Step 7: the loss of step 7 is nan (samples 1, 3): it updated nothing" in text
    assert text.count("the loss of step 9 is nan") == 1
    assert "(samples 4): back to the weights of step 4, and on with the next samples" in text
    assert "1 <differs>" in text
    assert "Weights checked 1 times, 540 MB each" in text
    assert "Bad steps" not in Page(written(tmp_path, whole_run())).text
