"""Files that survive a crash: the one door through which checkpoints reach the disk.

What POSIX promises is less than it seems. A written file is lost until it is fsynced, its name
until its folder is, and names of one folder may reach the disk in any order in between
(Pillai et al. 2014, "All File Systems Are Not Created Equal"). Only `os` calls are used here, one
system call each, so that tests can record them and try every crash between them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

BLOCK_BYTES = 16 << 20
"""Of one write: the hash of a block is computed while it is still in the cache of the host."""


class Fingerprint(TypedDict):
    size: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Fingerprint:
    """Write a file that is not there yet, fsync it → size and SHA-256 of what was meant.

    Hashed before it is written: what the disk made of it is found by comparing. Raises OSError.
    """
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                digest.update(block)
                _write_all(handle, block)
                size += len(block)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"size": size, "sha256": digest.hexdigest()}


def _write_all(handle: int, block: memoryview) -> None:
    while block:  # a full disk takes a part of a block, and refuses the rest the next time
        block = block[os.write(handle, block) :]


def fingerprint(path: Path) -> Fingerprint:
    """Size and SHA-256 of a file as it is read back. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network storage has no such
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and its way from the root durable. Raises OSError.

    Its parents may have been made just now by somebody who did not sync them. Those that may not
    be opened were there before us.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another worker was first
            os.mkdir(path)  # noqa: PTH102 - one call each, as the module says
    for path in (folder, *folder.parents):
        with contextlib.suppress(PermissionError):
            sync_folder(path)
        if path.is_mount():
            break


def put_text(path: Path, text: str) -> None:
    """Put a small file in the place of an older one: a reader sees either, whole, for good.

    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)  # noqa: PTH108
    write_file(partial, [text.encode()])
    os.replace(partial, path)  # noqa: PTH105
    sync_folder(path.parent)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder within its parent, and make that durable. Raises OSError.

    Never replaces one that holds anything (ENOTEMPTY, EEXIST).
    """
    os.rename(folder, target)  # noqa: PTH104
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, as far as that is possible."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)  # noqa: PTH108
            return
        for name in sorted(os.listdir(path)):  # noqa: PTH208
            remove(path / name)
        os.rmdir(path)  # noqa: PTH106
