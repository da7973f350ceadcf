"""Checkpoints in an object store: copied there, found there again, fetched, verified.

    URL/step-00000040-3f2a9c51b07e/state.safetensors   the files of the local checkpoint
                                   manifest.json        put last, removed first

There are no renames in an object store, so what makes a checkpoint is its manifest, which is put
once everything that it names is there with its size. A folder is named after its step and the
SHA-256 of its manifest: nothing is ever replaced by other content, whoever else writes there, and a
copy that broke off is made again in its own place. As on disk, the manifest has the SHA-256 of each
file, and nothing is loaded that does not agree with it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.runner import durable
from trimpot.runner.errors import CheckpointError, StoreError
from trimpot.runner.manifest import MANIFEST, digest_of, parse_manifest
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint

OBJECT = re.compile(r"(step-(\d{8,})-[0-9a-f]{12})/([^/]+)")


@dataclass(frozen=True)
class Copy:
    """A checkpoint in the store with a manifest that names only what is there."""

    name: str
    step: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    name: str
    step: int
    text: str


@dataclass(frozen=True)
class Found:
    """What a store holds of checkpoints, the newest first. Those without a manifest, of copies that
    broke off, are in neither list."""

    copies: list[Copy]
    faults: list[Fault]
    objects: dict[str, list[str]]
    """{folder: its files}, of all."""


def name_of(step: int, digest: str) -> str:
    """The folder of a checkpoint in the store. `digest`: of its manifest."""
    return f"step-{step:08d}-{digest[:12]}"


def look(store: Store) -> Found:
    """List the store and read its manifests. Raises StoreError."""
    sizes: dict[str, dict[str, int]] = {}
    for path, size in store.sizes().items():
        if match := OBJECT.fullmatch(path):
            sizes.setdefault(match[1], {})[match[3]] = size
    copies: list[Copy] = []
    faults: list[Fault] = []
    for name, there in sizes.items():
        if MANIFEST not in there:
            continue
        step = int(name.split("-")[1])
        try:
            copies.append(Copy(name, step, _manifest(store, name, there)))
        except CheckpointError as error:
            faults.append(Fault(name, step, str(error)))
    copies.sort(key=lambda copy: (copy.step, copy.manifest.get("saved_at", 0.0)), reverse=True)
    faults.sort(key=lambda fault: fault.step, reverse=True)
    return Found(copies, faults, {name: sorted(there) for name, there in sizes.items()})


def _manifest(store: Store, name: str, there: dict[str, int]) -> dict[str, Any]:
    """Raises CheckpointError where it was damaged, or what it names is not there."""
    where = f"{store.url}/{name}"
    manifest = parse_manifest(store.read(f"{name}/{MANIFEST}"), where)
    if name != name_of(manifest["step"], digest_of(manifest)):
        raise CheckpointError(f"checkpoint {where} is damaged: its {MANIFEST} is another's")
    for file, wanted in manifest["files"].items():
        if Path(file).name != file or file not in there:
            raise CheckpointError(f"checkpoint {where} lacks {file}")
        if there[file] != wanted["size"]:
            raise CheckpointError(
                f"checkpoint {where} is damaged: {file} has {there[file]} bytes, "
                f"not {wanted['size']}"
            )
    return manifest


def check_same(found: Found, url: str, plan_digest: str, data_digest: str) -> None:
    """Whether all that is there is of this run: the oldest would be removed, the newest loaded.

    Raises CheckpointError.
    """
    for copy in found.copies:
        if copy.manifest["plan_digest"] != plan_digest:
            raise CheckpointError(
                f"checkpoint {url}/{copy.name} is of a run with other settings; "
                "start over with --fresh, or choose another checkpoint.copy_to"
            )
        if copy.manifest["data_digest"] != data_digest:
            raise CheckpointError(
                f"the data changed since checkpoint {url}/{copy.name} was saved; put them back, "
                "start over with --fresh, or choose another checkpoint.copy_to"
            )


def upload(store: Store, checkpoint: Checkpoint, verify: bool) -> int:
    """Copy one checkpoint → its bytes. `verify`: read it back.

    Raises StoreError, CheckpointError.
    """
    content = _read_local(checkpoint.path / MANIFEST)
    manifest = parse_manifest(content, checkpoint.path)
    name = name_of(checkpoint.step, checkpoint.digest)
    files: dict[str, durable.Fingerprint] = manifest["files"]
    for file in files:
        store.put(f"{name}/{file}", checkpoint.path / file)
    sizes = store.sizes()
    for file, wanted in files.items():
        if (size := sizes.get(f"{name}/{file}")) != wanted["size"]:
            raise StoreError(f"{store.url}/{name}/{file} has {size} bytes, not {wanted['size']}")
        if verify and _sha256(store, f"{name}/{file}") != wanted["sha256"]:
            raise StoreError(f"{store.url}/{name}/{file} reads back as other bytes than were sent")
    store.write(f"{name}/{MANIFEST}", content)
    if store.read(f"{name}/{MANIFEST}") != content:
        raise StoreError(f"{store.url}/{name}/{MANIFEST} reads back as other bytes than were sent")
    return len(content) + sum(wanted["size"] for wanted in files.values())


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path.parent} is gone: {error.strerror}") from None


def _sha256(store: Store, name: str) -> str:
    digest = hashlib.sha256()
    for block in store.blocks(name):
        digest.update(block)
    return digest.hexdigest()


def prune(store: Store, newest: str, keep: int, spoilt: Collection[str] = ()) -> None:
    """After `newest` was copied: delete all but the newest `keep`, and what broke off.

    `spoilt`: copies that were found damaged; they do not count. Raises StoreError.
    """
    found = look(store)
    good = [copy.name for copy in found.copies if copy.name not in (newest, *spoilt)]
    kept = {newest, *good[: keep - 1]}
    # The oldest first: whenever this breaks off, the newest are there.
    for name in sorted(found.objects.keys() - kept):
        remove(store, name, found)


def clear(store: Store) -> int:
    """Delete all checkpoints of the store, the oldest first → how many. Raises StoreError."""
    found = look(store)
    for name in sorted(found.objects):
        remove(store, name, found)
    return len(found.copies)


def remove(store: Store, name: str, found: Found) -> None:
    files = found.objects[name]
    for file in sorted(files, key=lambda file: file != MANIFEST):  # half removed, it is none
        store.remove(f"{name}/{file}")
