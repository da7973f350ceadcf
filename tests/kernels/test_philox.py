"""Counter-based dropout: the published generator, its statistics, the same masks on any backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import kernel_checks as checks
import pytest
import torch

from trimpot.kernels.ops import philox as op

CPU = torch.device("cpu")
SEED = 0x1234_5678_9ABC_DEF0
# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def cpp_mask(seed: int, p: float, first_row: int, rows: int, columns: int) -> torch.Tensor:
    from trimpot.kernels.cpp import gemm

    return gemm.dropped(torch.ones(rows, columns), first_row, seed, p) != 0


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    found = op.philox([torch.tensor([word]) for word in words(counter)], (low, high))
    assert [int(word) for word in found] == words(answer)


def test_an_items_word_follows_from_its_row_and_column() -> None:
    """Word column % 4 of counter (column // 4, row low, row high, 0), key (seed low, high)."""
    p, first_row, columns = 0.4, 2**32 - 2, 11
    key = (SEED & op.LOW, SEED >> 32)
    mask = op.keep_mask(SEED, p, first_row, 4, columns, CPU)
    for row in range(4):
        for column in range(columns):
            at = first_row + row
            counter = [column // 4, at & op.LOW, at >> 32, 0]
            word = op.philox([torch.tensor(c) for c in counter], key)[column % 4]
            assert bool(mask[row, column]) == (int(word) < round(0.6 * 2**32))


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_as_many_are_kept_as_should_be(p: float) -> None:
    """Within five standard deviations, of the whole, of each row and of each column."""
    rows, columns = 512, 1027
    kept = op.keep_mask(SEED, p, 0, rows, columns, CPU).double()
    for share, items in (
        (kept.mean(), rows * columns),
        (kept.mean(0), rows),
        (kept.mean(1), columns),
    ):
        bound = 5 * math.sqrt(p * (1 - p) / items) + 1 / items  # one item, where p is tiny
        assert ((share - (1 - p)).abs() <= bound).all()


def test_items_and_seeds_do_not_go_together() -> None:
    """Correlations of a mask with itself, shifted, and with those of other seeds: five standard
    deviations."""
    rows, columns = 400, 512
    mask = op.keep_mask(SEED, 0.5, 0, rows, columns, CPU).double() - 0.5
    for other in (
        mask.roll(1, 1), mask.roll(4, 1), mask.roll(1, 0), mask.roll((1, 1), (0, 1)),
        *(op.keep_mask(s, 0.5, 0, rows, columns, CPU).double() - 0.5
          for s in (SEED + 1, SEED ^ (1 << 32), SEED ^ (1 << 61))),
    ):  # fmt: skip
        assert abs((mask * other).mean() * 4) < 5 / math.sqrt(rows * columns)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_what_is_kept_is_scaled_and_the_rest_zero(dtype: torch.dtype) -> None:
    x = torch.randn(40, 30).to(dtype)
    x[0, :] = torch.nan
    keep = op.keep_mask(7, 0.25, 5, 40, 30, CPU)
    got = op.dropped(x, 5, 7, 0.25)
    assert got.dtype == dtype
    assert torch.equal(got[~keep], torch.zeros_like(got[~keep]))  # also of a NaN
    torch.testing.assert_close(got[keep], x[keep] / 0.75, equal_nan=True)
    assert op.dropped(x, 5, 7, 0.0) is x


def test_the_mean_stays() -> None:
    ones = torch.ones(300, 500)
    assert abs(op.dropped(ones, 0, 3, 0.2).mean() - 1) < 5 * math.sqrt(0.25 / ones.numel())


def test_tiles_see_their_part_of_one_mask() -> None:
    whole = op.keep_mask(SEED, 0.3, 0, 20, 33, CPU)
    assert torch.equal(op.keep_mask(SEED, 0.3, 13, 7, 33, CPU), whole[13:])
    assert torch.equal(op.keep_mask(SEED, 0.3, 0, 20, 9, CPU), whole[:, :9])


@checks.needs_extension
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**62 - 1, 2**32, 2**63 - 1, -1])
@pytest.mark.parametrize("p", [1e-10, 0.1, 0.5, 0.999])
def test_cpp_has_the_same_masks(p: float, seed: int) -> None:
    for first_row, rows, columns in ((0, 9, 37), (3, 1, 1), (2**32 - 3, 7, 4), (0, 0, 5)):
        want = op.keep_mask(seed, p, first_row, rows, columns, CPU)
        assert torch.equal(cpp_mask(seed, p, first_row, rows, columns), want)


@checks.needs_extension
def test_cpp_drops_as_the_definition_does() -> None:
    wide = torch.randn(40, 64)
    wide[3, 7] = torch.nan
    from trimpot.kernels.cpp import gemm

    for x in (wide, wide[:, 5:50]):
        checks.assert_same_bits([gemm.dropped(x, 2, SEED, 0.4)], [op.dropped(x, 2, SEED, 0.4)])


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
def test_every_instruction_set_has_the_same_masks(isa: str) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import torch, test_philox as t\n"
        "want = t.op.keep_mask(t.SEED, 0.3, 5, 31, 45, t.CPU)\n"
        "assert torch.equal(t.cpp_mask(t.SEED, 0.3, 5, 31, 45), want)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(here), str(here.parent)],
        env={**os.environ, "TRIMPOT_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_seeds_come_from_torchs_generator() -> None:
    """And so are drawn again by whoever puts its state back."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = op.draw_seeds(3, 2), op.draw_seeds(3, 2)
    assert first.shape == (3, 2) and first.dtype == torch.int64
    assert not torch.equal(first, second) and first.unique().numel() == 6
    torch.set_rng_state(state)
    assert torch.equal(op.draw_seeds(3, 2), first)
