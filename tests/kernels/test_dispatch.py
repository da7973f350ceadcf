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
        ("zzz", "auto", "there is no op 'zzz'; there are content_hash, pack"),
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


@pytest.mark.parametrize("kind", [KernelError, BackendError])
def test_errors_pickle_and_are_the_users(kind: type[KernelError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what is; what to do")))
    assert type(again) is kind
    assert str(again) == "what is; what to do"
    assert isinstance(again, ValueError)
    assert again.exit_code == 2
