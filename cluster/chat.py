"""`trimpot chat`: questions from the command line, from a pipe, or from a person at a terminal.

What a model says is filtered before it is shown: its answer must not be able to move the cursor,
set the window's title, or write to the clipboard.
"""

from __future__ import annotations

import contextlib
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimpot.runner.errors import DataError, UserError

if TYPE_CHECKING:
    from trimpot.runner.talk import Talker

NARROW = 80
"""Columns of a terminal under which two answers stand one below the other."""
JOINERS = "\u200c\u200d"  # Persian and emoji need them; they move nothing
HELP = "/clear forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"

Answer = dict[str, Any]
"""{prompt, tuned, base}; base is None unless compared."""


def chat_with(
    run: Path, prompts: list[str], compare: bool, max_new_tokens: int, quiet: bool
) -> list[Answer]:
    """Ask a run's model, and with `compare` its base, each prompt for itself.

    Without prompts: a conversation where stdin is a terminal, else one question a line of stdin.
    `quiet` prints nothing. Raises UserError, CheckpointError, ModelError.
    """
    console = Console(highlight=False, quiet=quiet)
    if not prompts and sys.stdin.isatty():
        if quiet:
            raise UserError("--json wants questions: give --prompt, or lines on stdin")
        return Chat(console, _talker(run, compare), max_new_tokens, compare).converse()
    asked = iter(prompts) if prompts else _lines()
    first = next(asked, None)
    if first is None:
        raise UserError("no question is asked: give --prompt, or one question a line on stdin")
    chat = Chat(console, _talker(run, compare), max_new_tokens, compare)
    echo = len(prompts) != 1 or compare
    answers = [chat.ask_once(first, echo)]
    answers += [chat.ask_once(prompt, echo) for prompt in asked]
    return answers


def _talker(run: Path, compare: bool) -> Talker:
    from trimpot.runner.talk import Talker

    return Talker(run, compare)


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError:
        raise DataError("stdin is not text in this terminal's encoding; UTF-8 is wanted") from None


def visible(text: str) -> str:
    """What may be written to a terminal: letters, marks, spaces, newlines and tabs. Escape
    sequences lose their escape, and bidirectional overrides go."""
    return "".join(_seen(char) for char in text.replace("\r\n", "\n"))


def _seen(char: str) -> str:
    if char.isprintable() or char in "\n\t" or char in JOINERS:
        return char
    match unicodedata.category(char):
        case "Zs":
            return " "
        case "Zl" | "Zp":
            return "\n"
    return ""


@dataclass
class Chat:
    """Asks, shows, and remembers what was said. Tuned and base each remember their own answers."""

    console: Console
    talker: Talker
    max_new_tokens: int
    compare: bool
    told: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """{tuned | base: turns}"""

    def ask_once(self, prompt: str, echo: bool) -> Answer:
        """Ask outside of any conversation."""
        if echo:
            self.console.print(Text(f"> {visible(prompt)}", style="bold"), soft_wrap=True)
        self.told.clear()
        answer = self.ask(prompt)
        if echo:
            self.console.print()
        return answer

    def ask(self, prompt: str) -> Answer:
        """Ask and show; Ctrl-C raises KeyboardInterrupt."""
        if not self.compare:
            tuned = self._answer("tuned", prompt, self._write)
            self.console.print()
            return _result(prompt, tuned, None)
        with self._waiting():
            base = self._answer("base", prompt, lambda _: None)
            tuned = self._answer("tuned", prompt, lambda _: None)
        self.console.print(_side_by_side(base, tuned, self.console.width))
        return _result(prompt, tuned, base)

    def _answer(self, who: str, prompt: str, emit: Any) -> str:
        """The answer, remembered with its question, also when it is stopped half-way."""
        turns = [*self.told.get(who, []), {"role": "user", "content": prompt}]
        pieces: list[str] = []

        def hear(text: str) -> None:
            pieces.append(text)
            emit(text)

        try:
            return self.talker.answer(turns, self.max_new_tokens, base=who == "base", emit=hear)
        finally:
            if pieces:
                self.told[who] = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def _write(self, text: str) -> None:
        """A piece of an answer, as it comes."""
        if self.console.quiet:
            return
        encoding = self.console.encoding
        self.console.file.write(visible(text).encode(encoding, "replace").decode(encoding))
        self.console.file.flush()

    def _waiting(self) -> contextlib.AbstractContextManager[Any]:
        if not self.console.is_terminal:
            return contextlib.nullcontext()
        return self.console.status("thinking (base, then tuned)")

    def converse(self) -> list[Answer]:
        """A conversation at a terminal, until /quit or Ctrl-D."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
        self.console.print(Text(HELP, style="dim"))
        answers: list[Answer] = []
        while (line := self._read()) is not None:
            match line.split():
                case []:
                    pass
                case ["/quit" | "/exit"]:
                    break
                case ["/clear"]:
                    self.told.clear()
                    self.console.print(Text("forgotten", style="dim"))
                case [command] if command.startswith("/"):
                    self.console.print(Text(f"{visible(command)} is no command; {HELP}"))
                case _:
                    answers += self._exchange(line)
        return answers

    def _read(self) -> str | None:
        """A line; "" after Ctrl-C, None after Ctrl-D."""
        try:
            return input("> ")
        except EOFError:
            self.console.print()
            return None
        except KeyboardInterrupt:
            self.console.print()
            return ""
        except UnicodeDecodeError:
            self.console.print(Text("that is not text in this terminal's encoding"))
            return ""

    def _exchange(self, line: str) -> list[Answer]:
        try:
            return [self.ask(line)]
        except KeyboardInterrupt:
            self.console.print(Text("\n(stopped)", style="dim"))
        except UserError as error:  # a question that is too long ends no conversation
            self.console.print(Text(visible(str(error)), style="red"))
        return []


def _result(prompt: str, tuned: str, base: str | None) -> Answer:
    """JSON escapes control characters, but not DEL and C1, which terminals obey as well."""
    values = {"prompt": prompt, "tuned": tuned, "base": base}
    return {key: text and re.sub("[\x7f-\x9f]", "", text) for key, text in values.items()}


def _side_by_side(base: str, tuned: str, width: int) -> RenderableType:
    """Both answers in columns, or one below the other where there is no room."""
    answers = [(name, Text(visible(text))) for name, text in (("base", base), ("tuned", tuned))]
    if width < NARROW:
        heads = [(Text(name, style="bold cyan"), text) for name, text in answers]
        return Group(*(part for pair in heads for part in pair))
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in answers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(name, style="bold cyan") for name, _ in answers))
    table.add_row(*(text for _, text in answers))
    return table
