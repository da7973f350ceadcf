"""Checkpoints: atomic, verified, safetensors and JSON only, of no world size and no ZeRO stage.

    RUN/checkpoints/step-00000040/state.safetensors     {weight|exp_avg|exp_avg_sq}/{parameter}
                                  manifest.json         written last; SHA-256 of every other file
    RUN/checkpoints/latest                              name of the newest; a hint, never trusted

Where several workers hold a part each, there is a `shard-00001-of-00004.safetensors` of each in
place of state.safetensors: one flat tensor a name, and the manifest says which elements it is of.

A save writes into a hidden folder beside its target: files, their fsync, the folder's; the
manifest, its fsync, the folder's; one rename to the final name, the parent's fsync; only then the
pointer, and only then are older ones removed. So a folder of that name is whole, or was damaged
later; one without a manifest that verifies is no checkpoint. Nothing is ever replaced: a step that
is saved again gets `step-00000040-1`.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trimpot.runner import durable
from trimpot.runner.durable import Fingerprint
from trimpot.runner.engine import Share, State
from trimpot.runner.errors import CheckpointError, StorageError, TrainError
from trimpot.runner.manifest import (
    FORMAT,
    MANIFEST,
    broken,
    digest_of,
    parse_manifest,
    seal_of,
    text_of,
)
from trimpot.runner.reading import MANIFEST_BYTES, read_bounded
from trimpot.runner.types import Checkpoint

STATE = "state.safetensors"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
log = logging.getLogger(__name__)


# --- writing


def save_checkpoint(
    folder: Path, state: State, *, step: int, cursor: int, complete: bool, facts: dict[str, Any]
) -> Checkpoint:
    """Write one checkpoint into `folder` (RUN/checkpoints) so that it is there whole or not.

    `facts`: plan_digest, data_digest, world_size and whatever else is worth keeping.
    Raises StorageError; what stood before then still stands.
    """
    partial = staging(folder, step, "alone")
    durable.remove(partial)
    try:
        files = {STATE: write_state(partial, state)}
        return commit(partial, files, step=step, cursor=cursor, complete=complete, facts=facts)
    except (StorageError, TrainError):
        durable.remove(partial)
        raise


def staging(folder: Path, step: int, token: str) -> Path:
    """Where the files of a save lie until it is committed. `token`: of this start of the run, so
    that a writer left over from an earlier one writes elsewhere."""
    return folder / f".step-{step:08d}.{token}.partial"


def write_state(partial: Path, state: State) -> Fingerprint:
    """Write whole tensors of all parameters as the only file. Raises StorageError, and TrainError
    where they are not finite."""
    tensors = {f"{key}/{n}": t for n, values in state.items() for key, t in values.items()}
    return _write_tensors(partial / STATE, tensors)


def write_shard(partial: Path, share: Share, rank: int, world: int) -> None:
    """Write one worker's part, and beside it a JSON file of what it is, for `read_shards`.

    Raises StorageError.
    """
    path = partial / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    tensors = {f"{key}/{n}": t for n, (_, v) in share.items() for key, t in v.items()}
    slices = {
        name: [start, start + next(iter(values.values())).numel()]
        for name, (start, values) in share.items()
    }
    entry = {**_write_tensors(path, tensors), "slices": slices}
    try:
        durable.write_file(path.with_suffix(".json"), [json.dumps(entry).encode()])
    except OSError as error:
        raise cannot_write(path, error) from None


def read_shards(partial: Path, world: int) -> dict[str, Any]:
    """{file: its entry in the manifest} of the shards of all workers. Raises StorageError."""
    files: dict[str, Any] = {}
    for rank in range(world):
        path = partial / f"shard-{rank:05d}-of-{world:05d}.json"
        try:
            files[path.with_suffix(".safetensors").name] = json.loads(path.read_bytes())
            os.unlink(path)  # noqa: PTH108
        except (OSError, ValueError) as error:
            raise StorageError(
                f"the shard of worker {rank} is not in {partial}: {error}; "
                "output_dir must be on storage that all workers share"
            ) from None
    return files


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Fingerprint:
    try:
        durable.make_folder(path.parent)
        return durable.write_file(path, _safetensors(tensors))
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"checkpoint {path} can't be written: {error.strerror or error}")


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """fp32 tensors on the CPU in safetensors' format, piece by piece.

    u64 length of the header, the header (JSON, padded to 8 bytes with spaces), the tensors.
    The library's own writers make a second copy of everything, under the GIL.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu"), name
        end = offset + 4 * tensor.numel()
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():  # nothing that a run could go on from
            raise TrainError(f"{name.partition('/')[2]} holds values that are not finite")
        if tensor.numel():
            yield tensor.detach().contiguous().view(-1).numpy().data.cast("B")


def commit(
    partial: Path,
    files: dict[str, Any],
    *,
    step: int,
    cursor: int,
    complete: bool,
    facts: dict[str, Any],
) -> Checkpoint:
    """Make a checkpoint of the files that lie, fsynced, in `partial`. Raises StorageError."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "cursor": cursor,
        "complete": complete,
        "saved_at": time.time(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        "files": files,
        **facts,
    }
    manifest["seal"] = seal_of(manifest)
    return finish(partial, manifest)


def finish(partial: Path, manifest: dict[str, Any]) -> Checkpoint:
    """Make a checkpoint of the files in `partial` and their manifest. Raises StorageError."""
    folder, step = partial.parent, manifest["step"]
    try:
        durable.sync_folder(partial)  # a manifest never stands where its files may yet be lost
        durable.write_file(partial / MANIFEST, [text_of(manifest).encode()])
        durable.sync_folder(partial)
        final = _move_to_free_name(partial, folder, step)
    except OSError as error:
        raise cannot_write(folder / f"step-{step:08d}", error) from None
    try:
        durable.put_text(folder / "latest", final.name + "\n")
    except OSError:  # none is better than one that will name what is gone
        durable.remove(folder / "latest")
    return _checkpoint(final, manifest)


def _move_to_free_name(partial: Path, folder: Path, step: int) -> Path:
    attempt = 0
    while True:
        final = folder / (f"step-{step:08d}" + (f"-{attempt}" if attempt else ""))
        try:
            if not final.exists():
                durable.move_folder(partial, final)
                return final
        except OSError as error:  # another writer was there first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        attempt += 1


def prune(
    folder: Path,
    newest: Checkpoint,
    keep: int,
    token: str = "alone",
    spare: Callable[[int], bool] | None = None,
    reading: Collection[Path] = (),
) -> None:
    """After `newest` was saved: delete all but the newest `keep`, and what broken saves left.

    `newest` stays even where others have later steps, and so does the newest whose step `spare`
    accepts. Saves that this start of the run (`token`) has begun since are left alone, and so are
    those that somebody is `reading`.
    """
    every = list_checkpoints(folder)
    others = [path for path in every if path != newest.path]
    spared = next((path for path in every if spare is not None and spare(step_of(path))), None)
    with suppress(OSError):
        for path in others[max(0, keep - 1) :]:  # half removed, they are no checkpoints
            if path == spared or path in reading:
                continue
            os.rename(path, path.with_name(f".{path.name}.gone"))  # noqa: PTH104
        durable.sync_folder(folder)
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.gone")]:
        step, ours = re.match(r"\.step-(\d+)", path.name), f".{token}.partial"
        if not path.name.endswith(ours) or (step and int(step[1]) <= newest.step):
            durable.remove(path)


# --- finding and verifying


def _checkpoint(path: Path, manifest: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        path=path,
        step=manifest["step"],
        cursor=manifest["cursor"],
        plan_digest=manifest["plan_digest"],
        digest=digest_of(manifest),
        complete=manifest["complete"],
    )


def read_manifest(path: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of one checkpoint, its files verified. Raises CheckpointError.

    `part` of `parts`: every so manieth file only, where several workers share the work.
    """
    try:
        manifest = parse_manifest(read_bounded(path / MANIFEST, MANIFEST_BYTES), path)
        named = NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["step"]:
            raise CheckpointError(
                f"checkpoint {path} holds step {manifest['step']}; its folder was renamed"
            )
        for name in sorted(manifest["files"])[part::parts]:
            _check_file(path, name, manifest["files"][name])
    except OSError as error:
        name = Path(error.filename or path).name
        raise CheckpointError(f"checkpoint {path} lacks {name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(path, error) from None
    return manifest


def _check_file(path: Path, name: str, wanted: Fingerprint) -> None:
    if Path(name).name != name or not name.isprintable() or len(name.encode()) > 255:
        raise CheckpointError(f"checkpoint {path} names the file {name[:80]!r} outside itself")
    if not (path / name).is_file() or (path / name).is_symlink():
        raise CheckpointError(f"checkpoint {path} lacks {name}")
    found = durable.fingerprint(path / name)
    if any(found[key] != wanted[key] for key in ("size", "sha256")):
        raise CheckpointError(
            f"checkpoint {path} is damaged: {name} has {found['size']} bytes, SHA-256 "
            f"{found['sha256'][:12]}…, not {wanted['size']}, {wanted['sha256'][:12]}…"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; verified or not."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    order = [(int(m[1]), int(m[2] or 0), path) for m, path in found if m]
    return [path for _, _, path in sorted(order, reverse=True)]


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def newest_checkpoint(
    folder: Path, say: Callable[[str], None], set_aside: bool
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest, or None.

    Each damaged one is named through `say`, and with `set_aside` renamed out of the way.
    """
    for path in list_checkpoints(folder):
        try:
            return checkpoint_at(path)
        except CheckpointError as error:
            say(f"{error}; set aside, an older one is used")
            if set_aside:
                put_aside(path)
    return None


def checkpoint_at(path: Path, part: int = 0, parts: int = 1) -> tuple[Checkpoint, dict[str, Any]]:
    """One checkpoint and its manifest, verified as `read_manifest` does. Raises CheckpointError."""
    manifest = read_manifest(path, part, parts)
    return _checkpoint(path, manifest), manifest


def put_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it can be looked at and is not met again.

    Where that is not permitted it stays, to be refused again.
    """
    with suppress(OSError):
        os.rename(path, path.with_name(f"damaged-{path.name}-{time.time_ns()}"))  # noqa: PTH104


# --- reading


class Reader:
    """The tensors of a verified checkpoint, whole or in part, whoever wrote which of them.

    Holds the files open; nothing is read before it is asked for. Raises CheckpointError where
    they do not make up whole parameters.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.shapes: dict[str, torch.Size] = {}
        self._slices: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        with ExitStack() as stack, _as_checkpoint_error(path):
            for name, entry in manifest["files"].items():
                self._add(stack.enter_context(safe_open(path / name, framework="pt")), entry)
            sharded = manifest.get("shapes")
            if sharded is not None:
                self.shapes = {name: torch.Size(shape) for name, shape in sharded.items()}
            for (name, key), slices in self._slices.items():
                slices.sort(key=lambda piece: piece[:2])
                ends = [0, *(stop for _, stop, _ in slices)]
                starts = [*(start for start, _, _ in slices), math.prod(self.shapes[name])]
                if starts != ends:
                    raise CheckpointError(f"checkpoint {path} does not hold all of {key} of {name}")
            if missing := self.shapes.keys() - {name for name, _ in self._slices}:
                raise CheckpointError(f"checkpoint {path} lacks {min(missing)}")
            self._stack = stack.pop_all()

    def _add(self, file: Any, entry: dict[str, Any]) -> None:
        for tensor in file.keys():  # noqa: SIM118
            key, _, name = tensor.partition("/")
            shape = file.get_slice(tensor).get_shape()
            if "slices" in entry:
                start, stop = entry["slices"][name]
                if shape != [stop - start]:
                    raise CheckpointError(f"checkpoint {self.path}: {tensor} is {shape}")
            else:
                start, stop = 0, math.prod(shape)
                self.shapes[name] = torch.Size(shape)
            self._slices.setdefault((name, key), []).append((start, stop, (file, tensor)))

    def keys(self, name: str) -> list[str]:
        """Which of weight, exp_avg, exp_avg_sq there are of a parameter."""
        return [key for owner, key in self._slices if owner == name]

    def part(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start … stop − 1 of the flattened parameter → fp32 [stop − start]."""
        with _as_checkpoint_error(self.path):
            found = []
            for first, last, (file, tensor) in self._slices[name, key]:
                low, high = max(start, first), min(stop, last)
                if low < high:
                    flat = file.get_tensor(tensor).reshape(-1)
                    found.append(flat[low - first : high - first])
            return torch.cat(found) if found else torch.empty(0)

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A parameter's weight or moment → fp32, of its shape."""
        shape = self.shapes[name]
        return self.part(name, key, 0, math.prod(shape)).reshape(shape)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # its numbers may be any: OverflowError, RuntimeError of torch …
        fault = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"checkpoint {path} can't be read: {fault}") from None


def load_state(
    checkpoint: Checkpoint, keys: tuple[str, ...] = ("weight", "exp_avg", "exp_avg_sq")
) -> State:
    """The tensors of a verified checkpoint, whole. Raises CheckpointError."""
    with _as_checkpoint_error(checkpoint.path):
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    reader = Reader(checkpoint.path, manifest)
    try:
        return {
            name: {key: reader.whole(name, key) for key in keys if key in reader.keys(name)}
            for name in reader.shapes
        }
    finally:
        reader.close()


def check_shapes(shapes: dict[str, torch.Size], wanted: dict[str, torch.Size], path: Path) -> None:
    """Whether a checkpoint is of this model. Raises CheckpointError."""
    if odd := sorted(shapes.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"checkpoint {path} is of another model: {len(odd)} parameters differ, first {odd[0]}"
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {tuple(shapes[name])}, "
                f"and the model wants {tuple(shape)}"
            )
