"""Rungs 3, 5 and 7 catch what is planted, and the interpreter computes as a GPU does.

Triton decides when it is imported whether it interprets, so these run in a process of their own:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_proof.py

tests/kernels/test_proof_bugs.py does that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))
import proof_toys as toys

from trimpot.kernels.bench.roofline import Roofline
from trimpot.kernels.errors import BackendError
from trimpot.kernels.proof import gpu, interpreter, limits
from trimpot.kernels.proof.cases import DTYPES, Case, attempted
from trimpot.kernels.proof.check import interpreted_row, judged
from trimpot.kernels.proof.traffic import counting


def complaints(case: Case, dtype: str = "bf16") -> limits.Complaints:
    return limits.of_counted(attempted(case, dtype, interpreted_row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [toys.GOOD, toys.NARROW, toys.HUNGRY, toys.PRODUCT])
def test_what_is_right_passes(case: Case, dtype: str) -> None:
    assert complaints(case, dtype) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_results(dtype: str) -> None:
    found = complaints(toys.WRONG, dtype)
    assert set(found) == {"wrong"} and "result 0 is off by" in found["wrong"]


def test_another_dtype_than_torch_gives() -> None:
    assert "has not the dtype" in complaints(toys.OTHER_DTYPE)["wrong"]
    assert complaints(toys.OTHER_DTYPE, "fp32") == {}


def test_two_passes_move_twice_the_budget() -> None:
    row = interpreted_row(toys.TWO_PASSES, "fp32")
    assert row["traffic_ratio"] == 2.0
    assert "2.000 of the budget" in complaints(toys.TWO_PASSES)["traffic"]


def test_reading_twice_in_one_launch() -> None:
    found = complaints(toys.READS_TWICE)
    assert set(found) == {"again"} and "2.00 times" in found["again"]


def test_a_missing_mask_is_out_of_bounds() -> None:
    found = complaints(toys.UNMASKED)
    assert "24 lanes are out of bounds" in found["fault"]


def test_programs_that_write_one_element() -> None:
    assert "another program" in complaints(toys.RACING)["fault"]


def test_undefined_lanes_show_in_the_result() -> None:
    assert "off by nan" in complaints(toys.UNDEFINED)["wrong"]


def test_a_case_that_raises_has_a_row() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("first line\nno such thing")

    row = attempted(toys.toy("toy_fails", fails), "bf16", interpreted_row)
    assert row["op"] == "toy_fails"
    assert limits.of_counted(row) == {"wrong": "RuntimeError: no such thing"}


def test_the_2x_rule_at_its_edge() -> None:
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    plain = (exact + torch.tensor([0.01, 0.0])).float()
    half_ulp = torch.finfo(torch.float32).eps / 2
    inside = exact.float() + torch.tensor([0.0, 0.0199])
    assert judged(inside, plain, exact)["right"]
    assert judged(inside, plain, exact)["allowed"] == pytest.approx(
        0.02 / 17**0.5 + half_ulp, rel=1e-5
    )
    assert not judged(exact.float() + torch.tensor([0.0, 0.0202]), plain, exact)["right"]
    assert not judged(inside.half(), plain, exact)["right"]
    assert not judged(inside[:1], plain, exact)["right"]
    assert not judged(inside * torch.nan, plain, exact)["right"]


def test_one_wrong_element_of_many_is_seen() -> None:
    """It hardly moves the norm, which has room for 20 of torch's errors here."""
    exact = torch.ones(100, dtype=torch.float64)
    plain = (exact + 0.01).float()
    for error, right in ((0.0398, True), (0.0402, False)):
        ours = exact.float()
        ours[7] += error
        assert judged(ours, plain, exact)["right"] == right


def test_bytes_are_counted_one_by_one() -> None:
    x = torch.randn(3000)
    with counting() as launches:
        toys.tripled(x)
    (launch,) = launches
    assert (launch.kernel, launch.programs, launch.faults) == ("triple", 3, [])
    assert launch.unique_bytes == launch.total_bytes == 2 * 3000 * 4
    with counting() as launches:
        toys.tripled(x[::2].contiguous())
        toys.tripled(x, stride=2)
    assert [launch.unique_bytes for launch in launches] == [2 * 1500 * 4] * 2


def test_flops_of_dots_are_counted() -> None:
    (kernel,) = interpreted_row(toys.PRODUCT, "bf16")["kernels"].values()
    assert kernel["flops"] == 2 * 128 * 128 * 64


# Rung 7 needs a GPU; what it decides is the same on the interpreter.

ROOFLINE = Roofline({"bf16": 1e15, "fp16": 1e15, "fp32": 1e14}, 3e12)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that were timed."""
    names: list[str] = []

    def timing(case: Case, *_: Any) -> dict[str, float]:
        names.append(case.op)
        return {"p50_s": 1e-5, "roofline": 0.5}

    monkeypatch.setattr(gpu, "timing", timing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "toy GPU")
    return names


def test_only_what_is_right_is_timed(timed: list[str]) -> None:
    good = gpu.proven_row(toys.GOOD, "bf16", "cpu", ROOFLINE)
    assert good["right"] and good["p50_s"] == 1e-5 and good["gpu"] == "toy GPU"
    assert [result["sizes"] for result in good["results"]] == ["small", "large"]
    wrong = gpu.proven_row(toys.WRONG, "bf16", "cpu", ROOFLINE)
    assert (
        not wrong["right"] and "p50_s" not in wrong and "small result 0 is off by" in wrong["why"]
    )
    assert timed == ["toy_good"]


def test_large_sizes_are_judged_too(timed: list[str]) -> None:
    def short(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([toys.tripled(x[:8192]), torch.zeros_like(x[8192:])])

    row = gpu.proven_row(toys.toy("toy_short", short), "fp32", "cpu", ROOFLINE)
    assert row["why"].startswith("large result 0 is off by") and timed == []


def test_other_bits_the_second_time(timed: list[str]) -> None:
    calls: list[int] = []

    def drifting(x: torch.Tensor) -> torch.Tensor:
        """Right each time, but the last bit of one small element."""
        calls.append(0)
        y = toys.tripled(x)
        at = y.abs().argmin()
        if len(calls) % 2:
            y[at] = torch.nextafter(y[at], torch.tensor(9.0))
        return y

    row = gpu.proven_row(toys.toy("toy_drifting", drifting), "fp32", "cpu", ROOFLINE)
    assert all(result["right"] for result in row["results"])
    assert row["why"] == "; ".join(
        f"{s}: a second run gives other bits" for s in ("small", "large")
    )
    assert timed == []


def test_what_raises_has_a_row(timed: list[str]) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of\nresources")

    row = gpu.proven_row(toys.toy("toy_raises", fails), "fp32", "cpu", ROOFLINE)
    assert (row["right"], row["why"]) == (False, "RuntimeError: out of resources")
    assert gpu._line(row).endswith("WRONG, RuntimeError: out of resources")


def test_times_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five turns of ours and torch's; the ratio of one slow turn does not count."""
    turns = iter([[1e-5, 1e-5], [2e-5], [3e-5, 3e-5], [3e-5]] + [[1e-5, 1e-5], [2e-5]] * 3)
    monkeypatch.setattr(gpu, "_seconds", lambda run: next(turns))
    row = gpu.timing(toys.GOOD, "bf16", "cpu", ROOFLINE)
    moved = 2 * 64 * 1024 * 2
    assert row == pytest.approx(
        {"p20_s": 1e-5, "p50_s": 1e-5, "p80_s": 1.4e-5, "bandwidth": moved / 1e-5, "ratio": 2.0,
         "roofline": moved / 3e12 / 1e-5}, rel=1e-5,
    )  # fmt: skip
    turns = iter([[1e-3], [1e-3]] * gpu.TURNS)
    flops = 2 * 128 * 128 * 64
    product = gpu.timing(toys.PRODUCT, "fp32", "cpu", Roofline({"fp32": 1e9}, 1e12))
    assert product["roofline"] == pytest.approx(flops / 1e9 / 1e-3)  # FLOPs bind, not bytes


# The interpreter's mends.


@triton.jit
def arithmetic(A, B, SUM, PRODUCT, ROOT, MORE, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(SUM + at, a + b)
    tl.store(PRODUCT + at, a * b)
    tl.store(ROOT + at, tl.sqrt(tl.abs(a).to(tl.float32)).to(a.dtype))
    tl.store(MORE + at, a > b)


@triton.jit
def narrowed(X, Y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(Y + at, tl.load(X + at).to(tl.bfloat16))


@triton.jit
def dotted(A, B, C, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision=PRECISION))


@triton.jit
def summed(X, Y, COUNT: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, COUNT)), 0))


@triton.jit
def given(Y, value):
    tl.store(Y, value.to(tl.float64))


@pytest.fixture(autouse=True)
def mended() -> None:
    interpreter.enable()


def run(kernel: Any, *args: Any, **constants: Any) -> None:
    kernel[(1,)](*args, **constants)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_bf16_arithmetic_is_that_of_torch() -> None:
    a, b = random(512).bfloat16(), random(512, seed=1).bfloat16()
    total, times, root = (torch.empty_like(a) for _ in range(3))
    more = torch.empty(512, dtype=torch.int8)
    run(arithmetic, a, b, total, times, root, more, COUNT=512)
    assert torch.equal(total, a + b)
    assert torch.equal(times, a * b)
    assert torch.equal(root, a.float().abs().sqrt().bfloat16())
    assert torch.equal(more.bool(), a > b)


def test_float32_is_rounded_to_the_nearest_even_bf16() -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32)
    special = torch.tensor([float("inf"), float("-inf"), 3.4e38, 1e-45, -0.0])
    x = torch.cat([ties.view(torch.float32), special, random(119)])
    y = torch.empty(128, dtype=torch.bfloat16)
    run(narrowed, x, y, COUNT=128)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    x[0] = float("nan")
    run(narrowed, x, y, COUNT=128)
    assert y[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_of_16_bits_are_exact_products_in_float32(dtype: torch.dtype) -> None:
    a, b = random(32, 32).to(dtype), random(32, 32, seed=1).to(dtype)
    c = torch.empty(32, 32)
    run(dotted, a, b, c, N=32, PRECISION="ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_tf32_is_coarse_and_ieee_is_not() -> None:
    a, b = random(64, 64), random(64, 64, seed=1)
    exact = a.double() @ b.double()
    c = torch.empty(64, 64)
    run(dotted, a, b, c, N=64, PRECISION="tf32")
    assert 1e-3 < (c - exact).abs().max() < 3e-2  # 10 bits of fraction
    run(dotted, a, b, c, N=64, PRECISION="ieee")
    assert (c - exact).abs().max() < 2e-5


def test_a_sum_of_bf16_is_rounded_once() -> None:
    x = random(256).bfloat16()
    y = torch.empty(1, dtype=torch.bfloat16)
    run(summed, x, y, COUNT=256)
    assert abs(y.item() - x.double().sum().item()) <= 2**-8 * abs(x.double().sum().item())


def test_python_floats_arrive_as_float32() -> None:
    y = torch.empty(1, dtype=torch.float64)
    run(given, y, 0.1)
    assert y.item() == torch.tensor(0.1).double().item() != 0.1


def test_other_versions_of_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_enabled", False)
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    with pytest.raises(BackendError, match=r"know triton 3\.9, this is 3\.10\.0"):
        interpreter.enable()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET is not 1"):
        interpreter.enable()
