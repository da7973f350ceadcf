"""A checkpoint is there whole or not at all, and what is damaged is never loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from trimpot.runner.checkpoint import (
    MANIFEST,
    STATE,
    check_shapes,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    prune,
    read_manifest,
    save_checkpoint,
)
from trimpot.runner.engine import State
from trimpot.runner.errors import CheckpointError, StorageError  # noqa: F401 - WRITER's
from trimpot.runner.manifest import seal_of, text_of

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
    saved = {step: save(tmp_path, step) for step in (5, 30, 9, 1000000000)}
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1000000000, 30, 9, 5]
    for name in (
        ".step-00000031.other.partial",
        ".step-00000009.mine.partial",
        ".step-00000007.gone",
    ):
        (tmp_path / name).mkdir()
    begun_since = tmp_path / ".step-00000031.mine.partial"
    begun_since.mkdir()
    prune(tmp_path, saved[30], keep=2, token="mine")
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1000000000, 30]
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [begun_since]
    prune(tmp_path, saved[30], keep=1)
    assert list_checkpoints(tmp_path) == [saved[30].path]  # though one has a later step


def test_a_step_that_is_saved_again_takes_nothing_away(tmp_path):
    first, again, third = (save(tmp_path, 3) for _ in range(3))
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000003-2",
        "step-00000003-1",
        "step-00000003",
    ]
    found, _ = newest_checkpoint(tmp_path, pytest.fail, set_aside=True)
    assert (found, found.step) == (third, 3)
    assert same(load_state(first), load_state(again))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """It had whole tensors and no seal."""
    saved = save(tmp_path, 3)
    manifest = json.loads((saved.path / MANIFEST).read_text())
    del manifest["seal"]
    (saved.path / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    found, _ = newest_checkpoint(tmp_path, pytest.fail, set_aside=True)
    assert same(load_state(found), state(3))


def test_the_library_reads_what_is_written(tmp_path):
    """And the other way round: both orders of a file's tensors."""
    shapes = {"b": (3, 5), "a": (7,), "empty": (0, 2), "one": (), "turned": (6, 4)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["turned"] = tensors["turned"].t()
    content = {name: {"weight": tensor} for name, tensor in tensors.items()}
    saved = save_checkpoint(tmp_path, content, step=1, cursor=0, complete=True, facts=FACTS)
    for read in (load_file(saved.path / STATE), load(Path(saved.path / STATE).read_bytes())):
        assert read.keys() == {f"weight/{name}" for name in tensors}
        assert all(torch.equal(read[f"weight/{name}"], t) for name, t in tensors.items())
    assert same(load_state(saved), content)


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
    "a link in place of a file": lambda c: link(c / STATE),
    "a folder of another step": lambda c: edit(c, step=5),
    "no list of files": lambda c: edit(c, files=None),
    "a figure that was changed": lambda c: change(c, cursor=17),
    "a space that was put in": lambda c: (c / MANIFEST).write_bytes(
        (c / MANIFEST).read_bytes() + b" "
    ),
    "brackets without end": lambda c: (c / MANIFEST).write_text("[" * 100_000),
}


def change(checkpoint: Path, **changes) -> None:
    path = checkpoint / MANIFEST
    path.write_text(text_of({**json.loads(path.read_text()), **changes}))


def edit(checkpoint: Path, **changes) -> None:
    """A change by somebody who knows about the seal."""
    manifest = json.loads((checkpoint / MANIFEST).read_text()) | changes
    change(checkpoint, **changes, seal=seal_of(manifest))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


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
    check_shapes(dict(shapes), shapes, tmp_path)
    with pytest.raises(CheckpointError, match="1 parameters differ, first b"):
        check_shapes(shapes, {**shapes, "b": torch.Size([1])}, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(64, 4\), and the model wants \(64, 8\)"):
        check_shapes(shapes, {**shapes, "a.lora_B": torch.Size([64, 8])}, tmp_path)
