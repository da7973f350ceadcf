"""FlashAttention through torch: what we ask of it and make of its answers.

There is no GPU here. torch's own shape functions take our calls on its meta device; and a stand-in
on the CPU, written from what torch and FlashAttention say of their arguments and not from ours,
answers them with numbers. Whether the GPU's code keeps to that, `bench kernels --prove` sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kernel_checks as checks
import pytest
import torch
from attention_cases import Packed, doubles, inputs, run
from torch.utils import deterministic

from trimpot.kernels.dispatch import choose
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.vendor import flash, varlen_attention

CASES = [
    Packed((1,), 1, 1, 32),
    Packed((5, 0, 1, 40, 0, 0, 13), 4, 1, 64, rest=3),
    Packed((33, 70), 2, 2, 96, window=37),
    Packed((90, 23), 2, 1, 128, window=1),
    Packed((60, 61), 6, 2, 8, scale=0.7, window=200, rest=1),
]
MODES: list[tuple[bool, bool]] = []
"""(deterministic, fills new tensors) at each call of the stand-in."""


def scores(q, k, scale, cuts, causal, left, right):
    """[N, T, T] in float64, −inf where nothing is seen; and which tokens are in a document."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    at = torch.arange(tokens)
    document = torch.searchsorted(cuts[1:].long(), at, right=True)
    inside = at < int(cuts[-1])
    ahead = at[None, :] - at[:, None]
    seen = (document[:, None] == document[None, :]) & inside[:, None] & inside[None, :]
    seen &= (ahead >= -left) | torch.tensor(left < 0)
    seen &= (ahead <= (0 if causal else right)) | torch.tensor(right < 0 and not causal)
    s = scale * torch.einsum("ind,jnd->nij", q.double(), k.double().repeat_interleave(group, 1))
    return s.masked_fill(~seen, -torch.inf), inside


def stand_in_forward(
    q, k, v, cuts_q, cuts_k, longest_q, longest_k, dropout, causal, return_debug_mask, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    check_call(q, k, v, cuts_q, cuts_k, longest_q, longest_k, dropout)
    assert not return_debug_mask
    s, inside = scores(q, k, scale, cuts_q, causal, window_size_left, window_size_right)
    group = q.shape[1] // k.shape[1]
    values = v.double().repeat_interleave(group, 1)
    o = torch.einsum("nij,jnd->ind", s.softmax(-1), values)
    o[~inside] = torch.nan  # it writes nothing there
    lse = s.logsumexp(-1)
    lse[:, ~inside] = torch.nan
    empty = torch.empty(0)
    return o.to(q.dtype), lse.float(), torch.zeros(2, dtype=torch.uint64), empty, empty


def stand_in_backward(
    do, q, k, v, o, lse, cuts_q, cuts_k, longest_q, longest_k, dropout, causal, rng, unused, *,
    scale, window_size_left, window_size_right,
):  # fmt: skip
    check_call(q, k, v, cuts_q, cuts_k, longest_q, longest_k, dropout)
    assert lse.shape == (q.shape[1], q.shape[0]) and rng.dtype == torch.uint64 and not len(unused)
    s, inside = scores(q, k, scale, cuts_q, causal, window_size_left, window_size_right)
    group = q.shape[1] // k.shape[1]
    p = (s - lse.double()[..., None]).exp()
    p[:, ~inside] = 0
    do, o, q_wide = (x.double().masked_fill(~inside[:, None, None], 0) for x in (do, o, q))
    dp = torch.einsum("ind,jnd->nij", do, v.double().repeat_interleave(group, 1))
    ds = scale * p * (dp - (do * o).sum(-1).T[..., None])
    dq = torch.einsum("nij,jnd->ind", ds, k.double().repeat_interleave(group, 1))
    dk = torch.einsum("nij,ind->jnd", ds, q_wide).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("nij,ind->jnd", p, do).unflatten(1, (-1, group)).sum(2)
    for grad in (dq, dk, dv):
        grad[~inside] = torch.nan
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def check_call(q, k, v, cuts_q, cuts_k, longest_q, longest_k, dropout) -> None:
    MODES.append(
        (torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory)
    )
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert torch.equal(cuts_q, cuts_k) and cuts_q.dtype == torch.int32 and len(cuts_q) > 1
    longest = int(cuts_q.diff().max())
    assert longest_q >= longest and longest_k >= longest and dropout == 0


@pytest.fixture
def stand_in() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, function in (("forward", stand_in_forward), ("backward", stand_in_backward)):
        library.impl(f"_flash_attention_{name}", function, "CPU")
    MODES.clear()
    yield
    library._destroy()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", varlen_attention.DTYPES)
@pytest.mark.parametrize("n", CASES, ids=str)
def test_asks_for_what_the_definition_says(n: Packed, dtype: torch.dtype) -> None:
    given = inputs(n, dtype)
    found = run("vendor", n, given)
    checks.assert_twice(found, run("torch", n, given), run("torch", n, doubles(given)))
    o, lse, *grads = found
    end = sum(n.lengths)
    for tensor in (o, lse.T, *grads):
        assert not tensor[end:].any()
    assert MODES == [(True, False)] * 2  # one order of sums, and no pass over what it makes
    assert not torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_documents(lengths: tuple[int, ...]) -> None:
    for n in (Packed(lengths, 2, 1, 8, rest=4), Packed(lengths, 2, 1, 8)):
        for tensor in run("vendor", n, inputs(n, torch.bfloat16)):
            assert not tensor.any()


@pytest.mark.usefixtures("stand_in")
def test_reads_views() -> None:
    n = Packed((30, 11), 2, 2, 16)
    given = inputs(n, torch.bfloat16)
    joint = torch.stack(given[:3], 1)
    views = [joint[:, i].transpose(1, 2).contiguous().transpose(1, 2) for i in range(3)]
    for found, plain in zip(
        run("vendor", n, [*views, given[3]]), run("vendor", n, given), strict=True
    ):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("window", [0, 40])
def test_torch_knows_these_calls(window: int) -> None:
    """By its schemas and shape functions, whose backward makes what goes into backward."""
    q, k = (torch.empty(70, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    cuts = torch.empty(4, dtype=torch.int64, device="meta")
    o, lse = varlen_attention.forward(q, k, k, cuts, 0.1, window, 0.0)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 70), torch.float32)
    grads = varlen_attention.backward(o, q, k, k, o, lse, cuts, 0.1, window, 0.0)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, k)]


GPU = {"device": "cuda", "dtype": "bfloat16", "head_dim": 128, "architecture": "sm_90"}


def test_auto_prefers_it_and_says_so() -> None:
    choice = choose("varlen_attention", **GPU, flash="FA3")
    assert (choice.backend, choice.why) == ("vendor", "FlashAttention (FA3)")
    assert choose("varlen_attention", "triton", **GPU).backend == "triton"
    unseen = choose("varlen_attention", device="cuda")
    assert unseen.why == "FlashAttention (FA2) under precision bf16, else Triton"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "float32"}, "FlashAttention takes bf16 and fp16, tensors are float32"),
        ({"head_dim": 20}, "heads are 20 wide, no multiple of 8"),
        ({"softcap": 50.0}, "scores have a soft cap of 50, torch's FlashAttention none"),
        ({"architecture": "sm_75"}, "FlashAttention wants sm_80 or later, the GPU is sm_75"),
        ({"architecture": "gfx942"}, "FlashAttention wants sm_80 or later, the GPU is gfx942"),
        ({"flash": ""}, "this torch was built without FlashAttention"),
    ],
)
def test_where_it_does_not_run_triton_does(change: dict[str, Any], why: str) -> None:
    choice = choose("varlen_attention", **{**GPU, **change})
    assert choice.backend == "triton" and choice.why == f"Triton; no vendor: {why}"
    with pytest.raises(BackendError, match="vendor was asked for and can't run"):
        choose("varlen_attention", "vendor", **{**GPU, **change})


def test_what_it_does_not_take_is_one_error() -> None:
    n = Packed((9,), 2, 1, 8, softcap=2.0)
    for wrong in (n, Packed((9,), 2, 1, 12)):
        with pytest.raises(KernelError, match="backend vendor takes bf16 and fp16"):
            run("vendor", wrong, inputs(wrong, torch.bfloat16))


@pytest.mark.parametrize("cuts", [[0, 5, 10], [0, 6, 4], [1, 9], []])
def test_documents_outside_of_the_tokens_are_refused(cuts: list[int]) -> None:
    """FlashAttention would read there."""
    q = torch.zeros(9, 1, 8, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    with pytest.raises(KernelError, match="it must start with 0, never fall and end at 9"):
        varlen_attention.forward(q, q, q, cu_seqlens, 1.0, 0, 0.0)


def test_a_later_one_that_can_not_be_used_is_named(tmp_path, monkeypatch) -> None:
    assert flash.version(8) == flash.version(9) == "FA2"
    (tmp_path / "flash_attn_interface.py").write_text("")  # without the kernels that torch wants
    monkeypatch.syspath_prepend(tmp_path)
    flash.version.cache_clear()
    try:
        told = flash.version(9)
    finally:
        flash.version.cache_clear()
    assert told.startswith("FA2, since FA3 can't be used: Module 'flash_attn_interface'")


def test_facts_are_a_gpus() -> None:
    assert flash.gpu_facts(torch.device("cpu")) == {}
