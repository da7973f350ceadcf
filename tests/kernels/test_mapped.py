"""Weights in a mapped file: their pages go once they are packed, and nothing of their values."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm
from trimpot.kernels.mapped import PAGE, give_back_pages, pages_are_away
from trimpot.runner.replicas import fingerprint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of its pages")
ROWS, DEPTH = 512, 1024


def drawn() -> torch.Tensor:
    return torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(0)).bfloat16().float()


@pytest.fixture
def weight(tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "model.safetensors"
    # Neighbours, so that the weight begins and ends within a page.
    save_file({"a": torch.zeros(3), "b": drawn(), "c": torch.zeros(999)}, path)
    with safe_open(path, "pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
        return file.get_tensor("b")


def resident(tensor: torch.Tensor) -> int:
    """Bytes of its pages that are in memory, as Linux counts them."""
    first = tensor.data_ptr() // PAGE
    count = -(-(tensor.data_ptr() + tensor.nbytes) // PAGE) - first
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(8 * first)
        pages = np.frombuffer(pagemap.read(8 * count), np.uint64)
    return int((pages >> np.uint64(63)).sum()) * PAGE


def test_pages_go_and_come_back_with_the_same_values(weight: torch.Tensor) -> None:
    assert torch.equal(weight, drawn()) and resident(weight) > 0.9 * weight.nbytes
    assert weight.nbytes - 2 * PAGE <= give_back_pages(weight) <= weight.nbytes
    assert resident(weight) <= 2 * PAGE
    assert torch.equal(weight, drawn())


def test_a_look_at_what_is_away_leaves_it_away(weight: torch.Tensor) -> None:
    first = fingerprint([weight])
    assert torch.equal(weight, drawn())
    assert not pages_are_away(weight) and fingerprint([weight]) == first
    assert resident(weight) > 0.9 * weight.nbytes
    give_back_pages(weight)
    assert pages_are_away(weight) and fingerprint([weight]) == first
    assert resident(weight) <= 2 * PAGE


@pytest.mark.parametrize("row", [1, ROWS // 2, ROWS - 2])
def test_what_was_written_stays(weight: torch.Tensor, row: int) -> None:
    weight[row] = 7
    assert give_back_pages(weight) == 0
    assert torch.equal(weight[row], torch.full((DEPTH,), 7.0))


def test_memory_that_is_in_no_file_stays() -> None:
    plain = drawn()
    assert give_back_pages(plain) == 0
    assert torch.equal(plain, drawn())
    assert give_back_pages(torch.empty(0)) == 0
    assert give_back_pages(plain.T) == 0


@pytest.mark.skipif(not native.state().available, reason="packs are the extension's")
def test_a_packed_weight_is_in_memory_once(weight: torch.Tensor) -> None:
    group = gemm.packed([weight])
    assert group is not None and resident(weight) < weight.nbytes / 4
    assert gemm.packed([weight]) is group  # looking for changes brings a few pages back
    assert resident(weight) < weight.nbytes / 4
    plain = gemm.packed([drawn()])
    assert torch.equal(group.packs[0].q, plain.packs[0].q)
    assert torch.equal(weight, drawn())


@pytest.mark.skipif(not native.state().available, reason="packs are the extension's")
def test_a_packed_weight_that_changes_is_packed_anew(weight: torch.Tensor) -> None:
    first = gemm.packed([weight])
    weight.data.mul_(2)  # no version tells of this
    second = gemm.packed([weight])
    assert second is not first
    assert torch.equal(weight, 2 * drawn())
    weight.add_(1)
    assert gemm.packed([weight]) is not second
    assert torch.equal(weight, 2 * drawn() + 1)


@pytest.mark.skipif(not native.state().available, reason="packs are the extension's")
def test_a_weight_that_can_not_be_packed_stays(weight: torch.Tensor) -> None:
    weight[3, 3] = torch.inf
    assert gemm.packed([weight]) is None
    assert resident(weight) > 0.9 * weight.nbytes
