"""`trimpot init`: a commented run.yaml, fitted to a model and its data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimpot.cluster.doctor import find_gpus
from trimpot.cluster.prepare import write_text
from trimpot.runner.config import DataSection
from trimpot.runner.data.sources import Row, check_source, read_rows
from trimpot.runner.data.templates import detect_format, make_example
from trimpot.runner.errors import ConfigError
from trimpot.runner.hub import Tokenizer, find_model
from trimpot.runner.plan.facts import ModelFacts, read_facts

LOOKED_AT = 1000
"""Rows that are read to fit the file to the data."""
LONGEST = 4096
"""Tokens per sample that are proposed at most: activations grow with them."""
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
PROMPTS = ("prompt", "instruction", "question", "input", "query", "problem", "source", "user")
ANSWERS = ("completion", "output", "answer", "response", "target", "solution", "assistant")
TEXTS = ("text", "content", "document", "body", "passage")
COLUMNS = {
    "messages_column": "lists of {role, content}",
    "prompt_column": "what the model is asked",
    "completion_column": "what it learns to answer",
    "text_column": "what it learns to go on with",
}
# A base model's tokenizer has none. The end token closes each turn, so that it is learnt.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Look:
    """What was seen of the data. `tokens`: of the longest row; `exact`: counted, not guessed."""

    rows: int
    all_rows: bool
    tokens: int
    exact: bool


def write_config(model: str, data: Path, out: Path, force: bool) -> Path:
    """Write a run.yaml that `trimpot plan` and `trimpot train` take. Raises a UserError.

    A model that is no folder and not in the local cache is taken for a Hugging Face id that
    the run will fetch; nothing is fetched here.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of a file to write")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already; give another --out, or --force to replace it")
    local = Path(model).expanduser()
    folder = find_model(str(local) if local.exists() else model, None)
    facts = read_facts(folder) if folder else None
    tokenizer = Tokenizer(folder) if folder else None
    check_source(data)
    rows = read_rows(data, LOOKED_AT)
    section = _section(data, rows[0], tokenizer)
    look = _look(section, rows, data, tokenizer)
    base = out.resolve().parent
    path = _relative(local, base) if local.exists() else model
    lines = [
        "# Look it over, then `trimpot plan` shows how it would run and `trimpot train` runs it.",
        "# Relative paths count from this file's folder; `trimpot schema` lists every key.",
        "",
        *_model_lines(path, facts),
        "",
        *_data_lines(section, rows[0], _relative(data, base), look, facts),
        "",
        *_training_lines(look),
        "",
        _line("output_dir", _free_name(base, out.stem), "checkpoints, adapter, report", 0),
    ]
    write_text(out, "\n".join(lines) + "\n")
    return out


def _section(data: Path, row: Row, tokenizer: Tokenizer | None) -> DataSection:
    """The section data, as far as the first row decides it. Raises DataError."""
    values: dict[str, Any] = {"train": str(data)}
    strings = [column for column, value in row.items() if isinstance(value, str)]
    lists = [column for column, value in row.items() if isinstance(value, list)]
    messages, text = _named(MESSAGES, lists), _named(TEXTS, strings)
    prompt = _named(PROMPTS, strings)
    answer = _named(ANSWERS, [column for column in strings if column != prompt])
    if messages:
        values |= {"format": "chat", "messages_column": messages}
    elif prompt and answer:
        values |= {"format": "prompt_completion"}
        values |= {"prompt_column": prompt, "completion_column": answer}
    elif text or len(strings) == 1:
        values |= {"format": "text", "text_column": text or strings[0]}
    else:
        detect_format(DataSection(train=str(data)), row, f"{data} row 1")  # says what is wanted
    if messages and tokenizer is not None and tokenizer.renderer(None) is None:
        values["chat_template"] = PLAIN_TEMPLATE
    return DataSection.model_validate(values)


def _named(known: tuple[str, ...], columns: list[str]) -> str | None:
    """The column whose name comes first among the known ones, whatever its case."""
    by_name = {str(column).lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in known if name in by_name), None)


def _look(data: DataSection, rows: list[Row], path: Path, tokenizer: Tokenizer | None) -> Look:
    """How long the rows are. Raises DataError for rows that can't be trained on."""
    whole = len(rows) < LOOKED_AT
    if tokenizer is None:  # 3 characters a token: English has 4, most else fewer
        longest = max(len(str(value)) for row in rows for value in row.values())
        return Look(len(rows), whole, longest // 3 + 32, exact=False)
    render = tokenizer.renderer(data.chat_template) if data.format != "text" else None
    texts = [
        make_example(data, data.format, row, f"{path} row {n}", render, tokenizer.end).text
        for n, row in enumerate(rows, 1)
    ]
    lengths = [len(ids) for ids, _ in tokenizer.encode(texts, special=render is None)]
    return Look(len(rows), whole, max(lengths), exact=True)


def _model_lines(path: str, facts: ModelFacts | None) -> list[str]:
    what = "not in this machine's cache: fetched when the run starts"
    if facts:
        size = f"{facts.parameters / 1e9:.2f} billion" if facts.parameters >= 1e8 else None
        what = f"{facts.architecture}, {size or f'{facts.parameters:,}'} parameters"
    return ["model:", _line("path", path, what)]


def _data_lines(
    data: DataSection, row: Row, path: str, look: Look, facts: ModelFacts | None
) -> list[str]:
    at_least = "" if look.all_rows else "at least "
    lines = ["data:", _line("train", path, f"{at_least}{look.rows:,} rows")]
    used = {name: getattr(data, name) for name in COLUMNS if name in data.model_fields_set}
    unused = ", ".join(str(column) for column in row if column not in used.values())
    kind = {
        "chat": "the assistant's messages are trained",
        "prompt_completion": "only the completions are trained",
        "text": "all of the text is trained",
    }[data.format]
    lines.append(_line("format", data.format, kind + (f"; not used: {unused}" if unused else "")))
    lines += [_line(name, value, COLUMNS[name]) for name, value in used.items()]
    if data.chat_template:
        lines.append("  # The model's tokenizer has no chat template; this is a plain one.")
        lines.append(_line("chat_template", data.chat_template, ""))
    share = 0.05 if look.rows >= 100 else 0.1 if look.rows > 1 else 0
    lines.append(_line("eval_fraction", share, "held out, to measure the loss on unseen rows"))
    length, why = _max_length(look, facts)
    return [*lines, _line("max_length", length, why)]


def _max_length(look: Look, facts: ModelFacts | None) -> tuple[int, str]:
    """(tokens per sample, why so many)."""
    positions = facts.max_positions if facts else LONGEST
    wanted = look.tokens if look.all_rows else look.tokens * 5 // 4
    length = min(-(-wanted // 64) * 64, positions, LONGEST)
    about = "" if look.exact else "about "
    seen = "row" if look.all_rows else f"of the first {look.rows:,} rows"
    why = f"tokens; the longest {seen} has {about}{look.tokens:,}"
    if length < look.tokens:
        limit = f"the model has {positions:,} positions" if length == positions else "raise it?"
        return length, f"{why} and is cut: {limit}"
    return length, why


def _training_lines(look: Look) -> list[str]:
    gpus = len(find_gpus()[0])
    batch = 16 if look.rows >= 320 else 8 if look.rows >= 64 else 4
    batch = -(-batch // max(1, gpus)) * max(1, gpus)
    epochs = 1 if look.rows >= LOOKED_AT else 3
    return [
        _line("method", "lora", "trains a small adapter; full trains every weight", 0),
        "adapter:",
        _line("lora_rank", 16, "more can learn more, and costs more memory"),
        _line("lora_alpha", 32, "the update is scaled by lora_alpha / lora_rank"),
        "",
        "optim:",
        _line("batch_size", batch, "samples per step, over all workers"),
        _line("epochs", epochs, "times through the data; max_steps counts steps instead"),
        _line("learning_rate", 2e-4, "for full training rather 1e-5"),
        _line("schedule", "cosine", "cosine | linear | constant, after warmup_steps"),
        "",
        _line("precision", "bf16" if gpus else "fp32", "bf16 on GPUs; a CPU is slower with it", 0),
        "",
        "fleet:",
        _line("workers", "auto", "one per GPU, or one where there is none"),
        _line("zero_stage", "auto", "the lowest DeepSpeed ZeRO stage that fits"),
        "",
        "checkpoint:",
        _line("every_steps", "auto", "an interrupted run goes on from the newest"),
        "evaluation:",
        _line("every_steps", 50, "held-out loss; always before and after, too"),
        "samples:",
        _line("prompts", 2, "held-out prompts answered before and after"),
    ]


def _line(key: str, value: Any, comment: str, indent: int = 2) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, width=10**9, default_style=_style(value))
    said = f"{' ' * indent}{key}: {text.removesuffix(chr(10)).removesuffix('...').strip()}"
    return f"{said:<33} # {comment}" if comment else said


def _style(value: Any) -> str | None:
    return '"' if isinstance(value, str) and "\n" in value else None


def _relative(path: Path, base: Path) -> str:
    """As seen from `base` where it lies beneath; `./` makes certain that it is no hub id."""
    found = path.resolve()
    return f"./{found.relative_to(base)}" if found.is_relative_to(base) else str(found)


def _free_name(base: Path, stem: str) -> str:
    """A name in `base` that nothing has yet."""
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    return next(name for name in names if not (base / name).exists())
