"""The C++ softmax behind the losses: against the formula in float64, and torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_checks as checks
import pytest
import torch
import torch.nn.functional as F

from trimpot.kernels import native

pytestmark = checks.needs_extension

IGNORE = -100


@dataclass(frozen=True)
class Terms:
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    weighted: bool = False


TERMS = [
    Terms(),
    Terms(weighted=True),
    Terms(smoothing=0.1),
    Terms(z_loss=1e-3),
    Terms(softcap=20.0),
    Terms(smoothing=0.2, z_loss=1e-4, softcap=5.0, weighted=True),
]
SHAPES = [(1, 1), (400, 2), (101, 37), (2, 4096), (33, 5001)]


def inputs(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels (some ignored), weights (some 0)."""
    make = torch.Generator().manual_seed(rows + columns)
    z = 5 * torch.randn(rows, columns, generator=make)
    labels = torch.randint(columns, (rows,), generator=make)
    labels[1::4] = IGNORE
    weights = torch.rand(rows, generator=make)
    weights[2::5] = 0
    return z, labels, weights


def by_formula(z, labels, weights, n: Terms) -> list[torch.Tensor]:
    """Loss and lse of each row, gradient of the summed loss."""
    z = z.detach().requires_grad_()
    capped = n.softcap * torch.tanh(z / n.softcap) if n.softcap else z
    lse = capped.logsumexp(-1)
    loss = F.cross_entropy(
        capped, labels, ignore_index=IGNORE, label_smoothing=n.smoothing, reduction="none"
    )
    loss = loss + torch.where(labels == IGNORE, 0.0, n.z_loss * lse.square())
    loss = loss * weights.to(loss.dtype) if n.weighted else loss
    loss.sum().backward()
    return [loss.detach(), lse.detach(), z.grad]


def run(z, labels, weights, n: Terms, gradient: bool = True) -> list[torch.Tensor]:
    """Loss, lse, and what has become of the logits."""
    z = z.clone()
    rows, columns = z.shape
    loss, lse = torch.full((rows,), 7.0), torch.full((rows,), 7.0)
    native.softmax_loss(
        z.data_ptr(), z.stride(0), rows, columns, labels.data_ptr(),
        weights.data_ptr() if n.weighted else 0, IGNORE, n.smoothing, n.z_loss, n.softcap,
        loss.data_ptr(), lse.data_ptr(), gradient,
    )  # fmt: skip
    return [loss, lse, z]


@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("n", TERMS, ids=str)
def test_obeys_the_rule(n: Terms, isa: str) -> None:
    for shape in SHAPES:
        given = inputs(*shape)
        exact = by_formula(given[0].double(), *given[1:], n)
        with checks.isa(isa):
            got = run(*given, n)
        checks.assert_twice(got, by_formula(*given, n), exact)
        assert not got[0][given[1] == IGNORE].any() and not got[2][given[1] == IGNORE].any()
        with checks.isa(isa):
            loss, lse, z = run(*given, n, gradient=False)
        checks.assert_same_bits([loss, lse], got[:2])
        if not n.softcap:
            checks.assert_same_bits([z], given[:1])


@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("shift", [-1e4, -90.0, 90.0, 1e4])
def test_large_logits_do_not_overflow(shift: float, isa: str) -> None:
    z, labels, weights = inputs(7, 501)
    z = z + shift
    exact = by_formula(z.double(), labels, weights, Terms())
    with checks.isa(isa):
        got = run(z, labels, weights, Terms())
    checks.assert_twice(got, by_formula(z, labels, weights, Terms()), exact)


@pytest.mark.parametrize("isa", checks.ISAS)
def test_a_small_softcap_argument_keeps_its_digits(isa: str) -> None:
    z = torch.logspace(-7, 1.5, 4001).reshape(1, -1)
    labels = torch.zeros(1, dtype=torch.int64)
    with checks.isa(isa):
        capped = run(z, labels, labels, Terms(softcap=30.0), gradient=False)[2]
    exact = torch.tanh(z.double() / 30)
    assert ((capped - exact) / exact).abs().max() < 4 * 2**-24


@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("n", TERMS[:1] + TERMS[4:5], ids=str)
def test_passes_what_is_not_finite(n: Terms, isa: str) -> None:
    z, _, weights = inputs(6, 40)
    labels = torch.tensor([3, 3, 3, 3, 3, 3])
    z[0, 5], z[1, 5], z[2, 5], z[3, 3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    z[4] = -torch.inf
    with checks.isa(isa):
        got = run(z, labels, weights, n)
    want = by_formula(z, labels, weights, n)
    checks.assert_same_specials(got[::2], want[::2])
    assert torch.equal(got[1].isfinite(), want[1].isfinite())  # NaN too where that is infinite


def test_rows_may_have_a_gap_and_labels_must_fit() -> None:
    z, labels, weights = inputs(5, 30)
    want = run(z, labels, weights, Terms())
    wide = torch.full((5, 48), 9.0)
    wide[:, :30] = z
    loss, lse = torch.empty(5), torch.empty(5)
    native.softmax_loss(
        wide.data_ptr(), 48, 5, 30, labels.data_ptr(), 0, IGNORE, 0.0, 0.0, 0.0,
        loss.data_ptr(), lse.data_ptr(), True,
    )  # fmt: skip
    checks.assert_same_bits([loss, lse, wide[:, :30]], want)
    assert (wide[:, 30:] == 9).all()
    for label in (30, -1):
        labels[0] = label
        got = run(z, labels, weights, Terms())
        assert got[0][0].isnan() and got[2][0].isnan().all()
        checks.assert_same_bits([t[2:] for t in got], [t[2:] for t in want])


@pytest.mark.parametrize("n", TERMS, ids=str)
def test_the_same_bits_again_and_on_any_number_of_threads(n: Terms) -> None:
    given = inputs(13, 5003)
    checks.assert_steady(lambda: run(*given, n))


def test_no_rows() -> None:
    assert [t.shape[0] for t in run(*inputs(0, 10), Terms())] == [0, 0, 0]
