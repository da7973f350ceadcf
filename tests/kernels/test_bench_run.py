"""`bench kernels`: what is right is timed, what is wrong or missing is a row that says so."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimpot.kernels.bench import measure, ours
from trimpot.kernels.bench.case import Variant, cast, outcome_of, upstream_like
from trimpot.kernels.bench.check import error, judge
from trimpot.kernels.bench.liger import RUN as LIGER
from trimpot.kernels.bench.run import MAKE, Options, bench
from trimpot.kernels.bench.shapes import OPS, SHAPES, calls
from trimpot.kernels.bench.work import BACKWARD, BOTH, FORWARD, STEP
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops import swiglu as swiglu_op

ROW_KEYS = {
    "op", "shape", "case", "mode", "dtype", "wanted", "backend", "peer", "p20", "p50", "p80",
    "verdict", "tflops", "least_bytes", "bandwidth_gbs", "roofline_percent", "memory_ratio",
    "error", "peer_error", "within_tolerance", "seconds", "peer_seconds", "threads", "device",
}  # fmt: skip


def run(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ops": ("swiglu",), "shapes": ("T",), "backends": ("torch",), "repeats": 2, "tokens": 33,
    }  # fmt: skip
    return bench(Options(**(values | changes)), lambda _: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One call a sample; the roofline's own measurement small."""
    from trimpot.kernels.bench import roofline

    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    monkeypatch.setattr(roofline, "GEMM_N", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_say_what_was_measured() -> None:
    result = run(dtypes=("fp32", "bf16"), modes=(FORWARD, BACKWARD))
    rows = result["rows"]
    assert [(r["mode"], r["dtype"]) for r in rows] == [
        (mode, dtype) for dtype in ("fp32", "bf16") for mode in (FORWARD, BACKWARD, BOTH)
    ]
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["backend"] == "torch" and row["peer"] == "torch" and row["within_tolerance"]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["seconds"] > 0 and row["peer_seconds"] > 0
    assert rows[0]["least_bytes"] == 3 * 33 * 512 * 4
    assert rows[1]["least_bytes"] == 5 * 33 * 512 * 4
    assert rows[0]["error"] < 1e-6 < 1e-4 < rows[3]["error"]
    assert result["roofline"]["gemm_tflops"].keys() == {"fp32", "bf16"}
    assert result["environment"]["threads"] == 1
    assert "cpu" in result["environment"] and "torch" in result["environment"]


def off_by_one_element(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.silu(gate) * up
    y.view(-1)[7] += 0.01
    return y


def not_a_number(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu_op.forward(gate, up) / 0 * 0


def half_up(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Any:
    dgate, dup = swiglu_op.backward(dy, gate, up)
    return dgate, dup / 2


@pytest.mark.parametrize(
    ("forward", "backward", "says"),
    [
        (off_by_one_element, swiglu_op.backward, "out 0"),
        (not_a_number, swiglu_op.backward, "out 0: error inf"),
        (swiglu_op.forward, half_up, "d up"),
    ],
)
def test_a_wrong_backend_gets_no_time(
    forward: Any, backward: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(swiglu_op, "implementation", lambda op, backend: wrong)
    (row,) = run(modes=(FORWARD,), peers=("torch",))["rows"]
    assert row["verdict"] == "WRONG" and row["within_tolerance"] is False
    assert row["p50"] is None and "seconds" not in row and "tflops" not in row
    assert says in row["why"]


def test_what_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(backends=("cpp:no-such", "torch"), modes=(FORWARD,))["rows"]
    assert [row["verdict"] == "MISSING" for row in rows] == [True, False]
    assert rows[0]["p50"] is None and rows[0]["why"]

    monkeypatch.setitem(MAKE, "no_such_op", MAKE["swiglu"])
    with pytest.raises(BackendError, match="there is no op no_such_op"):
        ours.program("no_such_op", "auto")


def test_peers_that_are_not_installed_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    options = Options(
        ops=("swiglu",), shapes=("T",), backends=("torch",), peers=("liger", "peft"), tokens=8
    )
    result = bench(options, said.append)
    assert result["rows"] == []
    assert len(result["notes"]) == 2 and "liger-kernel is not installed" in result["notes"][0]
    assert set(result["notes"]) <= set(said)


@pytest.mark.parametrize(
    "changes",
    [{"modes": ("sideways",)}, {"dtypes": ("fp8",)}, {"peers": ("me",)}, {"shapes": ("XL",)}],
)
def test_unknown_names_are_the_users_mistake(changes: dict[str, Any]) -> None:
    with pytest.raises(KernelError, match="there is no"):
        run(**changes)


@pytest.mark.parametrize("op", OPS)
def test_each_case_agrees_with_its_definition(op: str) -> None:
    """The torch peer of every op, in float32, against the same formula in float64."""
    for call in calls(op, SHAPES["T"]):
        case = MAKE[op](call, 19, "cpu", torch.float32)
        upstream = ()
        if case.leaves:
            upstream = upstream_like(case.torch_form(case.inputs))
        wide = cast(case.inputs, torch.float64)
        exactly = Variant("exact", case.torch_form)
        exact = outcome_of(exactly, case, wide, tuple(u.double() for u in upstream))
        if case.exact is not None:
            by_rows = case.exact(case.inputs, upstream)
            assert all(error(by_rows[n], exact[n]).norm < 1e-12 for n in exact)
        peer = case.peers.get("torch") or Variant("torch", case.torch_form)
        found = outcome_of(peer, case, case.inputs, upstream)
        for name, value in exact.items():
            most = 4e-3 if found[name].dtype is torch.bfloat16 else 2e-6
            assert error(found[name], value).norm < most, name
        assert set(case.work) == ({STEP} if op == "adamw_step" else set(case.work) - {STEP})
        assert all(work.flops > 0 and work.bytes > 0 for work in case.work.values())


def test_lora_bytes_are_the_bound() -> None:
    """2MN + 3MK + 2KN elements, forward and backward."""
    (call,) = [c for c in calls("lora_linear", SHAPES["T"]) if c.case == "gate_up"]
    case = MAKE["lora_linear"](call, 100, "cpu", torch.bfloat16)
    m, k, n = 100, 256, 1024
    assert case.work[BOTH].bytes == 2 * (2 * m * n + 3 * m * k + 2 * k * n)


def test_a_judgement_is_earned() -> None:
    exact = {"y": torch.linspace(-1, 1, 1000, dtype=torch.float64)}
    close = {"y": exact["y"].float()}
    assert judge(close, close, exact).right
    coarse = {"y": exact["y"].bfloat16()}
    assert judge(coarse, coarse, exact).right
    assert not judge({"y": coarse["y"].float()}, close, exact).right
    # int16's rule: half of bf16's error is the most.
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = error(coarse["y"], exact["y"]).norm * exact["y"].norm() / noise.norm()
    for share, right in ((0.3, True), (0.8, False)):
        found = {"y": (exact["y"] + share * scale * noise.clamp(-1.5, 1.5)).float()}
        assert judge(found, coarse, exact, factor=0.5).right is right
    assert not judge({}, close, exact).right
    assert not judge({"y": close["y"][:-1]}, close, exact).right
    assert math.isinf(error(torch.tensor([math.nan]), torch.ones(1)).norm)


def test_rounds_run_everybody_in_turn() -> None:
    call = calls("swiglu", SHAPES["T"])[0]
    case = MAKE["swiglu"](call, 4, "cpu", torch.float32)
    upstream = upstream_like(case.torch_form(case.inputs))
    order: list[str] = []

    def noted(name: str) -> Variant:
        def program(tensors: Any) -> Any:
            order.append(name)
            return case.torch_form(tensors)

        return Variant(name, program)

    runners = [measure.runner_of(noted(n), case, upstream, "cpu", True) for n in "ab"]
    order.clear()
    measure.interleave(runners, 4)
    assert "".join(order) == "aabb" + "abbaabba"
    assert all(len(r.forward_s) == len(r.backward_s) == 4 for r in runners)


def test_peak_memory_sees_what_a_call_takes() -> None:
    if not measure.reset_peak(trim=True):
        pytest.skip("this kernel does not let a process reset its peak")
    taken = measure.peak_memory(lambda: torch.ones(16 << 20).sum(), "cpu")
    assert taken is not None and 60 << 20 < taken < 90 << 20
    assert (measure.peak_memory(lambda: torch.ones(1 << 10), "cpu") or 0) < 8 << 20


def test_liger_is_asked_for_ops_that_there_are() -> None:
    assert set(LIGER) <= set(OPS)
