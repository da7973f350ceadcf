"""Whether a GGUF file's header can be read at all: its counts are numbers that anybody can write,
and the `gguf` package loops as often as they say, past the end of the file.

Format: magic, u32 version, u64 tensors, u64 keys; each key a text, u32 type, value; each tensor a
text, u32 dimensions, u64 each, u32 type, u64 offset (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from trimpot.runner.reading import check_file

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9
MOST = 1 << 22
"""Texts in one list: vocabularies have 262,144."""
VERSIONS = (2, 3)


class _Cursor:
    def __init__(self, raw: mmap.mmap):
        self.raw, self.at = raw, 0

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        self.skip(size)
        return struct.unpack_from("<" + form, self.raw, self.at - size)[0]

    def skip(self, size: int) -> None:
        if size > len(self.raw) - self.at:
            raise ValueError("its header goes on after its end")
        self.at += size

    def text(self) -> bytes:
        size = self.number("Q")
        self.skip(size)
        return self.raw[self.at - size : self.at]

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text()
        elif kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner == TEXT and count <= MOST:
                for _ in range(count):
                    self.text()
            elif inner in SIZES:
                self.skip(count * SIZES[inner])
            else:
                raise ValueError(f"its header has a list of {count} values of type {inner}")
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"its header has a value of type {kind}, which there is not")


def check_gguf(path: Path) -> None:
    """Raises ValueError or OSError."""
    check_file(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        cursor = _Cursor(raw)
        if raw[:4] != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
        cursor.skip(4)
        if (version := cursor.number("I")) not in VERSIONS:
            raise ValueError(f"it is of GGUF's version {version}; 2 or 3 is wanted")
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        if not tensors:
            raise ValueError("it holds no tensor")
        if max(tensors, keys) > len(raw) // 12:
            raise ValueError(f"its header says {tensors} tensors and {keys} keys, more than fit")
        for _ in range(keys):
            cursor.text()
            cursor.value(cursor.number("I"))
        for _ in range(tensors):
            name = cursor.text()
            dimensions = cursor.number("I")
            if dimensions > 8:
                raise ValueError(f"its tensor {name[:40]!r} has {dimensions} dimensions")
            items = 1
            for _ in range(dimensions):
                items *= cursor.number("Q")
            cursor.skip(4)
            # The smallest type there is takes 1.5 bits an item.
            if items > 8 * len(raw) or cursor.number("Q") > len(raw):
                raise ValueError(f"its tensor {name[:40]!r} is not in it")
