"""Files and folders of others: read no further than they can make sense, written only where they
are. Torch-free.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from trimpot.runner.errors import StorageError

JSON_BYTES = 16 * 2**20
"""Of a config, a manifest, an index. The largest index there is (DeepSeek-V3's) has 9 MB."""
MANIFEST_BYTES = 128 * 2**20
"""Of a checkpoint's manifest: it lists each parameter of each shard."""
MAX_DEPTH = 64
MAX_PARTS = 2_000_000
"""Lists and maps of one file: each takes 64 bytes for the 2 it has there. Gemma's tokenizers have
600,000."""
PARTS = ("", "data", "checkpoints", "adapter", "tensorboard", ".ray", "export")


def check_file(path: Path) -> None:
    """Whether it is a file: a device or a pipe can be read for ever. Raises OSError."""
    mode = os.stat(path).st_mode  # noqa: PTH116
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no file but a device or a pipe", str(path))


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises OSError."""
    check_file(path)
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        size = f"{most >> 20} MiB" if most >= 2**20 else f"{most >> 10} KiB"
        raise OSError(errno.EFBIG, f"it is larger than {size}", str(path))
    return raw


def parse_json(raw: bytes | str) -> Any:
    """JSON, nested at most MAX_DEPTH deep. Raises ValueError for all that is wrong with it."""
    text = raw.decode() if isinstance(raw, bytes) else raw
    if text.count("{") + text.count("[") > MAX_PARTS:
        raise ValueError(f"it has over {MAX_PARTS} lists and maps")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and maps, by levels: nothing here recurses."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [i for i in item.values() if isinstance(i, dict | list)]  # pyright: ignore[reportUnknownVariableType]
            elif isinstance(item, list):
                inner += [i for i in item if isinstance(i, dict | list)]  # pyright: ignore[reportUnknownVariableType]
        level, depth = inner, depth + 1
    return depth


def check_contained(run: Path) -> None:
    """Whether all that will be written into a run's folder ends there. A folder of others may have
    links in it, and a journal that is one appends to what it leads to. Raises StorageError."""
    top = run.resolve()
    for part in PARTS:
        folder = top / part
        if not folder.is_dir():
            continue
        for entry in os.scandir(folder):
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(top):
                raise StorageError(
                    f"{entry.path} is a link that leads out of the run's folder, and would be "
                    "written to; remove it, or choose another output_dir"
                )
