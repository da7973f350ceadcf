"""Whatever request an upload dies after, the newest whole copy is loaded, bit for bit.

What real uploads ask of a real S3 server is noted, and asked again of an empty bucket, request by
request; after each, the real loader is let loose on the bucket. A PUT or DELETE of one object
happens or not: nothing lies between two requests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import Request, Server
from test_crashes import FACTS, same, shares, state

from trimpot.runner import copies
from trimpot.runner.checkpoint import (
    commit,
    load_state,
    read_shards,
    save_checkpoint,
    staging,
    write_shard,
)
from trimpot.runner.errors import StorageError
from trimpot.runner.fetch import fetch_newest
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint

SHAPES = {name: list(values["weight"].shape) for name, values in state(0).items()}


class Story:
    """Copies of a run, with a mark where each is begun, and where it is said to be there."""

    def __init__(self, server: Server, bucket: str, folder: Path, keep: int):
        self.server, self.folder, self.keep = server, folder, keep
        self.store = Store(f"s3://{bucket}/run")

    def save(self, step: int, seed: int | None = None, world: int = 1) -> Checkpoint:
        whole = state(step if seed is None else seed)
        facts: dict[str, Any] = {"step": step, "cursor": step, "complete": False}
        if world == 1:
            return save_checkpoint(self.folder, whole, **facts, facts=FACTS)
        partial = staging(self.folder, step, "token")
        for rank, share in enumerate(shares(whole, world)):
            write_shard(partial, share, rank, world)
        files = read_shards(partial, world)
        return commit(partial, files, **facts, facts={**FACTS, "shapes": SHAPES})

    def mark(self, *value: Any) -> None:
        self.server.requests.append(Request("mark", "", mark=value))

    def copy(self, step: int, seed: int | None = None, world: int = 1) -> None:
        checkpoint = self.save(step, seed, world)
        self.mark("begin", (step, step if seed is None else seed))
        self.upload(checkpoint, step if seed is None else seed)

    def upload(self, checkpoint: Checkpoint, seed: int, spoilt: tuple[str, ...] = ()) -> None:
        copies.upload(self.store, checkpoint, verify=False)
        self.mark("there", (checkpoint.step, seed))
        name = copies.name_of(checkpoint.step, checkpoint.digest)
        copies.prune(self.store, name, self.keep, spoilt)


def plain(story: Story) -> None:
    for step in (1, 2, 3, 4):
        story.copy(step)


def sharded(story: Story) -> None:
    for step, world in ((1, 2), (2, 3), (3, 2)):
        story.copy(step, world=world)


def broken_off(story: Story) -> None:
    """An upload that ends after its first file, the next checkpoint, then the same one again."""
    story.copy(1)
    checkpoint = story.save(2, world=2)
    story.mark("begin", (2, 2))
    second = checkpoint.path / "shard-00001-of-00002.safetensors"
    second.rename(second.with_suffix(".away"))
    with pytest.raises(StorageError):
        story.upload(checkpoint, 2)
    second.with_suffix(".away").rename(second)
    story.copy(3)
    story.copy(4)


def again(story: Story) -> None:
    """A run without its disk fell back, and comes by the same step with other bits."""
    story.copy(1)
    story.copy(2)
    shutil.rmtree(story.folder)
    story.copy(2, seed=22)
    story.copy(3)


STORIES: dict[str, tuple[Callable[[Story], None], int]] = {
    "plain, keep 2": (plain, 2),
    "plain, keep 1": (plain, 1),
    "sharded": (sharded, 1),
    "broken off": (broken_off, 1),
    "copied again": (again, 2),
}


def record(server: Server, bucket: str, folder: Path, name: str) -> list[Request]:
    tell, keep = STORIES[name]
    server.requests.clear()
    tell(Story(server, bucket, folder, keep))
    return list(server.requests)


class Crashed(Exception):
    """A state of the bucket that the loader gets wrong."""


Known = tuple[int, int] | None
"""(step, seed of its state) of a copy."""


def check(store: Store, folder: Path, there: Known, begun: Known) -> None:
    said: list[str] = []
    found, _ = fetch_newest(store, copies.look(store), folder, 0, "token", said.append)
    if said:
        raise Crashed(f"a manifest stands without its files: {said[0]}")
    if found is None:
        if there is not None:
            raise Crashed(f"nothing is found, step {there[0]} was there")
        return
    held = load_state(found)
    allowed = [known for known in (there, begun) if known is not None and known[0] == found.step]
    if not any(same(held, state(seed)) for _, seed in allowed):
        raise Crashed(f"step {found.step} is loaded; there {there}, under way {begun}")


def go_on(server: Server, bucket: str, folder: Path) -> None:
    """The next start copies, and leaves nothing else."""
    story = Story(server, bucket, folder, keep=1)
    story.copy(99)
    assert server.steps(bucket) == [99]
    assert len(server.keys(bucket)) == 2


def crash_everywhere(server: Server, requests: list[Request], scratch: Path) -> int:
    """Stop after each request → how many states were tried. Raises Crashed."""
    client = server.client()
    there = begun = None
    tried = 0
    bucket = f"{scratch.name.lower().replace('_', '-')[-40:]}-replay".strip("-")
    client.create_bucket(Bucket=bucket)
    store = Store(f"s3://{bucket}/run")
    for request in requests:
        if request.method == "mark":
            kind, known = request.mark
            there, begun = (there, known) if kind == "begin" else (known, None)
            continue
        server.do(request, bucket)
        tried += 1
        try:
            check(store, scratch / str(tried), there, begun)
        except Crashed as error:
            raise Crashed(f"after {request}: {error}") from None
    return tried


@pytest.mark.parametrize("name", ["broken off", "copied again"])
def test_every_prefix_of_an_upload_leaves_the_newest_copy(s3_server, bucket, tmp_path, name):
    requests = record(s3_server, bucket, tmp_path / "run", name)
    assert crash_everywhere(s3_server, requests, tmp_path / f"scratch-{bucket}") >= 9


@pytest.mark.chaos
@pytest.mark.parametrize("name", STORIES)
def test_every_prefix_and_the_next_start(s3_server, bucket, tmp_path, name, count):
    requests = record(s3_server, bucket, tmp_path / "run", name)
    count(crash_states=crash_everywhere(s3_server, requests, tmp_path / f"scratch-{bucket}"))
    for end, last in enumerate(requests, 1):
        if last.method == "mark":
            continue
        other = f"{bucket}-{end}"
        s3_server.client().create_bucket(Bucket=other)
        for request in requests[:end]:
            if request.method != "mark":
                s3_server.do(request, other)
        go_on(s3_server, other, tmp_path / f"next-{end}")


# --- that the checker sees


def first(part: str) -> Callable[[list[Request]], list[Request]]:
    """In each copy, the requests on `part` come before the others."""

    def change(requests: list[Request]) -> list[Request]:
        parts: list[list[Request]] = [[]]
        for request in requests:
            parts[-1].append(request)
            if request.method == "mark":
                parts.append([])
        return [one for some in parts for one in sorted(some, key=lambda r: part not in str(r))]

    return change


def without_files(requests: list[Request]) -> list[Request]:
    return [r for r in requests if not (r.method == "PUT" and "shard-00001" in r.key)]


def old_one_first(requests: list[Request]) -> list[Request]:
    """The older copies are removed before the new one is put."""
    found: list[Request] = []
    for request in requests:
        if request.method == "DELETE":
            begin = max(n for n, r in enumerate(found) if r.mark and r.mark[0] == "begin")
            found.insert(begin + 1, request)
        else:
            found.append(request)
    return found


PLANTS = {
    "the manifest comes first": ("plain, keep 1", first("manifest.json")),
    "files are removed before the manifest": ("plain, keep 1", first("safetensors")),
    "a shard is missing": ("sharded", without_files),
    "the old one goes first": ("plain, keep 1", old_one_first),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_checker_sees(s3_server, bucket, tmp_path, plant):
    name, change = PLANTS[plant]
    requests = record(s3_server, bucket, tmp_path / "run", name)
    planted = change(requests)
    assert planted != requests
    with pytest.raises(Crashed):
        crash_everywhere(s3_server, planted, tmp_path / f"scratch-{bucket}")
