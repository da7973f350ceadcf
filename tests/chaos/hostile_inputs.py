"""What hostile inputs are made of; `hostile_all.py` has the list of all.

Each is a toy run, or a folder, with one thing made to hurt whoever opens it. Whatever would be
executed leaves a file named CANARY. Each says how it may end: `refused`, with one line and an exit
code; `inert`, going on as if the content were any other; or `either`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Make = Callable[[Path], Any]
"""Spoils the toy in a folder: run.yaml, train.jsonl, model/, and `../outside` beside it."""


@dataclass(frozen=True)
class Input:
    name: str
    make: Make
    action: str = "trimpot"
    args: tuple[str, ...] = ("train", "run.yaml")
    ends: str = "refused"
    says: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    """What must not be said or written anywhere."""
    writes: tuple[str, ...] = ("run",)
    kinds: str = field(default="", compare=False)


class Bomb:
    """Unpickled, it leaves a canary."""

    def __reduce__(self) -> Any:
        return os.system, ("touch CANARY ../CANARY ../outside/CANARY /tmp/CANARY-trimpot",)


PICKLE = pickle.dumps(Bomb())
SHELL = "$(touch CANARY)`touch CANARY`;touch CANARY;|touch CANARY #"
HUGE = 10**18


def zipped() -> bytes:
    """A torch checkpoint as torch.save would write it, with a pickle that executes."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
        archive.writestr("archive/version", "3\n")
        archive.writestr("../../outside/CANARY", "x")
    return raw.getvalue()


def put(name: str, content: str | bytes) -> Make:
    raw = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_bytes(raw)

    return make


def edit(name: str, **values: Any) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | values))

    return make


def merge(**sections: Any) -> Make:
    """Into run.yaml, section by section."""

    def make(folder: Path) -> None:
        raw = yaml.safe_load((folder / "run.yaml").read_text())
        for name, value in sections.items():
            both = isinstance(value, dict) and isinstance(raw.get(name), dict)
            raw[name] = {**raw[name], **value} if both else value
        (folder / "run.yaml").write_text(yaml.safe_dump(raw))

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    return make


def both(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def safetensors(header: Any, tail: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tail


CODE = "import pathlib; pathlib.Path('CANARY').touch()\nclass X: pass\n"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def fifo(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)
