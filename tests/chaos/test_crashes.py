"""Whatever moment a machine dies at, the newest durable checkpoint is loaded, bit for bit.

Real saves are recorded call by call; of every moment between two calls, the trees that a crash
may leave are made on disk (crash.py has the model), and the real loader is let loose on them.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Call, Disk, Recorder, Tree, read_tree, write_tree

from trimpot.runner import checkpoint as module
from trimpot.runner import manifest as manifests
from trimpot.runner.checkpoint import (
    MANIFEST,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    prune,
    read_manifest,
    read_shards,
    save_checkpoint,
    staging,
    write_shard,
)
from trimpot.runner.engine import Share, State
from trimpot.runner.errors import CheckpointError
from trimpot.runner.saver import Failed, Saved, Saver

FACTS = {"plan_digest": "p", "data_digest": "d"}
SHAPES = {"a": (3, 4), "b": (5,)}


def state(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    keys = ("weight", "exp_avg", "exp_avg_sq")
    return {n: {k: torch.randn(s, generator=draw) for k in keys} for n, s in SHAPES.items()}


def shares(whole: State, world: int) -> list[Share]:
    """As stages 1 and 2 cut it: the second worker's part begins in the middle of a parameter."""
    parts: list[Share] = [{} for _ in range(world)]
    total = sum(values["weight"].numel() for values in whole.values())
    offset = 0
    for name, values in whole.items():
        size = values["weight"].numel()
        for rank in range(world):
            low, high = total * rank // world - offset, total * (rank + 1) // world - offset
            low, high = max(0, low), min(size, high)
            if low < high:
                flat = {key: t.reshape(-1)[low:high].clone() for key, t in values.items()}
                parts[rank][name] = (low, flat)
        offset += size
    return parts


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


# --- stories: real saves, recorded


@dataclass
class Story:
    """Saves of a run, with a mark (step, seed of the state) where each is said to be durable."""

    folder: Path
    recorder: Recorder
    saver: Saver
    keep: int

    def save(self, step: int, seed: int | None = None) -> None:
        """One worker, as `train` does it: in the background, then waited for."""
        seed = step if seed is None else seed
        self.recorder.mark(("begin", (step, seed)))
        self.saver.begin(
            state(seed), sharded=False, began=0.0, step=step, cursor=step, complete=False,
            facts=FACTS,
        )  # fmt: skip
        (outcome,) = self.saver.finish()
        assert isinstance(outcome, Saved), outcome
        self.recorder.mark(("durable", (step, seed)))

    def save_shards(self, step: int, world: int) -> None:
        """Several workers, one after the other: what they do to the disk is the same."""
        self.recorder.mark(("begin", (step, step)))
        partial = staging(self.folder, step, "token")
        for rank, share in enumerate(shares(state(step), world)):
            write_shard(partial, share, rank, world)
        facts = {**FACTS, "shapes": {n: list(s) for n, s in SHAPES.items()}}
        saved = module.commit(
            partial, read_shards(partial, world), step=step, cursor=step, complete=False,
            facts=facts,
        )  # fmt: skip
        prune(self.folder, saved, self.keep, "token")
        self.recorder.mark(("durable", (step, step)))

    def save_in_vain(self, step: int, after: int) -> None:
        """The disk is full after so many bytes."""
        self.recorder.mark(("begin", (step, step)))
        with full_disk(after):
            self.saver.begin(
                state(step), sharded=False, began=0.0, step=step, cursor=step, complete=False,
                facts=FACTS,
            )  # fmt: skip
            (outcome,) = self.saver.finish()
        assert isinstance(outcome, Failed), outcome
        assert "No space left" in outcome.why

    def resume(self) -> None:
        newest_checkpoint(self.folder, lambda _: None, set_aside=True)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """`os.write` takes so many bytes, the last write a part only, and then refuses as Linux does.

    A stand-in for the system call; the saver is tested against a limit of the kernel.
    """
    real, left = os.write, [room]

    def write(handle: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(handle, data[: left[0]])
        left[0] -= taken
        return taken

    os.write = write
    try:
        yield
    finally:
        os.write = real


def plain(story: Story) -> None:
    for step in (1, 2, 3, 4):
        story.save(step)


def sharded(story: Story) -> None:
    for step, world in ((1, 2), (2, 3), (3, 2)):
        story.save_shards(step, world)


def again(story: Story) -> None:
    """The newest is damaged; the run goes on from the one before, and saves that step again."""
    story.save(1)
    story.save(2)
    newest = list_checkpoints(story.folder)[0]
    content = bytearray((newest / module.STATE).read_bytes())
    content[-1] ^= 1
    story.recorder.mark(("spoil", (2, 2)))
    handle = os.open(newest / module.STATE, os.O_WRONLY)
    os.write(handle, content)
    os.fsync(handle)
    os.close(handle)
    story.resume()
    story.save(2, seed=22)
    story.save(2, seed=23)
    story.save(3)


def full(story: Story) -> None:
    """A disk without room for one save, and with room for the next."""
    story.save(1)
    for step, room in ((2, 100), (3, 900)):
        story.save_in_vain(step, room)
    story.save(4)


STORIES: dict[str, tuple[Callable[[Story], None], int]] = {
    "plain, keep 2": (plain, 2),
    "plain, keep 1": (plain, 1),
    "sharded": (sharded, 1),
    "saved again": (again, 2),
    "full disk": (full, 1),
}


def record(folder: Path, name: str) -> list[Call]:
    tell, keep = STORIES[name]
    recorder = Recorder(folder)
    checkpoints = folder / "checkpoints"
    story = Story(checkpoints, recorder, Saver(checkpoints, keep, 0, 1, "token"), keep)
    with recorder.recording():
        tell(story)
    assert recorder.replay() == read_tree(folder), "something was written unseen"
    return recorder.calls


# --- what must hold after a crash


class Crashed(Exception):
    """A state of the disk that the loader gets wrong."""


Known = tuple[int, int] | None
"""(step, seed of its state) of a save."""


def check(folder: Path, durable: Known, begun: Known, spoilt: set[str]) -> None:
    """`durable`: the newest save that returned; `begun`: one under way; `spoilt`: names of
    checkpoints that something else than a crash has damaged."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        on_its_way_out = path.name.startswith("damaged-") or path.name.endswith(".gone")
        if path.is_dir() and not on_its_way_out and path.name not in spoilt and sealed(path):
            try:
                read_manifest(path)
            except CheckpointError as error:
                raise Crashed(f"a manifest stands without its files: {error}") from None
    pointer = checkpoints / "latest"
    if pointer.exists() and (named := pointer.read_text().strip()) not in spoilt:
        try:
            read_manifest(checkpoints / named)
        except CheckpointError as error:
            raise Crashed(f"latest names what is no checkpoint: {error}") from None
    found = newest_checkpoint(checkpoints, lambda _: None, set_aside=True)
    if found is None:
        if durable is not None:
            raise Crashed(f"nothing is found, step {durable[0]} was durable")
        return
    step, held = found[0].step, load_state(found[0])
    allowed = [known for known in (durable, begun) if known is not None and known[0] == step]
    if not any(same(held, state(seed)) for _, seed in allowed):
        raise Crashed(f"step {step} is loaded; durable {durable}, under way {begun}")


def sealed(path: Path) -> bool:
    """Whether there is a manifest, and all of it."""
    try:
        text = (path / MANIFEST).read_bytes().decode()
        return text == manifests.text_of(json.loads(text))
    except (OSError, ValueError):
        return False


def go_on(folder: Path) -> None:
    """The next start of the run saves, and finds that."""
    checkpoints = folder / "checkpoints"
    save_checkpoint(checkpoints, state(99), step=99, cursor=9, complete=True, facts=FACTS)
    found = newest_checkpoint(checkpoints, pytest.fail, set_aside=True)
    assert found is not None
    assert (found[0].step, same(load_state(found[0]), state(99))) == (99, True)


def crash_everywhere(calls: list[Call], draw: random.Random, most: int) -> int:
    """Crash after each call → how many different states were tried. Raises Crashed."""
    shm = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() else None))
    disk, tried = Disk(), set[Any]()
    durable = begun = None
    spoilt = set[str]()
    try:
        for call in calls:
            disk.do(call)
            if call.kind == "mark":
                kind, known = call.mark
                match kind:
                    case "begin":
                        begun = known
                    case "durable":
                        durable, begun = known, None
                    case "spoil":  # the bit may have flipped already, or not yet
                        durable, begun = (1, 1), durable
                        spoilt.add(f"step-{known[0]:08d}")
            for tree in disk.crashes(draw, most):
                key = (frozen(tree), durable, begun)
                if key in tried:
                    continue
                tried.add(key)
                folder = scratch / str(len(tried))
                write_tree(tree, folder)
                try:
                    check(folder, durable, begun, spoilt)
                    if len(tried) % 16 == 0:
                        go_on(folder)
                except Crashed as error:
                    raise Crashed(f"after {call}: {error}") from None
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(tried)


def frozen(tree: Tree) -> Any:
    return tuple((n, frozen(c) if isinstance(c, dict) else c) for n, c in tree.items())


@pytest.mark.parametrize("name", STORIES)
def test_every_crash_leaves_the_newest_durable_checkpoint(tmp_path, name, draw):
    assert crash_everywhere(record(tmp_path, name), draw, most=12) > 100


@pytest.mark.chaos
@pytest.mark.parametrize("name", STORIES)
def test_every_crash_at_length(tmp_path, name, draw, count):
    tried = crash_everywhere(record(tmp_path, name), draw, most=500)
    assert tried > 1000
    count(crash_states=tried)


# --- that the checker sees


def without(kind: str, part: str) -> Callable[[list[Call]], list[Call]]:
    """A saver that leaves out these calls."""
    return lambda calls: [c for c in calls if not (c.kind == kind and part in f"/{c.path}/")]


def earlier(of: str, before: str) -> Callable[[list[Call]], list[Call]]:
    """A saver that, in each save, makes the calls on `of` before the first one on `before`."""

    def change(calls: list[Call]) -> list[Call]:
        saves: list[list[Call]] = [[]]
        for call in calls:
            if call.kind == "mark" and call.mark[0] == "begin":
                saves.append([])
            saves[-1].append(call)
        found: list[Call] = []
        for save in saves:
            moved = [c for c in save if of in str(c)]
            rest = [c for c in save if of not in str(c)]
            at = next((i for i, c in enumerate(rest) if before in str(c)), len(rest))
            found += [*rest[:at], *moved, *rest[at:]]
        return found

    return change


PLANTS = {
    "tensors are not synced": ("plain, keep 1", without("fsync", "/state.safetensors/")),
    "the manifest is not synced": ("plain, keep 1", without("fsync", "/manifest.json/")),
    "the folder is not synced": ("plain, keep 1", without("fsync", ".partial/")),
    "the parent is not synced": ("plain, keep 1", without("fsync", "/checkpoints/")),
    "the pointer is not synced": ("plain, keep 1", without("fsync", "/.latest.partial/")),
    "shards are not synced": ("sharded", without("fsync", "/shard-")),
    "the manifest comes first": ("plain, keep 1", earlier("manifest.json", "create")),
    "the pointer comes first": ("plain, keep 1", earlier("latest", "rename checkpoints/.step")),
    "the old one goes first": ("plain, keep 1", earlier(".gone", "create checkpoints/.step")),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_checker_sees(tmp_path, plant, draw):
    name, change = PLANTS[plant]
    calls = record(tmp_path, name)
    planted = change(calls)
    assert planted != calls
    with pytest.raises(Crashed):
        crash_everywhere(planted, draw, most=40)
