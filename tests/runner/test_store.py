"""Copies of checkpoints in a real S3 server and in a folder: whole, or no copies."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from test_crashes import FACTS, SHAPES, same, shares, state

from trimpot.runner import copies
from trimpot.runner.checkpoint import (
    commit,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    prune,
    read_shards,
    save_checkpoint,
    staging,
    write_shard,
)
from trimpot.runner.copier import Copied, Copier, Uncopied
from trimpot.runner.errors import StorageError, StoreError
from trimpot.runner.fetch import fetch_newest
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint


def saved(folder: Path, step: int, seed: int | None = None) -> Checkpoint:
    seed = step if seed is None else seed
    return save_checkpoint(folder, state(seed), step=step, cursor=step, complete=False, facts=FACTS)


def saved_in_shards(folder: Path, step: int) -> Checkpoint:
    partial = staging(folder, step, "token")
    for rank, share in enumerate(shares(state(step), 2)):
        write_shard(partial, share, rank, 2)
    facts = {**FACTS, "shapes": {name: list(shape) for name, shape in SHAPES.items()}}
    files = read_shards(partial, 2)
    return commit(partial, files, step=step, cursor=step, complete=False, facts=facts)


def fetched(store: Store, folder: Path, after: int = 0) -> tuple[Checkpoint | None, list[str]]:
    """The newest good one, and what was said of others."""
    said: list[str] = []
    found, _ = fetch_newest(store, copies.look(store), folder, after, "token", said.append)
    return found, said


@pytest.fixture(params=["s3", "file"])
def url(request, bucket, tmp_path) -> str:
    return f"s3://{bucket}/runs/a" if request.param == "s3" else f"file://{tmp_path}/store/a"


def test_a_copy_comes_back_bit_for_bit(url, tmp_path):
    store = Store(url)
    store.probe()
    assert store.sizes() == {}
    for step, save in ((1, saved), (2, saved_in_shards)):
        checkpoint = save(tmp_path / "run", step)
        size = copies.upload(store, checkpoint, verify=True)
        assert size == sum(path.stat().st_size for path in checkpoint.path.iterdir())
        found, said = fetched(store, tmp_path / f"new-{step}")
        assert (found, said) != (None, [])
        assert (found.step, found.digest, found.complete) == (step, checkpoint.digest, False)
        assert same(load_state(found), state(step))
        assert newest_checkpoint(found.path.parent, pytest.fail, set_aside=False)[0] == found
    assert fetched(store, tmp_path / "new-3", after=2) == (None, [])
    assert list_checkpoints(tmp_path / "new-3") == []


def test_as_many_are_kept_as_on_disk(url, tmp_path):
    store, folder = Store(url), tmp_path / "run"
    store.write("notes.txt", b"not ours")
    store.write("step-00000001-0123456789ab/state.safetensors", b"of a copy that broke off")
    for step in (1, 2, 3, 4):
        checkpoint = saved(folder, step)
        copies.upload(store, checkpoint, verify=False)
        copies.prune(store, copies.name_of(step, checkpoint.digest), keep=2)
        assert [copy.step for copy in copies.look(store).copies] == [step, step - 1][: min(2, step)]
    names = {name.split("/")[0] for name in store.sizes()}
    assert names == {"notes.txt", *(copy.name for copy in copies.look(store).copies)}
    # The run fell back to step 2, and saves step 3 again: it stays, whatever stands beyond it.
    again = saved(tmp_path / "other", 3, seed=33)
    copies.upload(store, again, verify=False)
    copies.prune(store, copies.name_of(3, again.digest), keep=1)
    (only,) = copies.look(store).copies
    assert only.name == copies.name_of(3, again.digest)
    assert copies.clear(store) == 1
    assert list(store.sizes()) == ["notes.txt"]


def put(store: Store, name: str, content: bytes | None) -> None:
    store.remove(name) if content is None else store.write(name, content)


DAMAGES = {
    "a flipped bit": ("state.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "SHA-256"),
    "a truncated file": ("state.safetensors", lambda b: b[:-1], "bytes"),
    "no file": ("state.safetensors", lambda b: None, "lacks state.safetensors"),
    "a flipped bit in the manifest": (
        "manifest.json",
        lambda b: b.replace(b'"step": 2', b'"step": 3'),
        "does not say what was written",
    ),
    "a truncated manifest": ("manifest.json", lambda b: b[: len(b) // 2], "broken manifest"),
    "no manifest": ("manifest.json", lambda b: None, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_named_and_an_older_one_used(url, tmp_path, damage):
    store = Store(url)
    for step in (1, 2):
        copies.upload(store, saved(tmp_path / "run", step), verify=False)
    newest = copies.look(store).copies[0].name
    file, change, says = DAMAGES[damage]
    put(store, f"{newest}/{file}", change(store.read(f"{newest}/{file}")))
    found, said = fetched(store, tmp_path / "new")
    assert found.step == 1
    assert same(load_state(found), state(1))
    assert len(said) == bool(says)  # a copy that broke off is nothing to speak of
    assert all(newest in text and says in text and url in text for text in said)
    left = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert left == ["latest", found.path.name]
    # Nor does it count among those that are kept.
    third = saved(tmp_path / "run", 3)
    copies.upload(store, third, verify=False)
    spoilt = {newest} if damage == "a flipped bit" else set()  # which no size tells
    copies.prune(store, copies.name_of(3, third.digest), keep=2, spoilt=spoilt)
    assert [copy.step for copy in copies.look(store).copies] == [3, 1]
    assert len(store.sizes()) == 4


def test_another_runs_manifest_is_no_copy(url, tmp_path):
    store = Store(url)
    first, second = (saved(tmp_path / name, 1, seed) for name, seed in (("a", 1), ("b", 2)))
    copies.upload(store, first, verify=False)
    name = copies.name_of(1, first.digest)
    store.write(f"{name}/manifest.json", (second.path / "manifest.json").read_bytes())
    found, said = fetched(store, tmp_path / "new")
    assert found is None
    assert "is another's" in said[0]


# --- what can't be copied to


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://no-such-bucket-here/run", "bucket"),
        ("file:///proc/no/run", "No such file"),
        ("teapot://bucket/run", "nobody knows the protocol teapot"),
        ("https://127.0.0.1:1/run", "checkpoint.copy_to https://127.0.0.1:1/run"),
    ],
)
def test_a_store_that_cannot_be_written_is_refused(s3_server, url, says):
    with pytest.raises(StorageError) as caught:
        Store(url).probe()
    assert says in str(caught.value)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_right_to_write(s3_server, bucket):
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", '
        f'"Action": ["s3:PutObject"], "Resource": ["arn:aws:s3:::{bucket}/*"]}}]}}'
    )
    s3_server.client().put_bucket_policy(Bucket=bucket, Policy=policy)
    with pytest.raises(StoreError, match=r"can't be given \.probe-.*(Forbidden|Denied)") as caught:
        Store(f"s3://{bucket}/run").probe()
    assert caught.value.lasting
    assert s3_server.keys(bucket) == []


def test_a_missing_package_is_named(monkeypatch):
    """fsspec's own registry imports it; None in sys.modules is a package that is not there."""
    for name in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    loaded = sys.modules["fsspec.registry"]._registry
    for protocol in ("gs", "s3"):
        monkeypatch.delitem(loaded, protocol, raising=False)
    for url, package in (("gs://bucket/run", "gcsfs"), ("s3://bucket/run", "s3fs")):
        with pytest.raises(StorageError, match=f"pip install {package}"):
            Store(url)


# --- beside training


def wait_for(copier: Copier, count: int) -> list[Copied | Uncopied]:
    found: list[Copied | Uncopied] = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += copier.outcomes()
        time.sleep(0.02)
    return found


def test_a_server_that_is_away_costs_copies_only(s3_server, bucket, tmp_path):
    """It goes down in the middle of an upload; nobody waits, and the next checkpoint is copied."""
    copier = Copier(Store(f"s3://{bucket}/run"), keep=2, verify=False, there=None)
    copier.offer(saved(tmp_path, 1))
    assert isinstance(wait_for(copier, 1)[0], Copied)
    down = threading.Event()

    def before(method: str, path: str) -> None:
        if method == "PUT" and "step-00000002" in path and not down.is_set():
            down.set()
            threading.Thread(target=s3_server.stop).start()
            raise ConnectionResetError

    s3_server.before = before
    try:
        began = time.monotonic()
        copier.offer(saved(tmp_path, 2))
        assert time.monotonic() - began < 1
        (failed,) = wait_for(copier, 1)
    finally:
        s3_server.before = lambda method, path: None
        if down.is_set():
            s3_server.thread.join()
            s3_server.start()
    assert isinstance(failed, Uncopied)
    assert failed.step == 2
    copier.offer(saved(tmp_path, 3))
    (copied,) = wait_for(copier, 1)
    assert isinstance(copied, Copied)
    assert s3_server.steps(bucket) == [1, 3]
    assert not any("step-00000002" in key for key in s3_server.keys(bucket))


def test_the_newest_wins_and_what_is_read_stays(s3_server, bucket, tmp_path):
    """While step 1 is on its way, 2 and 3 are saved: 1 and 3 are copied, though one is kept."""
    gate = threading.Event()
    s3_server.before = lambda method, path: gate.wait(60) if method == "PUT" else None
    try:
        copier = Copier(Store(f"s3://{bucket}/run"), keep=1, verify=False, there=None)
        steps = [saved(tmp_path, 1)]
        copier.offer(steps[0])
        while copier.wanted() and copier._now is None:
            time.sleep(0.01)
        for step in (2, 3):
            steps.append(saved(tmp_path, step))
            prune(tmp_path, steps[-1], keep=1, reading=copier.wanted())
            copier.offer(steps[-1])
        copier.offer(steps[0])  # which is on its way
        assert copier.wanted() == {steps[0].path, steps[2].path}
        prune(tmp_path, steps[-1], keep=1, reading=copier.wanted())
        assert sorted(tmp_path.glob("step-*")) == [steps[0].path, steps[2].path]
    finally:
        gate.set()
        s3_server.before = lambda method, path: None
    told = wait_for(copier, 2)
    assert [(type(one), one.step) for one in told] == [(Copied, 1), (Copied, 3)]
    assert s3_server.steps(bucket) == [3]


def test_the_end_waits_and_tries_again(s3_server, bucket, tmp_path):
    copier = Copier(Store(f"s3://{bucket}/run"), keep=2, verify=True, there=None)
    checkpoint = saved(tmp_path, 1)
    s3_server.stop()
    began = time.monotonic()
    why = copier.finish(checkpoint, wait_s=0.1)
    assert bucket in why
    assert time.monotonic() - began < 60
    threading.Timer(2, s3_server.start).start()
    assert copier.finish(checkpoint, wait_s=60) == ""
    assert s3_server.steps(bucket) == [1]
    requests = len(s3_server.requests)
    assert copier.finish(checkpoint, wait_s=0) == ""  # it is there
    assert len(s3_server.requests) == requests
