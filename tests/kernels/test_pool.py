"""Memory of large tensors that is kept: blocks apart from each other, holes that are filled."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from trimpot.kernels import heap, native
from trimpot.kernels.cpp import lora_linear
from trimpot.kernels.cpp.residual import added
from trimpot.kernels.cpp.tensors import LARGE, empty

pytestmark = pytest.mark.skipif(not native.state().available, reason="the pool is the extension's")
MIB = 1 << 20
PADDED = 2 * 4096
"""A block's bytes are rounded up to pages, and it may begin anywhere in the first."""


def in_use() -> int:
    return native.extension().pool_in_use()


def extent() -> int:
    return native.extension().pool_extent()


def test_blocks_are_apart_and_keep_what_is_in_them() -> None:
    draw, before = random.Random(0), in_use()
    live: list[tuple[Any, int]] = []
    for number in range(600):
        if live and draw.random() < 0.45:
            array, value = live.pop(draw.randrange(len(live)))
            assert (array == value).all()
            continue
        array = np.frombuffer(native.extension().pool_block(draw.randrange(1, 300_000)), np.uint8)
        assert array.ctypes.data % 64 == 0
        array[:] = number % 251
        live.append((array, number % 251))
    del array  # may be one that is out of the list
    assert all((array == value).all() for array, value in live)
    sizes = sum(array.nbytes for array, _ in live)
    assert sizes < in_use() - before <= sizes + PADDED * len(live)
    live.clear()
    assert in_use() == before


def test_holes_are_filled() -> None:
    """Layers keep some of what they make, in the order of a transformer's: the pool is as large
    as what they keep and what one of them has besides. Then it is one hole again."""
    block = native.extension().pool_block
    layers, passing, keeping = 20, (3 * MIB, 3 * MIB, MIB), (MIB, 3 * MIB)
    most = (layers * sum(keeping) + sum(passing)) + 5 * layers * PADDED
    for _ in range(3):
        kept: list[Any] = []
        for _ in range(layers):
            parts = [block(passing[0]), block(passing[1])]
            kept.append(block(keeping[0]))
            parts[0] = block(passing[2])
            kept.append(block(keeping[1]))
            del parts
        assert layers * sum(keeping) < extent() <= most
        kept.clear()
    before = extent()
    whole = block(before - PADDED)
    assert extent() == before
    del whole


def test_tensors_are_the_pools_where_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = in_use()
    assert not heap.pooled()
    plain = empty((1024, 1024), torch.bfloat16)
    assert in_use() == before
    monkeypatch.setattr(heap._Pool, "on", True)
    large = empty((1024, 1024), torch.bfloat16)
    assert (large.shape, large.dtype) == (plain.shape, plain.dtype)
    assert 2 * MIB < in_use() - before <= 2 * MIB + PADDED
    view = large[3:]
    del large
    assert in_use() > before
    view.fill_(1)
    del view
    assert in_use() == before
    small = empty((LARGE // 4 - 1,))
    none = empty((0, 5))
    assert in_use() == before and small.numel() and none.shape == (0, 5)


def test_no_bit_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(n, 512, generator=draw) for n in (200, 512, 200))
    a, b = torch.randn(1, 8, 512, generator=draw), torch.randn(1, 512, 8, generator=draw)
    rest = [0.5], [0.0], torch.zeros(1, 1).long(), torch.tensor([[0, 0, 200]], dtype=torch.int32)
    found = []
    for on in (False, True):
        monkeypatch.setattr(heap._Pool, "on", on)
        before = in_use()
        (y,), (s,) = lora_linear.forward(x, [w], [torch.empty(0)], [a], [b], *rest)
        assert (in_use() > before) == on
        found.append((y, *lora_linear.backward([dy], x, [w], [a], [b], [s], *rest, True)))
    for plain, pooled in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(plain, pooled)
    for plain, pooled in zip(found[0][2:], found[1][2:], strict=True):
        assert torch.equal(plain[0], pooled[0])


def test_sums_of_the_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap._Pool, "on", True)
    a, b = (torch.randn(3, 400, 128, requires_grad=True) for _ in "ab")
    before = in_use()
    total = added(a, b)
    assert in_use() > before and torch.equal(total, a + b)
    grads = torch.autograd.grad(total.square().sum(), (a, b))
    wanted = torch.autograd.grad((a + b).square().sum(), (a, b))
    assert all(map(torch.equal, grads, wanted))
    mixed = added(a, b.bfloat16())  # as under autocast
    assert torch.equal(mixed, a + b.bfloat16())
