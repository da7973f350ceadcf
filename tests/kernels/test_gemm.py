"""Matrix products of the extension, against float64: int16 within half of bf16's error, bf16x3 far
closer, int8 within 1.2e-2 of the result, fp32 within twice of torch's. No result depends on threads
or on the run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, rates, split
from trimpot.kernels.cpp import int8 as bytes_form
from trimpot.kernels.errors import BackendError, KernelError

pytestmark = pytest.mark.skipif(not native.state().available, reason=native.state().why)

S = [(576, 960), (576, 576), (576, 3072), (1536, 576)]
M = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)]
ODD = [(1, 1), (7, 3), (31, 33), (100, 70), (289, 257), (577, 31)]
ROWS = 70

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(depth: int, outputs: int, rows: int = ROWS, outliers: bool = False) -> Operands:
    """x [M, K], W [N, K], dY [M, N]; outliers × 20 in a row, a column and an item of each."""
    generator = torch.Generator().manual_seed(depth * 31 + outputs)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(outputs, depth, generator=generator) * 0.05
    dy = torch.randn(rows, outputs, generator=generator)
    if outliers:
        for matrix in (x, weight, dy):
            matrix[:, 3 % matrix.shape[1]] *= 20
            matrix[matrix.shape[0] // 2] *= 20
            matrix[0, -1] *= 20
    return x, weight, dy


def packed_product(
    form: Any, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    group = form.pack_weights([weight])
    assert group is not None
    y, dx = torch.full(dy.shape, 7.0), torch.full(x.shape, 7.0)
    form.forward(form.quantise_input(gemm.readable(x), group), group.packs[0], y, None, None)
    rows = form.quantise_gradient(gemm.readable(dy), group.packs[0])
    form.gradient(rows, group.packs[0], dx, False, None)
    return [y, dx]


def int16(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    return packed_product(gemm, x, weight, dy)


def bf16x3(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    return packed_product(split, x, weight, dy)


def int8(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    return packed_product(bytes_form, x, weight, dy)


def fp32(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y, dx = torch.full(dy.shape, 7.0), torch.full(x.shape, 7.0)
    gemm.forward_fp32(gemm.single(x), gemm.readable(weight), y, None, None)
    gemm.gradient_fp32(gemm.single(dy), gemm.readable(weight), dx, False, None)
    return [y, dx]


def plain(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    return [x @ weight.T, dy @ weight]


HAS_TILES = native.state().available and native.extension().gemm_fast_split()
TILES = pytest.mark.skipif(not HAS_TILES, reason="no AMX tiles of bfloat16")
SPLIT = pytest.param(bf16x3, marks=TILES)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize(("depth", "outputs"), S + M + ODD)
def test_int16_is_closer_than_half_of_bf16(depth: int, outputs: int, outliers: bool) -> None:
    given = operands(depth, outputs, outliers=outliers)
    exact = plain(*(t.double() for t in given))
    low = plain(*(t.bfloat16() for t in given))
    for found, want, bf16 in zip(int16(*given), exact, low, strict=True):
        assert distance(found, want) <= 0.5 * distance(bf16, want)


@pytest.mark.parametrize(("depth", "outputs"), S + ODD)
def test_int16_reads_bf16(depth: int, outputs: int) -> None:
    given = [t.bfloat16() for t in operands(depth, outputs)]
    exact = plain(*(t.double() for t in given))
    for found, want in zip(int16(*given), exact, strict=True):
        assert distance(found, want) < 3e-4


@pytest.mark.parametrize(("depth", "outputs"), S + M[1:2] + ODD[2:])
def test_int8_errs_by_a_hundredth(depth: int, outputs: int) -> None:
    given = operands(depth, outputs)
    exact = plain(*(t.double() for t in given))
    low = plain(*(t.bfloat16() for t in given))
    for found, want, bf16 in zip(int8(*given), exact, low, strict=True):
        assert distance(found, want) < 1.2e-2
        assert distance(found, want) < 8 * distance(bf16, want)


@TILES
@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize(("depth", "outputs"), S + M + ODD)
def test_bf16x3_has_sixteen_bits(depth: int, outputs: int, outliers: bool) -> None:
    given = operands(depth, outputs, outliers=outliers)
    exact = plain(*(t.double() for t in given))
    for found, want in zip(bf16x3(*given), exact, strict=True):
        assert distance(found, want) < 2**-16


@TILES
@pytest.mark.parametrize(("depth", "outputs"), S + ODD)
def test_bf16x3_is_exact_but_for_fp32_sums_of_bf16(depth: int, outputs: int) -> None:
    x, weight, dy = (t.bfloat16() for t in operands(depth, outputs))
    for given in ((x, weight, dy), (x.float(), weight, dy.float()), (x, weight.float(), dy)):
        exact = plain(*(t.double() for t in given))
        for found, want in zip(bf16x3(*given), exact, strict=True):
            assert distance(found, want) < 5e-7


@TILES
def test_weights_that_were_bf16_need_half_the_pack() -> None:
    weight = operands(96, 40)[1]
    whole, half = split.pack_weights([weight]), split.pack_weights([weight.bfloat16().float()])
    assert whole is not None and half is not None
    assert whole.bytes == 2 * half.bytes == 4 * 96 * 64


@pytest.mark.parametrize(("depth", "outputs"), [*S, (2048, 2048), *ODD])
def test_fp32_obeys_the_rule_of_two(depth: int, outputs: int) -> None:
    given = operands(depth, outputs)
    exact = plain(*(t.double() for t in given))
    for found, want, torch_s in zip(fp32(*given), exact, plain(*given), strict=True):
        assert distance(found, want) <= 2 * distance(torch_s, want) + 1e-7


@pytest.mark.parametrize("product", [int16, SPLIT, int8, fp32])
@pytest.mark.parametrize("rows", [0, 1, 13, 14, 15, 449])
def test_any_number_of_rows(product: Callable[..., list[torch.Tensor]], rows: int) -> None:
    given = operands(96, 40, rows)
    atol = 0.1 if product is int8 else 5e-3
    for found, want in zip(product(*given), plain(*given), strict=True):
        assert found.shape == want.shape
        torch.testing.assert_close(found, want, rtol=0, atol=atol)


@pytest.mark.parametrize("product", [int16, SPLIT, int8, fp32])
def test_strides(product: Callable[..., list[torch.Tensor]]) -> None:
    """Transposed, sliced and expanded operands are read as what they are."""
    x, weight, dy = operands(96, 40)
    wide = torch.zeros(ROWS, 200)
    wide[:, 50:146] = x
    want = product(x, weight, dy)
    for given in (
        (wide[:, 50:146], weight, dy),
        (x, weight.T.contiguous().T, dy.T.contiguous().T),
    ):
        assert all(torch.equal(a, b) for a, b in zip(product(*given), want, strict=True))
    row = x[:1].expand(ROWS, 96)
    assert torch.equal(product(row, weight, dy)[0], product(row.contiguous(), weight, dy)[0])


@pytest.mark.parametrize("product", [int16, SPLIT, int8, fp32])
def test_same_bits_again_and_on_any_number_of_threads(
    product: Callable[..., list[torch.Tensor]],
) -> None:
    given = operands(576, 960, 200)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = product(*given), product(*given)
        torch.set_num_threads(2)
        two = product(*given)
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(one, again, two, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("product", [int16, SPLIT, int8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(product: Callable[..., list[torch.Tensor]], value: float) -> None:
    """It spoils its own row in integers and in bf16x3, which know no infinity, and no other."""
    x, weight, dy = operands(96, 40)
    clean = product(x, weight, dy)
    x[5, 7], dy[6, 3] = value, value
    y, dx = product(x, weight, dy)
    assert y[5].isnan().all() and dx[6].isnan().all()
    rest = torch.arange(ROWS)
    assert torch.equal(y[rest != 5], clean[0][rest != 5])
    assert torch.equal(dx[rest != 6], clean[1][rest != 6])


def test_weights_that_are_not_finite_are_not_packed() -> None:
    weight = operands(96, 40)[1]
    weight[3, 4] = float("inf")
    assert gemm.pack_weights([weight]) is None
    assert bytes_form.pack_weights([weight]) is None
    assert not HAS_TILES or split.pack_weights([weight]) is None


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_any_magnitude(scale: float) -> None:
    x, weight, dy = operands(576, 64)
    y, _ = int16(x * scale, weight, dy)
    assert distance(y, x.double() * scale @ weight.double().T) < 3e-4


def test_zeros_are_exact() -> None:
    x, weight, dy = operands(96, 40)
    x[3], weight[5], weight[:, 9], dy[4] = 0, 0, 0, 0
    y, dx = int16(x, weight, dy)
    assert not y[3].any() and not y[:, 5].any() and not dx[4].any() and not dx[:, 9].any()


def test_largest_sums_do_not_overflow() -> None:
    """Rows and columns that are as like each other as can be: the bound is reached."""
    x, weight = torch.ones(20, 576), torch.ones(64, 576)
    y, dx = int16(x, weight, torch.ones(20, 64))
    torch.testing.assert_close(y, torch.full((20, 64), 576.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(dx, torch.full((20, 576), 64.0), rtol=1e-3, atol=0)
    signs = torch.where(torch.arange(576) % 2 == 0, 1.0, -1.0)
    y, _ = int16(signs.expand(20, 576), signs.expand(64, 576), torch.ones(20, 64))
    torch.testing.assert_close(y, torch.full((20, 64), 576.0), rtol=1e-3, atol=0)


def test_a_pack_is_made_once_and_again_when_the_weight_changes() -> None:
    weight = operands(96, 40)[1]
    first = gemm.packed([weight])
    assert gemm.packed([weight]) is first
    weight.add_(1)  # its version counts
    second = gemm.packed([weight])
    assert second is not first
    weight.data[0, 0] += 1  # no version tells of this
    assert gemm.packed([weight]) is not second
    assert second is not None and second.bytes == 2 * 96 * 64  # 40 columns in panels of 32


def test_weights_that_come_and_go_are_not_kept() -> None:
    weight = operands(96, 40)[1]
    weight.ds_id = 1  # type: ignore[attr-defined]  # as ZeRO-3 marks them
    assert gemm.packed([weight]) is not gemm.packed([weight])


def test_other_devices_are_refused() -> None:
    with pytest.raises(KernelError, match="computes on the CPU"):
        gemm.readable(torch.empty(2, 2, device="meta"))


def test_what_may_be_taken() -> None:
    # One, not the faster of two: a run that goes on elsewhere must not change its bits.
    assert len(rates.permitted("fp32", torch.float32)) == 1
    assert rates.permitted("auto", torch.float32) == rates.permitted("fp32", torch.float32)
    assert rates.permitted("fp32", torch.bfloat16) == ("fp32",)
    assert rates.permitted("int16", torch.float32) == ("int16",)
    if HAS_TILES:
        assert rates.permitted("bf16x3", torch.float32) == ("bf16x3",)
    else:
        with pytest.raises(BackendError, match="wants AMX tiles of bfloat16"):
            rates.permitted("bf16x3", torch.float32)
    with pytest.raises(BackendError, match="'int4'; one of auto, fp32, int16"):
        rates.permitted("int4", torch.float32)


def test_candidates_are_measured() -> None:
    candidates = rates.permitted("auto", torch.bfloat16)
    seconds = rates.measure(candidates, torch.bfloat16, 576, 576, repeats=1)
    assert tuple(seconds) == candidates and len(seconds) == 2 and min(seconds.values()) > 0


@pytest.mark.parametrize(("first", "taken"), [(1.0, 0), (2.09, 0), (2.11, 1)])
def test_the_choice_is_the_first_unless_another_is_clearly_faster(
    first: float, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = rates.permitted("auto", torch.bfloat16)
    seconds = dict(zip(candidates, (first, 2.0), strict=True))
    monkeypatch.setattr(rates, "measure", lambda *_: seconds)
    rates._fastest.cache_clear()
    try:
        assert rates.choose("auto", torch.bfloat16, 576, 576) == candidates[taken]
    finally:
        rates._fastest.cache_clear()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """Integer sums are exact, so int16 has the same bits wherever it runs but for the last of
    the scales; fp32 obeys the rule of two."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_gemm as t\n"
        "print(t.native.extension().gemm_isa())\n"
        "for shape in ((100, 70), (577, 31)):\n"
        "    given = t.operands(*shape)\n"
        "    exact = t.plain(*(g.double() for g in given))\n"
        "    for product, limit in ((t.int16, 3e-4), (t.int8, 1.2e-2), (t.fp32, 1e-6)):\n"
        "        for found, want in zip(product(*given), exact):\n"
        "            assert t.distance(found, want) < limit, (shape, limit)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],  # noqa: PTH120
        env={**os.environ, "TRIMPOT_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ran = done.stdout.split()[0]
    order = ["generic", "avx2", "avx512"]
    assert order.index(ran) <= order.index(isa)  # a lower one where the processor has not this
