"""Choices: what is taken, why, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest

from trimpot.kernels import dispatch, native
from trimpot.kernels.dispatch import Answer, Backend, Choice, choose
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops.content_hash import hash_documents
from trimpot.kernels.ops.pack import pack

STATE = native.state()
needs_extension = pytest.mark.skipif(not STATE.available, reason=STATE.why)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRIMPOT_NATIVE", "0")
    native.state.cache_clear()
    yield
    monkeypatch.undo()
    native.state.cache_clear()


@needs_extension
def test_auto_takes_the_extension_and_says_which_path() -> None:
    assert choose("pack") == Choice("pack", "native", "C++, segment tree")
    assert choose("content_hash").why == f"C++, {STATE.hash_variants[0]}"


@pytest.mark.usefixtures("without_extension")
def test_auto_falls_back_and_says_why() -> None:
    for op in ("pack", "content_hash"):
        want = Choice(op, "torch", "plain definition; no native: TRIMPOT_NATIVE=0 is set")
        assert choose(op) == want


@pytest.mark.usefixtures("without_extension")
def test_ops_work_without_the_extension() -> None:
    assert pack([3, 4, 5], 8).tolist() == [0, 1, 0]
    assert hash_documents(np.empty(0, np.int32), [0, 0]).tolist() == [0xEF46DB3751D8E999]


@pytest.mark.usefixtures("without_extension")
def test_a_wanted_backend_is_never_replaced() -> None:
    message = "pack: native was asked for and can't run: TRIMPOT_NATIVE=0 is set; use auto"
    with pytest.raises(BackendError, match=message):
        choose("pack", "native")
    with pytest.raises(BackendError, match=message):
        pack([1], 8, "native")
    with pytest.raises(BackendError, match="native kernels can't run"):
        native.pack(np.ones(1, np.int64), 8, np.ones(1, np.int64))


def test_the_plain_definition_can_be_asked_for() -> None:
    assert choose("pack", "torch") == Choice("pack", "torch", "asked for; plain definition")


@pytest.mark.parametrize(
    ("op", "wanted", "message"),
    [
        ("pack", "cuda", "pack has no backend 'cuda'; it has native, torch, or auto"),
        ("pack", "", "pack has no backend ''"),
        ("pakc", "auto", "there is no op 'pakc'; did you mean pack?"),
        ("zzz", "auto", "there is no op 'zzz'; there are adamw_step, add_rms_norm, content_hash"),
        ("zzz", "native", "there is no op 'zzz'"),
    ],
)
def test_unknown_names_are_refused(op: str, wanted: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        choose(op, wanted)
    assert message in str(caught.value)


def test_facts_decide_and_the_first_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(facts: dispatch.Facts) -> Answer:
        device = facts.get("device", "cpu")
        return Answer(device == "cuda", f"x is on {device}")

    def in_half(facts: dispatch.Facts) -> Answer:
        return Answer(facts.get("dtype") == "bfloat16", f"x is {facts.get('dtype')}")

    backends = (
        Backend("triton", on_gpu),
        Backend("native", in_half),
        Backend("torch", lambda _: Answer(True, "plain definition")),
    )
    monkeypatch.setitem(dispatch.OPS, "scale", backends)
    assert choose("scale", device="cuda", dtype="bfloat16").backend == "triton"
    assert choose("scale", device="cpu", dtype="bfloat16") == Choice(
        "scale", "native", "x is bfloat16; no triton: x is on cpu"
    )
    assert choose("scale", device="cpu", dtype="float64") == Choice(
        "scale",
        "torch",
        "plain definition; no triton: x is on cpu; no native: x is float64",
    )
    with pytest.raises(BackendError, match="triton was asked for and can't run: x is on cpu"):
        choose("scale", "triton", device="cpu")
    monkeypatch.setitem(dispatch.OPS, "scale", backends[:2])
    with pytest.raises(BackendError, match="no backend of scale can run: no triton: x is on cpu"):
        choose("scale", device="cpu", dtype="float64")


def test_every_op_ends_with_its_plain_definition() -> None:
    assert dispatch.available_ops() == sorted(dispatch.OPS)
    for op, backends in dispatch.OPS.items():
        assert backends[-1].name == "torch"
        assert backends[-1].judge({}).runs, op


def test_the_table_has_one_choice_for_each_op() -> None:
    rows = dispatch.table()
    assert [row.op for row in rows] == dispatch.available_ops()
    assert all(row == choose(row.op) for row in rows)


@needs_extension
def test_tensor_ops_go_by_device_and_type() -> None:
    low = choose("add_rms_norm", device="cpu", dtype="bfloat16")
    assert (low.backend, low.why[:3]) == ("cpp", "C++")
    double = choose("add_rms_norm", device="cpu", dtype="float64")
    assert double.backend == "torch"
    assert double.why == (
        "plain definition; no triton: tensors are on the CPU; no cpp: tensors are float64"
    )
    with pytest.raises(BackendError, match="rope: triton was asked for and can't run: tensors are"):
        choose("rope", "triton", device="cpu")
    with pytest.raises(BackendError, match="swiglu: cpp was asked for and can't run: tensors are "):
        choose("swiglu", "cpp", device="cuda")


def test_triton_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: set[str] = set()

    def find_spec(name: str) -> str | None:
        return None if name in absent else name

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", find_spec)
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    assert choose("rope", **gpu) == Choice("rope", "triton", "Triton")
    assert choose("rope", device="cuda", dtype="float64").backend == "torch"
    absent.add("trimpot.kernels.triton.rope")
    assert "no triton: rope has no Triton kernel yet" in choose("rope", **gpu).why
    assert choose("swiglu", **gpu).backend == "triton"
    absent.add("triton")
    assert "no triton: triton is not installed" in choose("swiglu", **gpu).why
    with pytest.raises(BackendError, match="triton was asked for and can't run: triton is not ins"):
        choose("swiglu", "triton", **gpu)


@needs_extension
@pytest.mark.parametrize("op", ["lora_linear", "linear_cross_entropy", "token_logprobs"])
def test_products_carry_their_arithmetic(op: str) -> None:
    def backend(dtype: str, gemm: str) -> str:
        return choose(op, dtype=dtype, gemm=gemm).backend

    assert backend("float32", "auto") == backend("bfloat16", "auto") == "cpp"
    assert backend("float32", "int16") == backend("bfloat16", "int16") == "cpp:int16"
    assert backend("bfloat16", "fp32") == "cpp:fp32"
    assert choose(op, "cpp", gemm="int16").backend == "cpp:int16"
    assert choose("rope", gemm="int16").backend == "cpp"
    # fp32 is a promise; low precision is told its error, where the processor is fast at it.
    assert "int16" not in choose(op, dtype="float32").why
    extension = native.extension()
    tiles = extension.gemm_fast_split()
    int16 = extension.gemm_fast_int16() and not tiles
    assert ("int16 (error 1.5e-4, bf16: 2.9e-3)" in choose(op, dtype="bfloat16").why) == int16
    assert ("under bf16, int16" in choose(op).why) == int16
    assert ("bf16 with fp32 sums" in choose(op).why) == tiles
    if tiles:
        assert backend("float32", "bf16x3") == "cpp:bf16x3"
        assert "bf16x3 (error 4e-6, bf16: 2.9e-3)" in choose(op, gemm="bf16x3").why


@needs_extension
def test_arithmetic_that_can_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.extension(), "gemm_fast_split", lambda: False)
    with pytest.raises(
        BackendError, match="cpu_gemm is bf16x3, and lora_linear can't run in it: th"
    ):
        choose("lora_linear", gemm="bf16x3")
    assert choose("rope", gemm="bf16x3").backend == "cpp"
    closed = native.State(False, "shut")
    monkeypatch.setattr(native, "state", lambda: closed)
    with pytest.raises(BackendError, match="cpu_gemm is int16, and lora_linear"):
        choose("lora_linear", gemm="int16")
    assert choose("lora_linear", gemm="fp32").backend == "torch"


@pytest.mark.parametrize("kind", [KernelError, BackendError])
def test_errors_pickle_and_are_the_users(kind: type[KernelError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what is; what to do")))  # noqa: S301 - of our own making
    assert type(again) is kind
    assert str(again) == "what is; what to do"
    assert isinstance(again, ValueError)
    assert again.exit_code == 2
