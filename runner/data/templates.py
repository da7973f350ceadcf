"""Row → text and which of its characters are trained: the answers, and nothing else.

Templates render in transformers' sandbox. What is trained is found by rendering each prefix of
the conversation: the text that an assistant turn adds after the generation prompt is its answer.
That needs no `{% generation %}` mark, which most shipped templates lack (their masks come out as
all zero, and a run then trains on nothing).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimpot.runner.config import DataSection
from trimpot.runner.data.sources import Row
from trimpot.runner.errors import DataError

MAX_TURNS = 1000
"""Each is found by rendering what comes before it, so time grows with their square: 1 s at 1000."""
Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
"""(messages, add_generation_prompt) → text. Raises ValueError with the template's complaint."""


@dataclass(frozen=True)
class Example:
    """One sample as text; `spans` are the [start, end) characters that are trained."""

    text: str
    spans: list[tuple[int, int]]
    prompt: str
    """The text up to the last answer: what a model is asked when a sample is shown."""
    question: str
    """What a person asked last, without the template around it."""
    answer: str
    """The last answer."""


def detect_format(data: DataSection, row: Row, where: str) -> str:
    """`data.format`, or what the row's columns say when it is auto."""
    columns = {
        "chat": [data.messages_column],
        "prompt_completion": [data.prompt_column, data.completion_column],
        "text": [data.text_column],
    }
    wanted = [data.format] if data.format != "auto" else list(columns)
    for form in wanted:
        if all(column in row for column in columns[form]):
            return form
    needs = " or ".join(" + ".join(columns[form]) for form in wanted)
    raise DataError(
        f"{where} has the columns {_shown(row) or '(none)'}; wanted: {needs} "
        "(set data.prompt_column and its like where they have other names)"
    )


def _shown(row: Row) -> str:
    names = [str(name)[:40] for name in itertools.islice(row, 12)]
    return ", ".join(names) + (f" and {len(row) - 12} more" if len(row) > 12 else "")


def make_example(
    data: DataSection, form: str, row: Row, where: str, render: Render | None, end: str
) -> Example:
    """One row as an Example. `render` is None for a tokenizer without chat template; `end` is
    its end-of-sequence text. Raises DataError."""
    if form == "text":
        text = _text(row, data.text_column, where) + end
        half = len(text) // 2
        return Example(text, [(0, len(text))], text[:half], text[:half], text[half:])
    if form == "chat":
        messages = _messages(row.get(data.messages_column), f"{where} {data.messages_column}")
    else:
        prompt = _text(row, data.prompt_column, where)
        answer = _text(row, data.completion_column, where)
        if render is None:
            text = prompt + answer + end
            return Example(text, [(len(prompt), len(text))], prompt, prompt, answer)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    if render is None:
        raise DataError(
            "the tokenizer has no chat template; set data.chat_template, "
            "or give prompt and completion columns"
        )
    if data.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    return _from_messages(messages, render, where)


def _from_messages(messages: list[Message], render: Render, where: str) -> Example:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(f"{where} has no assistant message; there is nothing to train on")
    if len(turns) > MAX_TURNS:
        raise DataError(
            f"{where} has {len(turns)} assistant messages; {MAX_TURNS} at most are told apart, "
            "split the conversation"
        )
    try:
        # Messages after the last answer train nothing and would only cost time.
        text = render(messages[: turns[-1] + 1], False)
        spans: list[tuple[int, int]] = []
        prompt = ""
        for turn in turns:
            prompt = render(messages[:turn], True)
            upto = render(messages[: turn + 1], False)
            if not (upto.startswith(prompt) and text.startswith(upto.rstrip())):
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns when later ones follow, "
                    "so the answers can't be told from the prompts; split the conversation into "
                    "one row per answer, or set data.chat_template"
                )
            # The end-of-turn token is trained, the line break that follows it is not.
            spans.append((len(prompt), len(upto.rstrip())))
    except DataError:
        raise
    except Exception as error:  # a template is a program: it can fail in any way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: the chat template fails: {reason}") from None
    asked = [m["content"] for m in messages[: turns[-1]] if m["role"] == "user"]
    return Example(text, spans, prompt, asked[-1] if asked else "", messages[turns[-1]]["content"])


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where} {column} is {type(value).__name__}; text is wanted")
    _check_unicode(value, f"{where} {column}")
    return value


def _check_unicode(text: str, where: str) -> None:
    """JSON can name half of a surrogate pair, which is no character and can't be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not Unicode: {text[error.start]!a} at character {error.start + 1}; "
            "save the data as UTF-8"
        ) from None


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{where} is {kind}; a list of {{role, content}} is wanted")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} message {number} has no role; {{role, content}} is wanted")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise DataError(f"{where} message {number} has {kind} content; text is wanted")
        _check_unicode(message["content"], f"{where} message {number}")
    return value
