"""Question and answer rows out of the Python standard library's own docstrings.

Nothing is downloaded, and next to nothing is imported: modules written in Python are parsed
(`antigravity` opens a browser when imported, `this` prints), and of those written in C only a
list that is quiet when imported is looked into.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from trimpot.runner.errors import DataError

MIN_CHARS, MAX_CHARS = 30, 300
"""Answers outside of this are no sentence, or more than the model should learn by heart."""
MIN_ROWS = 500
"""Fewer mean that this Python came without the sources of its library; CPython's give 2,000."""

# Tools, tests and tables: their docstrings describe no library.
SKIPPED = {
    *("antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"),
    *("test", "tests", "this", "tkinter", "turtledemo"),
}
# `readline` may write to the terminal when imported; nis, spwd and others are not on every Python.
C_MODULES = (
    *("atexit", "binascii", "bisect", "builtins", "cmath", "codecs", "csv", "decimal", "errno"),
    *("functools", "gc", "hashlib", "heapq", "io", "itertools", "lzma", "marshal", "math"),
    *("operator", "os", "pickle", "select", "signal", "socket", "sqlite3", "ssl", "statistics"),
    *("struct", "sys", "threading", "time", "unicodedata", "weakref", "zlib"),
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def rows(source: Path | None, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """(prompt, completion, family) of each documented function and class, sorted.

    The family is the answer itself: what reads nearly the same goes to one side of the split.
    Raises DataError when a source is given, or when the library has no docstrings to read.
    """
    if source is not None:
        raise DataError(
            f"recipe technical reads this Python's own library, but source {source} is given; "
            "leave the source out"
        )
    found: dict[str, str] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for name, doc in (*_parsed(library), *_imported()):
        answer = first_paragraph(doc, name.rpartition(".")[2])
        if answer is not None:
            found.setdefault(answer, name)  # the same answer for two names teaches neither
    if len(found) < MIN_ROWS:
        raise DataError(
            f"{library} holds {len(found)} docstrings, at least {MIN_ROWS} were wanted; use a "
            "Python that has its library as .py files"
        )
    say(f"{len(found)} questions about the library of Python {platform.python_version()}")
    return sorted((f"What does `{name}` do?", answer, answer) for answer, name in found.items())


def first_paragraph(doc: str, name: str) -> str | None:
    """A docstring's first paragraph on one line; a signature before it is left out.

    None where it is too short, too long, or an example instead of a sentence.
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(doc))]
    signature = re.compile(rf"{re.escape(name)}\s*\(|\S+\(.*\)\s*->")
    prose = [part for part in paragraphs if part and not signature.match(part)]
    if not prose or ">>>" in prose[0] or not MIN_CHARS <= len(prose[0]) <= MAX_CHARS:
        return None
    return prose[0]


def _parsed(library: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of every public definition in the library's Python files."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        private = any(part.startswith("_") for part in parts)
        if (
            not parts
            or private
            or SKIPPED.intersection(parts)
            or parts[0] not in sys.stdlib_module_names
        ):
            continue
        for definition in _definitions(ast.parse(path.read_bytes()).body):
            doc = ast.get_docstring(definition, clean=False)
            if doc and not definition.name.startswith("_"):
                yield ".".join((*parts, definition.name)), doc


def _definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """A module's functions and classes, also those under `if` and `try`."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If):
            yield from _definitions(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            handlers = [inner for handler in node.handlers for inner in handler.body]
            yield from _definitions(node.body + handlers + node.orelse)


def _imported() -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of what C_MODULES offer that is written in C."""
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # Python can be built without lzma, sqlite3 or ssl
        yield from _written_in_c(module)


def _written_in_c(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(module).items()):
        if name.endswith("hook"):  # typer and pytest replace some; the original is beside it
            value = getattr(module, f"__{name}__", value)
        own_class = inspect.isclass(value) and value.__module__ == module.__name__
        if name.startswith("_") or not (inspect.isbuiltin(value) or own_class):
            continue
        if value.__doc__:
            yield f"{module.__name__}.{name}".removeprefix("builtins."), value.__doc__
