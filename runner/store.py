"""The one door to fsspec: the objects of one place in a store, by their names under it.

A PUT of one object is atomic in an object store, and there are no renames. On file:// a put is
made what it is there: written beside, fsynced, renamed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trimpot.runner import durable
from trimpot.runner.errors import StorageError, StoreError

BLOCK_BYTES = 16 << 20
"""Of one request when an object is read."""
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
}
"""{protocol: the package that fsspec wants for it}; fsspec itself names those of others."""


class Store:
    """A place in a store. Every call goes to the store: nothing is cached. Raises StoreError."""

    def __init__(self, url: str):
        """`url`: as of checkpoint.copy_to. Nothing is asked of the store yet."""
        self.url = url
        self._fs, self._root = _open(url)
        self.local = Path(self._root) if "file" in _protocols(self._fs) else None
        """Where file:// leads."""

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of everything there; empty where there is nothing yet."""
        with self._told("can't be listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            start = f"{self._root}/"
            return {
                path[len(start) :]: int(entry["size"])
                for path, entry in found.items()
                if path.startswith(start)
            }

    def put(self, name: str, path: Path) -> None:
        """Copy a file there."""
        with self._told(f"can't be given {name}"):
            if self.local is not None:
                self._put_local(name, _blocks(path))
            else:
                self._fs.put_file(str(path), f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        with self._told(f"can't be given {name}"):
            if self.local is not None:
                self._put_local(name, [content])
            else:
                self._fs.pipe_file(f"{self._root}/{name}", content)

    def _put_local(self, name: str, chunks: Iterable[bytes]) -> None:
        path = Path(self._root, name)
        partial = path.with_name(f".{path.name}.partial")
        durable.make_folder(path.parent)
        durable.remove(partial)
        durable.write_file(partial, chunks)
        os.replace(partial, path)  # noqa: PTH105
        durable.sync_folder(path.parent)

    def read(self, name: str) -> bytes:
        """A small object, whole."""
        with self._told(f"can't be read: {name}"):
            return self._fs.cat_file(f"{self._root}/{name}")

    def blocks(self, name: str) -> Iterator[bytes]:
        """An object, piece by piece."""
        with self._told(f"can't be read: {name}"):
            options: dict[str, Any] = {} if self.local else {"block_size": BLOCK_BYTES}
            with self._fs.open(f"{self._root}/{name}", "rb", **options) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block

    def remove(self, name: str) -> None:
        """Remove an object; one that is gone already is no error."""
        with self._told(f"does not let {name} be deleted"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")
            if self.local is not None:
                with contextlib.suppress(OSError):  # not empty
                    Path(self._root, name).parent.rmdir()

    def probe(self) -> None:
        """Write a small object, read it back, delete it."""
        name, content = f".probe-{secrets.token_hex(4)}", secrets.token_bytes(16)
        self.write(name, content)
        try:
            if self.read(name) != content:
                raise StoreError(
                    f"checkpoint.copy_to {self.url} gives back other bytes than it got"
                )
        finally:
            self.remove(name)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever a store's client raises, in one line: each has errors of its own."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise StoreError(
                f"checkpoint.copy_to {self.url} {what}: {_why(error)}", lasting=_lasting(error)
            ) from error


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system, and the path of `url` in it. Raises StorageError."""
    import fsspec
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise StorageError(
            f"checkpoint.copy_to {url}: nobody knows the protocol {protocol}; "
            "s3, gs, az, file or another of fsspec's is wanted"
        ) from None
    except ImportError as error:
        package = PACKAGES.get(protocol)
        todo = f"pip install {package}" if package else _why(error)
        raise StorageError(
            f"checkpoint.copy_to {url} needs a package that is not installed; {todo}"
        ) from None
    try:
        # Not cached: what others did to the store since must be seen.
        fs, path = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except Exception as error:  # of whatever client it is
        raise StorageError(f"checkpoint.copy_to {url} can't be opened: {_why(error)}") from error
    return fs, path.rstrip("/")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(durable.BLOCK_BYTES):
            yield block


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _lasting(error: Exception) -> bool:
    """Whether trying again is of no use: no right, no such bucket, no credentials."""
    wrong = isinstance(error, PermissionError | FileNotFoundError | NotImplementedError)
    return wrong or "Credentials" in type(error).__name__
