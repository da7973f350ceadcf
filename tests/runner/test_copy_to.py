"""Runs whose checkpoints go to a real S3 server too: no disk is needed to go on, and no server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import FLEET, config, prepared, torchrun
from tiny import tiny_data

from trimpot.cluster.prepare import prepare_run
from trimpot.runner.checkpoint import list_checkpoints, load_state, newest_checkpoint
from trimpot.runner.errors import CheckpointError, ConfigError, StorageError
from trimpot.runner.store import Store
from trimpot.runner.tuned import find_trained

STEPS = 8
FULL = {"method": "full", "adapter": None}


def made(model: Path, data: Path, run: Path, url: str | None, **sections) -> Path:
    """A run directory with a plan, ready for its workers."""
    copies = {"copy_to": url, "copy_wait_s": 1} if url else {}
    optim = {"batch_size": 2, "micro_batch_size": 1, "max_steps": STEPS, "learning_rate": 1e-3}
    prepared(
        config(
            model, data, run, checkpoint={"every_steps": 2, "keep": 2, **copies}, optim=optim,
            **sections,
        ),
        fresh=False,
    )  # fmt: skip
    return run


def start(run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trimpot.runner.worker", str(run / "plan.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def work(run: Path) -> tuple[int, str]:
    """Exit code and the last line of stderr."""
    process = start(run)
    _, said = process.communicate(timeout=300)
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def events(run: Path, kind: str) -> list[dict]:
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in told if event["kind"] == kind]


def state_of(run: Path):
    found = newest_checkpoint(run / "checkpoints", pytest.fail, set_aside=False)
    assert found is not None
    return found[0].step, load_state(found[0])


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n][k].equal(b[n][k]) for n in a for k in b[n])


@pytest.mark.slow
def test_a_new_disk_goes_on_from_the_store_bit_for_bit(model, tmp_path, s3_server, bucket):
    data, url = tiny_data(tmp_path, 40), f"s3://{bucket}/runs/a"
    first = made(model, data, tmp_path / "first", url)
    assert work(first) == (0, "")
    step, unbroken = state_of(first)
    assert (step, s3_server.steps(bucket)) == (STEPS, [6, STEPS])
    adapter = (first / "adapter" / "adapter_model.safetensors").read_bytes()

    # As if the node had gone before the last copy, with its disk.
    shutil.rmtree(first)
    for key in s3_server.keys(bucket):
        if "step-00000008" in key:
            s3_server.client().delete_object(Bucket=bucket, Key=key)
    second = made(model, data, tmp_path / "second", url)
    assert work(second)[0] == 0
    assert [event["step"] for event in events(second, "fetch")] == [6]
    assert [event["step"] for event in events(second, "step")] == [7, 8]
    step, held = state_of(second)
    assert step == STEPS
    assert equal(held, unbroken)
    assert (second / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert s3_server.steps(bucket) == [6, STEPS]

    # Its checkpoints alone are lost: what needs them gets them from the store.
    shutil.rmtree(second / "checkpoints")
    shutil.rmtree(second / "adapter")
    assert find_trained(second).checkpoint.step == STEPS

    # A third disk has nothing left to train, and everything there in the end.
    third = made(model, data, tmp_path / "third", url)
    assert work(third)[0] == 0
    assert events(third, "step") == []
    assert (third / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert equal(state_of(third)[1], unbroken)

    # Another run's place is refused, and --fresh clears it.
    checked = config(
        model, data, tmp_path / "other", checkpoint={"copy_to": url}, optim={"max_steps": 3}
    )
    with pytest.raises(CheckpointError, match="of a run with other settings; start over with"):
        prepare_run(checked, FLEET, fresh=False)
    notes = prepare_run(checked, FLEET, fresh=True).notes
    assert any(f"2 checkpoints of an earlier run in {url}" in note for note in notes)
    assert s3_server.keys(bucket) == []


@pytest.mark.chaos
def test_a_server_that_is_away_at_the_end(model, tmp_path, s3_server, bucket):
    """The run is done, its checkpoints are on disk; what is missing is said, and made good."""
    data, url = tiny_data(tmp_path, 40), f"s3://{bucket}/run"
    run = made(model, data, tmp_path / "run", url)
    with taking_nothing(s3_server):
        code, said = work(run)
    assert code == 1
    for part in (f"the last checkpoint is not in {url}", "step-00000008", "start again"):
        assert part in said
    assert [event["step"] for event in events(run, "step")] == [*range(1, STEPS + 1)]
    (warning,) = events(run, "warning")
    assert "step 2 is not copied" in warning["text"]
    assert s3_server.keys(bucket) == []
    assert work(run)[0] == 0
    assert [event["step"] for event in events(run, "step")] == [*range(1, STEPS + 1)]
    assert s3_server.steps(bucket) == [STEPS]


@contextmanager
def taking_nothing(server: Any) -> Iterator[None]:
    """The server answers, but breaks off whatever it is given."""

    def before(method: str, path: str) -> None:
        if method == "PUT":
            raise ConnectionResetError

    server.before = before
    try:
        yield
    finally:
        server.before = lambda method, path: None


@contextmanager
def away(server: Any) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


@pytest.mark.chaos
def test_a_killed_run_goes_on_from_the_store(model, tmp_path, s3_server, bucket):
    data, url = tiny_data(tmp_path, 40), f"s3://{bucket}/run"
    whole = made(model, data, tmp_path / "whole", None)
    assert work(whole) == (0, "")
    first = made(model, data, tmp_path / "first", url)
    process = start(first)
    while not events(first, "copy"):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = s3_server.steps(bucket)[-1]
    shutil.rmtree(first)
    second = made(model, data, tmp_path / "second", url)
    assert work(second)[0] == 0
    steps = [event["step"] for event in events(second, "step")]
    assert steps == [*range(reached + 1, STEPS + 1)]
    assert state_of(second)[0] == STEPS
    assert equal(state_of(second)[1], state_of(whole)[1])
    assert s3_server.steps(bucket)[-1] == STEPS
    assert len(s3_server.steps(bucket)) <= 2


@pytest.mark.chaos
def test_a_server_that_is_away_at_the_start(model, tmp_path, s3_server, bucket):
    data, url = tiny_data(tmp_path, 40), f"s3://{bucket}/run"
    run = made(model, data, tmp_path / "run", url)
    assert work(run)[0] == 0
    with away(s3_server):  # what is on disk is enough
        code, said = work(run)
    assert code == 1
    assert "the last checkpoint is not in" in said
    assert "the run goes on from" in events(run, "warning")[0]["text"]

    # Without anything on disk, to begin anew would lose what the store holds.
    other = made(model, data, tmp_path / "other", url)
    with away(s3_server):
        code, said = work(other)
    assert code == 2
    assert said.startswith(f"checkpoint.copy_to {url} can't be listed")
    assert events(other, "step") == []

    # Another run's place: a worker refuses as the driver does, should they meet after its check.
    foreign = made(model, data, tmp_path / "foreign", None, seed=1)
    plan = json.loads((foreign / "plan.json").read_text())
    plan["config"]["checkpoint"]["copy_to"] = url
    (foreign / "plan.json").write_text(json.dumps(plan))
    code, said = work(foreign)
    assert (code, "of a run with other settings" in said) == (2, True)
    assert s3_server.steps(bucket) == [6, 8]


@pytest.mark.chaos
def test_two_workers_and_their_shards(model, tmp_path, s3_server, bucket):
    """The newest copy was damaged: both workers take the one before, and end with the same bits."""
    data, url = tiny_data(tmp_path, 40), f"s3://{bucket}/run"
    fleet = {"workers": 2, "zero_stage": 2}
    first = made(model, data, tmp_path / "first", url, fleet=fleet, **FULL)
    torchrun(2, "-m", "trimpot.runner.worker", first / "plan.json")
    unbroken = state_of(first)[1]
    assert s3_server.steps(bucket) == [6, 8]
    newest = [key for key in s3_server.keys(bucket) if "step-00000008" in key]
    assert len(newest) == 3
    shard = next(key for key in newest if "shard-00001" in key)
    content = bytearray(s3_server.get(bucket, shard))
    content[len(content) // 2] ^= 4
    s3_server.put(bucket, shard, bytes(content))

    second = made(model, data, tmp_path / "second", url, fleet=fleet, **FULL)
    torchrun(2, "-m", "trimpot.runner.worker", second / "plan.json")
    (warning,) = events(second, "warning")
    assert f"{url}/step-00000008" in warning["text"]
    assert "shard-00001-of-00002.safetensors has" in warning["text"]
    assert [event["step"] for event in events(second, "fetch")] == [6]
    assert equal(state_of(second)[1], unbroken)
    assert s3_server.steps(bucket)[-1] == 8
    assert list_checkpoints(second / "checkpoints")[0].name == "step-00000008"
    Store(url).probe()


# --- refused before anything is trained


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://AKIAKEY:hunter2secret@bucket/run", "environment"),
        ("s3://bucket/run?secret=hunter2secret", "environment"),
        ("https://x.blob.core/run?sig=hunter2secret", "environment"),
        ("s3://AKIAKEY:hunter2/secret@bucket/run", "environment"),
        ("file://mnt/store", "three slashes"),
        ("memory://run", "ends with its process"),
        ("simplecache::s3://bucket/run", "no URL of a store"),
        ("/mnt/store", "no URL of a store"),
        ("s3://", "names no place"),
    ],
)
def test_urls_that_are_none(model, tmp_path, url, says):
    with pytest.raises(ConfigError, match=says) as caught:
        config(model, tmp_path / "x", tmp_path / "run", checkpoint={"copy_to": url})
    assert "hunter2" not in str(caught.value)
    assert "checkpoint.copy_to" in str(caught.value)


def test_no_copy_no_knobs(model, tmp_path):
    with pytest.raises(ConfigError, match="copy_wait_s is set, but copy_to is not"):
        config(model, tmp_path / "x", tmp_path / "run", checkpoint={"copy_wait_s": 3})


@pytest.mark.parametrize("url", ["s3://there-is-none/run", "teapot://bucket/run"])
def test_what_cannot_be_copied_to_is_refused_first(model, tmp_path, s3_server, url):
    run = tmp_path / "run"
    checked = config(model, tiny_data(tmp_path, 40), run, checkpoint={"copy_to": url})
    with pytest.raises(StorageError, match=r"^checkpoint\.copy_to "):
        prepare_run(checked, FLEET, fresh=False)
    assert not (run / "plan.json").exists()


def test_the_runs_own_folder_is_no_store(model, tmp_path):
    run = tmp_path / "run"
    for place in (run, run / "checkpoints" / "copies"):
        url = {"copy_to": f"file://{place}"}
        checked = config(model, tiny_data(tmp_path, 40), run, checkpoint=url)
        with pytest.raises(StorageError, match="in output_dir"):
            prepare_run(checked, FLEET, fresh=False)
        assert not place.exists()
