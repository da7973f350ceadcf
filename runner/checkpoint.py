"""Checkpoints: atomic, verified, safetensors and JSON only, of no world size and no ZeRO stage.

    RUN/checkpoints/step-00000040/state.safetensors     {weight|exp_avg|exp_avg_sq}/{parameter}
                                  manifest.json         written last; SHA-256 of every other file
    RUN/checkpoints/latest                              name of the newest; a hint, never trusted

A folder without a manifest that verifies is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimpot.runner.engine import State
from trimpot.runner.errors import CheckpointError, StorageError
from trimpot.runner.types import Checkpoint

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.safetensors"
log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, state: State, *, step: int, cursor: int, complete: bool, facts: dict[str, Any]
) -> Checkpoint:
    """Write one checkpoint into `folder` (RUN/checkpoints) so that it is there whole or not.

    `facts`: plan_digest, data_digest, world_size and whatever else is worth keeping.
    Raises StorageError; what stood before then still stands.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {
            f"{key}/{name}": tensor.contiguous()
            for name, values in state.items()
            for key, tensor in values.items()
        }
        save_file(tensors, partial / STATE)
        manifest = {
            "format": FORMAT,
            "step": step,
            "cursor": cursor,
            "complete": complete,
            "saved_at": time.time(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
            "files": {STATE: _fingerprint(partial / STATE)},
            **facts,
        }
        _sync(partial / STATE)
        text = json.dumps(manifest, indent=2, sort_keys=True)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        if final.exists():  # the same step, saved again by a run that resumed
            shutil.rmtree(final)
        partial.replace(final)
        _sync(folder)
        _point(folder, final.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"checkpoint {final} can't be written: {error}") from None
    return _checkpoint(final, manifest)


def _point(folder: Path, name: str) -> None:
    partial = folder / "latest.partial"
    partial.write_text(name + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(folder / "latest")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _checkpoint(path: Path, manifest: dict[str, Any]) -> Checkpoint:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return Checkpoint(
        path=path,
        step=manifest["step"],
        cursor=manifest["cursor"],
        plan_digest=manifest["plan_digest"],
        digest=digest,
        complete=manifest["complete"],
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one checkpoint, its files verified. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        for name, wanted in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"checkpoint {path} names the file {name!r} outside itself")
            found = _fingerprint(path / name)
            if found != wanted:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {found['size']} bytes, SHA-256 "
                    f"{found['sha256'][:12]}…, not {wanted['size']}, {wanted['sha256'][:12]}…"
                )
        for key, kind in KEYS.items():
            if not isinstance(manifest[key], kind):
                raise CheckpointError(f"checkpoint {path}: {key} is {manifest[key]!r}")
    except OSError as error:
        name = Path(error.filename or path).name
        raise CheckpointError(f"checkpoint {path} lacks {name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} has a broken manifest: {error!r}") from None
    return manifest


KEYS = {"step": int, "cursor": int, "plan_digest": str, "data_digest": str, "complete": bool}


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; verified or not."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_checkpoint(
    folder: Path, say: Callable[[str], None], set_aside: bool
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest, or None.

    Each damaged one is named through `say`, and with `set_aside` renamed out of the way.
    """
    for path in list_checkpoints(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            say(f"{error}; set aside, an older one is used")
            if set_aside and path.exists():
                path.replace(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
            continue
        return _checkpoint(path, manifest), manifest
    return None


def load_state(checkpoint: Checkpoint) -> State:
    """The tensors of a verified checkpoint. Raises CheckpointError."""
    try:
        tensors = load_file(checkpoint.path / STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} can't be read: {error}") from None
    state: State = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        state.setdefault(name, {})[part] = tensor
    return state


def check_state(state: State, wanted: dict[str, torch.Size], path: Path) -> None:
    """Whether a state is of this model. Raises CheckpointError."""
    if odd := sorted(state.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"checkpoint {path} is of another model: {len(odd)} parameters differ, first {odd[0]}"
        )
    for name, shape in wanted.items():
        if state[name]["weight"].shape != shape:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {tuple(state[name]['weight'].shape)}, "
                f"and the model wants {tuple(shape)}"
            )


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what broken saves left."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)
