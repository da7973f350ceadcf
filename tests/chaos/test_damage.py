"""No damaged byte of a checkpoint is ever loaded: it is noticed, and the one before is used.

The one file that may be damaged without anybody noticing is `latest`, which nothing reads.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_crashes import FACTS, SHAPES, same, shares, state

from trimpot.runner.checkpoint import (
    commit,
    load_state,
    newest_checkpoint,
    read_shards,
    save_checkpoint,
    staging,
    write_shard,
)
from trimpot.runner.errors import CheckpointError


def two_checkpoints(folder: Path, sharded: bool) -> Path:
    """Steps 1 and 2 → the folder of the latter."""
    save_checkpoint(folder, state(1), step=1, cursor=1, complete=False, facts=FACTS)
    facts = dict(FACTS)
    if not sharded:
        return save_checkpoint(folder, state(2), step=2, cursor=2, complete=True, facts=facts).path
    partial = staging(folder, 2, "token")
    for rank, share in enumerate(shares(state(2), 2)):
        write_shard(partial, share, rank, 2)
    facts |= {"shapes": {name: list(shape) for name, shape in SHAPES.items()}}
    files = read_shards(partial, 2)
    return commit(partial, files, step=2, cursor=2, complete=True, facts=facts).path


def damages(content: bytes, draw: random.Random, most: int) -> Iterator[tuple[str, bytes]]:
    """Bits flipped, bytes replaced, ends cut off, zeros for a tail, pieces swapped or doubled."""
    size = len(content)
    bits = range(8 * size)
    for bit in bits if len(bits) <= most else draw.sample(bits, most):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield "bit flip", bytes(changed)
    lengths = range(size)
    for length in lengths if size <= most else draw.sample(lengths, most):
        yield "truncation", content[:length]
        yield "zero tail", content[:length] + bytes(size - length)
    for _ in range(most // 8):
        low, high = sorted(draw.sample(range(size + 1), 2))
        yield "burst", content[:low] + draw.randbytes(high - low) + content[high:]
        yield "doubled", content[:high] + content[low:]
        yield "swapped", content[low:high] + content[:low] + content[high:]


def sweep(folder: Path, sharded: bool, draw: random.Random, most: int) -> Counter[str]:
    """Damage every file in every way → how many of each ended how: `noticed`, `harmless` (the same
    bytes after all, or a file that nothing reads), `silent`."""
    newest = two_checkpoints(folder, sharded)
    pristine = folder.with_name("pristine")
    shutil.copytree(folder, pristine)
    ended = Counter[str]()
    for path in [*sorted(newest.iterdir()), folder / "latest"]:
        whole = path.read_bytes()
        for _, content in damages(whole, draw, most):
            path.write_bytes(content)
            said: list[str] = []
            found = newest_checkpoint(folder, said.append, set_aside=False)
            assert found is not None, said
            try:
                held = load_state(found[0])
            except CheckpointError:  # too late: nobody looks for an older one any more
                held = {}
            if found[0].step == 1 and same(held, state(1)) and said and newest.name in said[0]:
                ended["noticed"] += 1
            elif (content == whole or path.name == "latest") and same(held, state(2)):
                ended["harmless"] += 1
            else:
                ended["silent"] += 1
        path.write_bytes(whole)
    return ended


@pytest.mark.parametrize("sharded", [False, True])
def test_no_damage_is_silent(tmp_path, sharded, draw):
    ended = sweep(tmp_path / "checkpoints", sharded, draw, most=100)
    assert ended["silent"] == 0
    assert ended["noticed"] > 500
    assert ended["harmless"] >= 100  # those of `latest`


@pytest.mark.chaos
@pytest.mark.parametrize("sharded", [False, True])
def test_no_damage_is_silent_at_length(tmp_path, sharded, draw, count):
    ended = sweep(tmp_path / "checkpoints", sharded, draw, most=2000)
    count(corruptions=sum(ended.values()), silent=ended["silent"])
    assert ended["silent"] == 0
    assert ended["noticed"] > 3000


def test_the_sweep_sees(tmp_path, draw, monkeypatch):
    """A loader that trusts the files, and one that trusts the manifest."""
    with monkeypatch.context() as patch:
        patch.setattr("trimpot.runner.checkpoint._check_file", lambda *_: None)
        assert sweep(tmp_path / "a" / "checkpoints", False, draw, most=100)["silent"] > 50
    monkeypatch.setattr(
        "trimpot.runner.manifest.seal_of", lambda manifest: manifest.get("seal", "")
    )
    assert sweep(tmp_path / "b" / "checkpoints", False, draw, most=200)["silent"] > 0
