"""A checkpoint is there whole or not at all, and what is damaged is never loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimpot.runner.checkpoint import (
    MANIFEST,
    STATE,
    check_state,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    prune,
    read_manifest,
    save_checkpoint,
)
from trimpot.runner.engine import State
from trimpot.runner.errors import CheckpointError, StorageError  # noqa: F401 - WRITER's

FACTS = {"plan_digest": "p", "data_digest": "d", "world_size": 2}


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {k: torch.randn(shape, generator=generator) for k in ("weight", "exp_avg")}
        for name, shape in (("a.lora_A", (4, 64)), ("a.lora_B", (64, 4)))
    }


def save(folder: Path, step: int, complete: bool = False):
    return save_checkpoint(
        folder, state(step), step=step, cursor=8 * step, complete=complete, facts=FACTS
    )


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name][key], b[name][key]) for name in a for key in a[name]
    )


def test_what_is_saved_is_loaded(tmp_path):
    saved = save(tmp_path, 3, complete=True)
    found, manifest = newest_checkpoint(tmp_path, pytest.fail, set_aside=True)
    assert found == saved
    assert (found.step, found.cursor, found.complete, found.plan_digest) == (3, 24, True, "p")
    assert manifest["world_size"] == 2
    assert same(load_state(found), state(3))
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert sorted(p.name for p in found.path.iterdir()) == [MANIFEST, STATE]


def test_the_newest_wins_and_old_ones_go(tmp_path):
    for step in (5, 30, 9, 1000000000):
        save(tmp_path, step)
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1000000000, 30, 9, 5]
    (tmp_path / "step-00000031.partial").mkdir()
    prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1000000000, 30]
    assert not (tmp_path / "step-00000031.partial").exists()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of a tensor": lambda c: flip(c / STATE, -5),
    "a bit of the header": lambda c: flip(c / STATE, 20),
    "the end cut off": lambda c: (c / STATE).write_bytes((c / STATE).read_bytes()[:-1]),
    "bytes appended": lambda c: (c / STATE).write_bytes((c / STATE).read_bytes() + b"x"),
    "no tensors": lambda c: (c / STATE).unlink(),
    "no manifest": lambda c: (c / MANIFEST).unlink(),
    "an empty manifest": lambda c: (c / MANIFEST).write_text(""),
    "half a manifest": lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:80]),
    "a list for a manifest": lambda c: (c / MANIFEST).write_text("[]"),
    "another format": lambda c: edit(c, format=99),
    "a step that is text": lambda c: edit(c, step="3"),
    "no cursor": lambda c: edit(c, cursor=None),
    "a file outside": lambda c: edit(c, files={"../step-00000001/" + STATE: {}}),
}


def edit(checkpoint: Path, **changes) -> None:
    path = checkpoint / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGES[damage](newest.path)
    with pytest.raises(CheckpointError):
        read_manifest(newest.path)
    said: list[str] = []
    found, _ = newest_checkpoint(tmp_path, said.append, set_aside=True)
    assert found.step == 1
    assert same(load_state(found), state(1))
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert not newest.path.exists()  # set aside, to be looked at
    assert list(tmp_path.glob("damaged-step-00000002-*"))


def test_nothing_good_is_nothing(tmp_path):
    assert newest_checkpoint(tmp_path / "none", pytest.fail, set_aside=True) is None
    (save(tmp_path, 1).path / STATE).write_bytes(b"")
    assert newest_checkpoint(tmp_path, lambda _: None, set_aside=False) is None


def test_a_pickle_in_place_of_tensors_is_not_loaded(tmp_path):
    saved = save(tmp_path, 1)
    torch.save({"a": torch.ones(3)}, saved.path / STATE)
    with pytest.raises(CheckpointError):
        load_state(saved)


WRITER = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import test_checkpoint as t
folder = Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    t.save(folder, 2)
except t.StorageError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_older_one(tmp_path):
    """A limit on file sizes stops the write half-way, as a full disk does."""
    save(tmp_path, 1)
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: checkpoint "), done.stdout + done.stderr
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert not list(tmp_path.glob("*.partial"))
    found, _ = newest_checkpoint(tmp_path, pytest.fail, set_aside=True)
    assert same(load_state(found), state(1))


def test_a_state_of_another_model_is_refused(tmp_path):
    shapes = {name: values["weight"].shape for name, values in state(0).items()}
    check_state(state(0), shapes, tmp_path)
    with pytest.raises(CheckpointError, match="1 parameters differ, first b"):
        check_state(state(0), {**shapes, "b": torch.Size([1])}, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(64, 4\), and the model wants \(64, 8\)"):
        check_state(state(0), {**shapes, "a.lora_B": torch.Size([64, 8])}, tmp_path)
