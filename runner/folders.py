"""Exported folders: there whole or not, told apart from other people's, sealed with a verdict.

OUT/verdict.json    {format, kind, dtype, verdict, files: {name: {size, sha256}}}, written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimpot.runner.adapters.peft_io import replace_folder
from trimpot.runner.card import model_card
from trimpot.runner.errors import StorageError, UserError
from trimpot.runner.tuned import Trained
from trimpot.runner.types import Verdict

VERDICT = "verdict.json"
FORMAT = 1
SPARE_BYTES = 16 << 20
"""Room for the tokenizer and the card, beside the weights."""


def check_target(target: Path) -> None:
    """Whether an export may go there: nothing is there, or an export of ours and nothing else.

    Raises UserError.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is no folder; give --out a folder that may be made")
    if not target.is_dir():
        return
    names = {path.name for path in target.iterdir()}
    try:
        sealed = read_json(target / VERDICT)
        ours = sealed["format"] == FORMAT and {*sealed["files"], VERDICT}
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if names and not ours:
        raise UserError(
            f"{target} holds files that are not from an export; give --out another folder"
        )
    if ours and (odd := sorted(names - ours)):
        raise UserError(
            f"{target} holds {odd[0]}, which the export did not write and would delete; "
            "move it, or give --out another folder"
        )


@contextmanager
def staged(target: Path, size: int) -> Iterator[Path]:
    """A folder beside `target` to write `size` bytes of weights into; it takes target's place at
    the end. Where anything fails, nothing of it stays. Raises StorageError.
    """
    partial = target.with_name(f".{target.name}.partial")
    made: list[Path] = []
    try:
        made = _make_parents(target.parent)
        free = shutil.disk_usage(target.parent).free
        if free < size + SPARE_BYTES:
            raise StorageError(
                f"{target.parent} has {free / 2**20:,.0f} MiB free and the export needs "
                f"{(size + SPARE_BYTES) / 2**20:,.0f}; free some, or give --out another folder"
            )
        shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
        partial.mkdir()
        yield partial
        replace_folder(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise StorageError(
                f"{target} can't be written ({why}); give --out another folder"
            ) from error
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it → the ones that were not there, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for path in missing:
        path.mkdir()
    return missing


def seal(
    partial: Path, target: Path, trained: Trained, kind: str, dtype: str, verdict: Verdict
) -> dict[str, Any]:
    """Write card and verdict.json → {path, kind, dtype, verdict}."""
    card = model_card(trained, kind, dtype, verdict.reasons)
    (partial / "README.md").write_text(card, encoding="utf-8")
    values = {"kind": kind, "dtype": dtype, "verdict": dataclasses.asdict(verdict)}
    shared = (partial / "README.md").stat().st_mode  # safetensors makes its files private
    for path in partial.iterdir():
        path.chmod(shared)
    files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
    text = json.dumps({"format": FORMAT, **values, "files": files}, indent=2)
    (partial / VERDICT).write_text(text + "\n", encoding="utf-8")
    return {"path": str(target), **values}


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
