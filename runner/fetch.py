"""A checkpoint of an object store → RUN/checkpoints: verified against its manifest on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimpot.runner import durable
from trimpot.runner.checkpoint import cannot_write, finish, staging
from trimpot.runner.copies import Copy, Found
from trimpot.runner.errors import CheckpointError
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint


def fetch(store: Store, copy: Copy, folder: Path, token: str) -> Checkpoint:
    """Bring a copy into `folder` (RUN/checkpoints), durable, its files verified.

    Raises CheckpointError where it is damaged, StoreError, StorageError where the disk refuses.
    """
    partial = staging(folder, copy.step, token)
    durable.remove(partial)
    try:
        for file, wanted in copy.manifest["files"].items():
            _fetch_file(store, copy, file, wanted, partial)
        return finish(partial, copy.manifest)
    except BaseException:
        durable.remove(partial)
        raise


def _fetch_file(store: Store, copy: Copy, file: str, wanted: Any, partial: Path) -> None:
    where = f"{store.url}/{copy.name}"
    try:
        durable.make_folder(partial)
        got = durable.write_file(partial / file, store.blocks(f"{copy.name}/{file}"))
    except OSError as error:
        raise cannot_write(partial / file, error) from None
    if got["size"] != wanted["size"] or got["sha256"] != wanted["sha256"]:
        raise CheckpointError(
            f"checkpoint {where} is damaged: {file} has {got['size']} bytes, SHA-256 "
            f"{got['sha256'][:12]}…, not {wanted['size']}, {wanted['sha256'][:12]}…"
        )


def fetch_newest(
    store: Store, found: Found, folder: Path, after: int, token: str, say: Callable[[str], None]
) -> tuple[Checkpoint | None, set[str]]:
    """Fetch the newest good copy of a step over `after`, if there is one → it, and the names of
    those that were found damaged, each named through `say`. Raises StoreError, StorageError."""
    spoilt: set[str] = set()
    for fault in found.faults:
        if fault.step > after:
            say(f"{fault.text}; it is left out")
            spoilt.add(fault.name)
    for copy in found.copies:
        if copy.step <= after:
            break
        try:
            return fetch(store, copy, folder, token), spoilt
        except CheckpointError as error:
            say(f"{error}; it is left out, an older one is used")
            spoilt.add(copy.name)
    return None, spoilt
