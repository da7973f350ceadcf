"""What the benches write besides JSON: one HTML page that stands alone, and whole files only."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.runner.errors import StorageError

VERDICTS = ("FAST", "SLOW", "WRONG")
"""Cells that a page puts a stress on."""


@dataclass(frozen=True)
class PageTable:
    heading: str
    columns: Sequence[str]
    """None of them: it has no head."""
    cells: Sequence[Sequence[str]]
    last_wraps: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    heading: str
    about: str
    tables: Sequence[PageTable]
    images: Mapping[str, bytes]
    """{name: PNG}"""
    notes: Sequence[str] = ()


def write_page(
    path: Path, page: Page, environment: Mapping[str, Any], peaks: Mapping[str, Any]
) -> None:
    """`environment`, `peaks`: what the figures were measured on. Raises StorageError."""
    import jinja2

    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("bench_page.html.j2").read_text(encoding="utf-8"))
    device = environment.get("gpu") or environment["cpu"]
    facts = [
        (key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
        for key, value in {**environment, **{f"peak {n}": p for n, p in peaks.items()}}.items()
    ]
    text = template.render(
        title=page.title,
        heading=page.heading,
        subtitle=f"{device} · torch {environment['torch']} · threads: {environment['threads']}",
        about=page.about,
        notes=page.notes,
        images=[(name, base64.b64encode(png).decode()) for name, png in page.images.items()],
        tables=[*page.tables, PageTable("Measured on", (), facts, last_wraps=True)],
        verdicts=VERDICTS,
    )
    with writing(path) as stand_in:
        stand_in.write_text(text, encoding="utf-8")


def write_plots(folder: Path, plots: Mapping[str, bytes]) -> None:
    """{name: PNG} as files. Raises StorageError."""
    for name, png in plots.items():
        with writing(folder / f"{name}.png") as stand_in:
            stand_in.write_bytes(png)


class writing:
    """A file beside `path` that takes its place at the end. Raises StorageError."""

    def __init__(self, path: Path):
        self.path, self.draft = path, path.with_name(f".{path.name}.draft")

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.draft.touch()
        except OSError as error:
            raise StorageError(f"{self.path} can't be written: {error.strerror}") from None
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.draft.replace(self.path)
        else:
            self.draft.unlink(missing_ok=True)
