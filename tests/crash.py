"""What a disk may hold after a crash: records the calls of a writer, and enumerates that.

The model is harsher than most file systems (Pillai et al. 2014, "All File Systems Are Not Created
Equal", §3): what was written to a file is lost, whole or in part, until the file is fsynced; a
name in a folder is lost until the folder is fsynced, whatever became of its file; of the changes
to a folder since then, any may be there and any missing, in whatever order. One change (a rename)
is there or not, never half.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
"""{name: bytes of a file | Tree of a folder}"""


@dataclass(frozen=True)
class Call:
    """One call that changed the disk, or a `mark` of the test's own."""

    kind: str
    """create | write | fsync | mkdir | rename | unlink | rmdir | mark"""
    path: str
    """Under the recorder's root, "" for itself."""
    data: bytes = b""
    offset: int = 0
    target: str = ""
    mark: Any = None

    def __str__(self) -> str:
        to = f" → {self.target}" if self.target else ""
        return f"{self.kind} {self.path}{to}"


class Recorder:
    """While `recording()`, keeps every call of this process that changes what is under `root`.

    Only `os` functions are seen. That nothing was written past them shows when `replay` of the
    calls is compared with what is there.
    """

    def __init__(self, root: Path):
        self.root, self.calls = root, list[Call]()
        self.handles: dict[int, tuple[str, int]] = {}
        """{file descriptor: (path, offset)}"""

    def mark(self, value: Any) -> None:
        self.calls.append(Call("mark", "", mark=value))

    def replay(self) -> Tree:
        disk = Disk()
        for call in self.calls:
            disk.do(call)
        return disk.tree()

    @contextmanager
    def recording(self) -> Iterator[None]:
        wraps = {
            "open": self._open,
            "write": self._write,
            "fsync": self._fsync,
            "close": self._close,
            "rename": self._move,
            "replace": self._move,
            **dict.fromkeys(("mkdir", "unlink", "rmdir"), self._change),
        }
        real = {name: getattr(os, name) for name in wraps}
        for name, wrap in wraps.items():
            setattr(os, name, wrap(real[name]))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _under(self, path: Any) -> str | None:
        text, root = os.path.abspath(path), str(self.root)  # noqa: PTH100
        return text[len(root) + 1 :] if text == root or text.startswith(root + "/") else None

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            name = self._under(path)
            if name is None:
                return real(path, flags, *rest, **more)
            assert not flags & (os.O_TRUNC | os.O_APPEND | os.O_RDWR), "not modelled"
            new = not os.path.exists(path)  # noqa: PTH110
            handle = real(path, flags, *rest, **more)
            self.handles[handle] = (name, 0)
            if new:
                self.calls.append(Call("create", name))
            return handle

        return call

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(handle: int, data: Any) -> int:
            written = real(handle, data)
            if handle in self.handles:
                name, offset = self.handles[handle]
                self.calls.append(Call("write", name, bytes(data[:written]), offset))
                self.handles[handle] = (name, offset + written)
            return written

        return call

    def _fsync(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(handle: int) -> None:
            real(handle)
            if handle in self.handles:
                self.calls.append(Call("fsync", self.handles[handle][0]))

        return call

    def _close(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(handle: int) -> None:
            self.handles.pop(handle, None)
            real(handle)

        return call

    def _move(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            real(source, target)
            if (name := self._under(source)) is not None:
                self.calls.append(Call("rename", name, target=self._under(target) or ""))

        return call

    def _change(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **more: Any) -> None:
            assert more.get("dir_fd") is None, "not modelled"
            real(path, *rest, **more)
            if (name := self._under(path)) is not None:
                self.calls.append(Call(real.__name__, name))

        return call


@dataclass
class Node:
    """A file or a folder: what is durable of it, and what has happened since."""

    folder: bool
    data: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    changes: list[list[tuple[str, int | None]]] = field(default_factory=list)
    """Each the [(name, node | None)] that it sets or removes at once."""

    def now(self) -> dict[str, int]:
        return self.after(range(len(self.changes)))

    def after(self, kept: Any) -> dict[str, int]:
        names = dict(self.names)
        for index in kept:
            for name, node in self.changes[index]:
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node
        return names


class Disk:
    """Replays calls; then says what may be left of them."""

    def __init__(self) -> None:
        self.nodes = [Node(folder=True)]

    def _find(self, path: str) -> int:
        node = 0
        for name in filter(None, path.split("/")):
            node = self.nodes[node].now()[name]
        return node

    def _change(self, path: str, node: int | None, *more: tuple[str, int | None]) -> None:
        parent, _, name = path.rpartition("/")
        self.nodes[self._find(parent)].changes.append([(name, node), *more])

    def do(self, call: Call) -> None:
        match call.kind:
            case "create" | "mkdir":
                self.nodes.append(Node(folder=call.kind == "mkdir"))
                self._change(call.path, len(self.nodes) - 1)
            case "write":
                self.nodes[self._find(call.path)].writes.append((call.offset, call.data))
            case "fsync":
                node = self.nodes[self._find(call.path)]
                node.data, node.writes = _applied(node.data, node.writes), []
                node.names, node.changes = node.now(), []
            case "rename":
                assert call.path.rpartition("/")[0] == call.target.rpartition("/")[0]
                moved = self._find(call.path)
                name = call.path.rpartition("/")[2]
                self._change(call.target, moved, (name, None))
            case "unlink" | "rmdir":
                self._change(call.path, None)

    def tree(self) -> Tree:
        """As the writer itself sees it."""
        return self._tree(0, lambda node: node.now(), lambda n: _applied(n.data, n.writes))

    def _tree(self, index: int, names: Callable, content: Callable) -> Tree:
        node = self.nodes[index]
        return {
            name: self._tree(child, names, content)
            if self.nodes[child].folder
            else content(self.nodes[child])
            for name, child in sorted(names(node).items())
        }

    def crashes(self, draw: random.Random, most: int) -> Iterator[Tree]:
        """Trees that a crash now may leave: all combinations, or `most` of them."""
        folders = [(i, _kept(n, draw)) for i, n in enumerate(self.nodes) if n.changes]
        files = [(i, _torn(n, draw, most // 4)) for i, n in enumerate(self.nodes) if n.writes]
        folder_choices = _products([choices for _, choices in folders], draw, most)
        file_choices = _products([choices for _, choices in files], draw, most)
        pairs = list(itertools.product(folder_choices, file_choices))
        for chosen, contents in pairs if len(pairs) <= most else draw.sample(pairs, most):
            kept = dict(zip((id(self.nodes[i]) for i, _ in folders), chosen, strict=True))
            data = dict(zip((id(self.nodes[i]) for i, _ in files), contents, strict=True))
            yield self._tree(
                0,
                lambda node, kept=kept: node.after(kept.get(id(node), ())),
                lambda node, data=data: data.get(id(node), node.data),
            )


def _applied(data: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(data)
    for offset, piece in writes:
        content[offset : offset + len(piece)] = piece
    return bytes(content)


def _products(choices: list[list[Any]], draw: random.Random, most: int) -> list[tuple[Any, ...]]:
    count = 1
    for one in choices:
        count *= len(one)
    if count <= most:
        return list(itertools.product(*choices))
    return [tuple(draw.choice(one) for one in choices) for _ in range(most)]


def _kept(node: Node, draw: random.Random) -> list[tuple[int, ...]]:
    """Which of a folder's changes may have reached the disk."""
    count = len(node.changes)
    if count <= 6:
        return [s for n in range(count + 1) for s in itertools.combinations(range(count), n)]
    every = range(count)
    some = [tuple(every[:n]) for n in range(count + 1)]
    some += [(i,) for i in every] + [tuple(j for j in every if j != i) for i in every]
    return some + [tuple(i for i in every if draw.random() < 0.5) for _ in range(32)]


def _torn(node: Node, draw: random.Random, most: int) -> list[bytes]:
    """What a file may hold: all, nothing, a part, a part and zeros, zeros and the rest."""
    whole, size = _applied(node.data, node.writes), len(node.data)
    cuts = {size, size + 1, (size + len(whole)) // 2, len(whole) - 1, len(whole)}
    cuts |= {draw.randint(size, len(whole)) for _ in range(most)}
    found = {node.data, whole}
    for cut in (cut for cut in cuts if cut <= len(whole)):
        found.add(whole[:cut])
        found.add(whole[:cut] + bytes(len(whole) - cut))
        found.add(node.data + bytes(max(0, cut - size)) + whole[max(cut, size) :])
    return sorted(found)


def write_tree(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def read_tree(folder: Path) -> Tree:
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes()
        for path in sorted(folder.iterdir())
    }
