"""README.md of an export: where it comes from, and what the run's journal says it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimpot.runner.config import Config
from trimpot.runner.journal import FILE
from trimpot.runner.run_yaml import looks_local
from trimpot.runner.tuned import Trained


def model_card(trained: Trained, kind: str, dtype: str, reasons: list[str]) -> str:
    """The card as Markdown. `kind`: adapter | merged."""
    config, facts = trained.plan.config, _journal_facts(trained.run)
    base = config.model.path
    local = looks_local(base)
    rows = [
        ("base", Path(base).name if local else base + _at(config.model.revision)),
        ("method", _method(trained)),
        ("steps", f"{_step(trained, facts)} of {config.optim.batch_size} samples"),
        ("precision of training", config.precision + _held(config)),
        ("dtype of these weights", dtype),
        ("data digest", facts.get("data_digest") or "unknown"),
        ("held-out loss before", _loss(facts.get("before"))),
        ("held-out loss after", _loss(facts.get("after"))),
        ("checkpoint", trained.checkpoint.digest if trained.checkpoint else "not kept"),
        ("versions", ", ".join(f"{n} {v}" for n, v in facts.get("versions", {}).items())),
    ]
    head = ["---", f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    head += [] if local else [f"base_model: {json.dumps(base)}"]
    head += ["tags: [trimpot]", "---", ""]
    what = "A LoRA adapter" if kind == "adapter" else "A fine-tuned model"
    body = [
        f"# {what} of {rows[0][1]}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows),
        "",
        "Losses are nats per token. The licence of the base model holds for what is made of it.",
        "",
        "Checked before and after writing:",
        "",
        *(f"- {reason}" for reason in reasons),
    ]
    return "\n".join(head + body) + "\n"


def _held(config: Config) -> str:
    kind = config.model.quantization
    return "" if kind == "none" else f", base in {kind.upper()}"


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""


def _method(trained: Trained) -> str:
    config = trained.plan.config
    if config.method == "lora":
        return f"LoRA, rank {config.adapter.lora_rank}, alpha {config.adapter.lora_alpha:g}"
    if config.freeze is not None:
        return f"freeze, training {', '.join(config.freeze.trainable)}"
    return "full"


def _step(trained: Trained, facts: dict[str, Any]) -> int | str:
    return trained.checkpoint.step if trained.checkpoint else facts.get("step", "unknown")


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _journal_facts(run: Path) -> dict[str, Any]:
    """{versions, before, after, step, data_digest} as far as they are known.

    Evaluations of later steps than a session resumed from are superseded by its own.
    """
    facts: dict[str, Any] = {}
    losses: dict[int, float] = {}
    for event in _events(run / FILE):
        if event.get("kind") == "start":
            facts["versions"] = event.get("versions") or {}
            kept_to = event.get("resumed_from")
            losses = {s: v for s, v in losses.items() if kept_to is not None and s <= kept_to}
        elif event.get("kind") == "eval" and isinstance(event.get("loss"), float):
            losses[int(event["step"])] = event["loss"]
        elif event.get("kind") == "step":
            facts["step"] = event["step"]
    facts["before"] = losses.get(0)
    facts["after"] = losses[max(losses)] if losses and max(losses) > 0 else None
    manifests = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    if manifests:
        facts["data_digest"] = json.loads(manifests[-1].read_text(encoding="utf-8"))["data_digest"]
    return facts


def _events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a writer that was killed leaves half of one."""
    events: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
