"""Each rung of the proof ladder catches what is planted for it; the toys are in proof_toys.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import proof_toys as toys

from trimpot.kernels.errors import BackendError
from trimpot.kernels.proof import compile as rung4
from trimpot.kernels.proof import ladder, limits, model, sass
from trimpot.kernels.proof.cases import Case, attempted

INTERPRETED = Path(__file__).parent.parent / "interpreted_proof.py"

every_target = pytest.mark.parametrize("target", limits.TARGETS)


def test_rungs_3_5_and_7_and_the_interpreter() -> None:
    """Where what they find is printed. (7 s)"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(case: Case, target: str, dtype: str = "bf16") -> dict[str, Any]:
    with rung4.on_target(target):
        return {"target": target, **attempted(case, dtype, rung4.compiled_row)}


def complaints(case: Case, target: str, dtype: str = "bf16") -> limits.Complaints:
    return limits.of_compiled(compiled(case, target, dtype))


@every_target
def test_a_good_kernel_passes(target: str) -> None:
    row = compiled(toys.GOOD, target)
    (launch,) = row["launches"]
    code = launch["code"]
    assert limits.of_compiled(row) == {}
    assert (launch["programs"], code["name"], code["threads"]) == (64, "triple", 128)
    assert code["load_bits"] == {128: 1} and code["wide_share"] == 1.0
    assert 0 < code["registers"] < 64 and code["shared_bytes"] == 0


@every_target
def test_spills_are_seen(target: str) -> None:
    assert "triple_hungry spills" in complaints(toys.HUNGRY, target)["spills"]


def code_of(case: Case, target: str) -> dict[str, Any]:
    return compiled(case, target)["launches"][0]["code"]


@every_target
def test_narrow_loads_are_seen(target: str) -> None:
    assert set(complaints(toys.NARROW, target)) == {"wide"}
    assert code_of(toys.NARROW, target)["load_bits"].keys() == {16}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")],
)
def test_tensor_core_instructions_are_named(target: str, instruction: str, dtype: str) -> None:
    row = compiled(toys.PRODUCT, target, dtype)
    assert limits.of_compiled(row) == {}
    assert instruction in row["launches"][0]["code"]["tensor_core"]


@every_target
def test_their_absence_is_seen(target: str) -> None:
    assert set(complaints(toys.NO_TENSOR_CORE, target)) == {"mma"}


def test_what_does_not_compile_has_a_row() -> None:
    def fails(x: Any) -> None:
        raise RuntimeError("no such instruction")

    row = compiled(toys.toy("toy_uncompiled", fails), "sm_90")
    assert limits.of_compiled(row) == {"compile": "RuntimeError: no such instruction"}


def test_an_interpreting_process_can_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset it"), rung4.on_target("sm_90"):
        pass
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(BackendError, match="unset it"):
        ladder.prove(["swiglu"])


CODE = sass.Code("f", 128, 64, 0, 1024, {}, {128: 4}, 400)


def row_with(**changed: Any) -> dict[str, Any]:
    """A row of rung 4 without fault but for what is changed."""
    code = {**CODE.as_dict(), **{k: v for k, v in changed.items() if k in CODE.as_dict()}}
    row = {
        "op": "f", "direction": "forward", "variant": "", "dtype": "bf16", "target": "sm_80",
        "has_dot": False, "wide_loads": False, "launches": [{"programs": 1, "code": code}],
        "budget": 2e6, "flops": 0.0,
    }  # fmt: skip
    return row | {k: v for k, v in changed.items() if k in row}


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ({}, set()),
        ({"registers": 255, "shared_bytes": 163 << 10}, set()),
        ({"registers": 256}, {"registers"}),
        ({"registers": 512, "shared_bytes": 64 << 10, "target": "gfx942"}, set()),
        ({"registers": 513, "target": "gfx942"}, {"registers"}),
        ({"registers": 128, "wide_loads": True}, set()),
        ({"registers": 129, "wide_loads": True}, {"registers"}),
        ({"shared_bytes": (163 << 10) + 1}, {"shared"}),
        ({"shared_bytes": (163 << 10) + 1, "target": "sm_90"}, set()),
        ({"shared_bytes": (64 << 10) + 1, "target": "gfx942"}, {"shared"}),
        ({"wide_share": 0.75, "wide_loads": True}, set()),
        ({"wide_share": 0.74, "wide_loads": True}, {"wide"}),
        ({"wide_share": 0.1}, set()),
        ({"has_dot": True}, {"mma"}),
        ({"spills": 1}, {"spills"}),
    ],
)
def test_limits(changed: dict[str, Any], kinds: set[str]) -> None:
    assert set(limits.of_compiled(row_with(**changed))) == kinds


def test_an_exception_excuses_one_kind_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.EXCEPTIONS, ("f forward bf16", "spills"), "8 bytes, once")
    row = row_with(spills=8, registers=256)
    assert set(limits.unexcused(row, limits.of_compiled(row))) == {"registers"}
    for part, other in (("dtype", "fp16"), ("dtype", "bf16x"), ("op", "ff"), ("variant", "x")):
        unlike = row | {part: other}
        assert set(limits.unexcused(unlike, limits.of_compiled(row))) == {"registers", "spills"}


def counted_row(**changed: Any) -> dict[str, Any]:
    row = {
        "op": "f", "direction": "forward", "variant": "", "dtype": "bf16", "wide_loads": False,
        "results": [{"right": True}], "faults": [], "traffic_ratio": 1.0,
        "kernels": {"f": {"bytes": 10, "total_bytes": 20, "flops": 0}},
    }  # fmt: skip
    return row | changed


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ({}, set()),
        ({"traffic_ratio": 1.05}, set()),
        ({"traffic_ratio": 1.051}, {"traffic"}),
        ({"wide_loads": True}, {"again"}),
        ({"faults": ["f: out of bounds"]}, {"fault"}),
    ],
)
def test_limits_of_counts(changed: dict[str, Any], kinds: set[str]) -> None:
    assert set(limits.of_counted(counted_row(**changed))) == kinds


def test_a_dry_row_is_made_of_both() -> None:
    """Two launches of one kernel share its bytes; complaints name the row."""
    compiled_row = row_with(wide_loads=True, spills=12)
    compiled_row["launches"] *= 2
    row = ladder.dry_row(compiled_row, counted_row(traffic_ratio=1.5))
    assert row["spills"] == 24 and row["registers"] == 64 and row["mma"] is None
    assert 0 < row["bound_low"] < row["bound_high"] < 1 / 1.5 + 1e-9
    assert row["complaints"] == [
        "f forward bf16 sm_80: moves 1.500 of the budget, not 1.05",
        "f forward bf16 sm_80: f spills 12",
    ]


def test_wrong_results_get_no_model() -> None:
    wrong = {"right": False, "same": True, "error": 2.0, "allowed": 1.0}
    row = ladder.dry_row(row_with(), counted_row(results=[wrong]))
    assert row["complaints"] == [
        "f forward bf16 sm_80: result 0 is off by 2.00e+00, 1.00e+00 is allowed"
    ]
    assert (row["registers"], row["traffic_ratio"], row["bound_low"]) == (64, None, None)


def test_what_failed_has_a_dry_row() -> None:
    identity = {k: v for k, v in counted_row().items() if k in ("op", "direction", "variant")}
    failed = {**identity, "dtype": "bf16", "failed": "ValueError: no"}
    row = ladder.dry_row(row_with(), failed)
    assert row["complaints"] == ["f forward bf16 sm_80: ValueError: no"] and row["registers"] == 64
    row = ladder.dry_row({**failed, "target": "gfx942"}, counted_row())
    assert row["complaints"] == ["f forward bf16 gfx942: ValueError: no"]
    assert row["registers"] is row["bound_high"] is None


# Rung 6 by hand, on a GPU of round numbers.


@pytest.fixture
def gpu() -> model.Gpu:
    """100 processors that fill 1e12 B/s easily; 1e12 instructions a second for each of 4 warps."""
    return model.Gpu("round", 1e12, 1e14, 1e13, 100, 1e9, 65536, 1 << 17, 2048, 32)


def work(**changed: Any) -> model.Work:
    code = CODE.as_dict() | {"load_bits": {128: 8}} | changed
    return model.Work(sass.Code.from_dict(code), 100_000, 1e9, 0.0)


def test_the_window_by_hand(gpu: model.Gpu) -> None:
    # Little: 100 · 8 programs · 128 threads · 8 loads · 16 B = 13.1 MB in flight, 1e12 B/s · 0.9 µs
    # = 0.9 MB are enough, so bytes take 1 ms. Instructions: 4e5 warps · 400 / (4 · 100 · 1e9) =
    # 0.4 ms, launch 2 µs.
    low, high = model.window(gpu, [work()], 1e9, 0.0, "bf16")
    assert low == pytest.approx(1 / 1.402) and high == 1.0
    assert model.window(gpu, [work()], 0.5e9, 0.0, "bf16")[1] == pytest.approx(0.5)
    assert model.resident(gpu, CODE) == 8
    assert model.resident(gpu, sass.Code.from_dict(CODE.as_dict() | {"shared_bytes": 1 << 16})) == 2


def test_few_loads_in_flight_leave_bandwidth(gpu: model.Gpu) -> None:
    # 1 program of 32 threads · 4 B each processor: 12,800 B in 500 ns are 2.6 % of the bandwidth.
    shared = 1 << 17
    few = work(load_bits={32: 1}, threads=32, shared_bytes=shared)
    _, high = model.window(gpu, [few], 1e9, 0.0, "bf16")
    assert high == pytest.approx(12_800 / 500e-9 / 1e12)


def test_flops_bind_where_there_are_many(gpu: model.Gpu) -> None:
    heavy = model.Work(CODE, 1000, 1e9, 1e12)
    for dtype, seconds in (("bf16", 1e12 / 1e14), ("fp32", 1e12 / 1e13)):
        low, high = model.window(gpu, [heavy], 1e9, 1e12, dtype)
        assert high == 1.0 and low == pytest.approx(seconds / (seconds + 1e-3 + 6e-6), rel=1e-3)


@pytest.fixture(autouse=True)
def _driver_is_left_as_it_was() -> Iterator[None]:
    from triton.runtime.driver import driver

    before = driver._active
    yield
    assert driver._active is before
