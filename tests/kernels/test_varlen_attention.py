"""Attention over packed documents: against plain softmax, torch's sdpa, float64 and itself."""

from __future__ import annotations

import math

import kernel_checks as checks
import pytest
import torch
from attention_cases import Packed, by_token, doubles, inputs, run

from trimpot.kernels import dispatch
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import varlen_attention as op
from trimpot.kernels.ops.varlen_attention import varlen_attention

CASES = [
    Packed((1,), 1, 1, 32),
    Packed((5, 0, 1, 40, 0, 0, 13), 4, 1, 64, rest=3),
    Packed((300, 17, 500), 3, 1, 64),
    Packed((1024, 1, 200), 1, 1, 32),
    Packed((223, 224, 225, 14, 15, 33), 8, 1, 32),  # a block's keys, a tile's rows and columns ± 1
    Packed((330, 70), 2, 2, 96, window=37),
    Packed((700,), 4, 1, 32, window=225),  # rows that see nothing of a block they share
    Packed((90, 230), 2, 1, 128, window=1),
    Packed((257, 20), 2, 1, 256, window=64, softcap=20.0),
    Packed((240, 9), 4, 4, 72, softcap=5.0, rest=20),
    Packed((60, 61), 2, 1, 7),
]
backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)]
)
needs_tiles = pytest.mark.skipif(
    "bf16x3" not in dispatch.arithmetics(), reason="no AMX tiles of bfloat16 here"
)
TILES = pytest.param("cpp:bf16x3", marks=needs_tiles)
everywhere = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension), TILES]
)
in_cpp = pytest.mark.parametrize(
    "backend", [pytest.param("cpp:fp32", marks=checks.needs_extension), TILES]
)


def by_softmax(n: Packed, q, k, v):
    """Each token with a loop over what it sees: nothing shared with the definition."""
    outs = []
    for d, (first, last) in enumerate(zip(n.cu_seqlens[:-1], n.cu_seqlens[1:], strict=True)):
        assert last - first == n.lengths[d]
        for i in range(int(first), int(last)):
            low = max(int(first), i - n.window + 1) if n.window else int(first)
            for h in range(n.heads):
                g = h * n.kv_heads // n.heads
                s = (k[low : i + 1, g] @ q[i, h]) / math.sqrt(n.width)
                s = n.softcap * (s / n.softcap).tanh() if n.softcap else s
                outs.append(s.softmax(0) @ v[low : i + 1, g])
    return torch.stack(outs).view(-1, n.heads, n.width)


SMALL = [
    Packed((3, 0, 1, 6), 4, 2, 3),
    Packed((7, 2), 2, 1, 4, window=3),
    Packed((5, 4), 2, 2, 2, softcap=1.5),
]


@pytest.mark.parametrize("n", SMALL)
def test_gradients_are_those_of_the_formula(n: Packed) -> None:
    q, k, v, _ = (t.requires_grad_() for t in inputs(n))

    def function(q, k, v):
        return varlen_attention(q, k, v, n.cu_seqlens, 0.7, n.window, n.softcap, "torch")[0]

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("n", [*SMALL, Packed((30, 9), 3, 1, 8, window=11, softcap=3.0)])
def test_is_softmax_over_what_a_token_sees(n: Packed) -> None:
    given = inputs(n)
    want = checks.with_gradients(lambda *t: by_softmax(n, *t), given[:3], given[3:])

    def reference(q, k, v):
        return op.reference(q, k, v, n.cu_seqlens, n.width**-0.5, n.window, n.softcap)

    o, _, *grads = run("torch", n, given)
    for got in ([o, *grads], checks.with_gradients(reference, given[:3], given[3:])):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, *checks.DTYPES])
def test_is_torchs_sdpa(dtype: torch.dtype) -> None:
    n = Packed((50,), 6, 2, 16)
    given = inputs(n, dtype)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return o[0].transpose(0, 1)

    theirs = checks.with_gradients(sdpa, given[:3], given[3:])
    o, _, *grads = run("torch", n, given)
    exact, _, *exact_grads = run("torch", n, doubles(given))
    checks.assert_twice([o, *grads], theirs, [exact, *exact_grads])


@everywhere
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_is_an_op_as_torch_wants_it(backend: str, dtype: torch.dtype) -> None:
    n = Packed((5, 0, 9), 4, 2, 8, window=4, softcap=2.0, rest=1)
    q, k, v, do = inputs(n, torch.float32)
    o, lse, *_ = run(backend, n, [q, k, v, do])
    settings = (n.cu_seqlens.to(dtype), 0.5, n.window, n.softcap, backend)
    torch.library.opcheck(op._backward_op, (do, q, k, v, o, lse, *settings))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(op._op, (*leaves, *settings))


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", CASES, ids=str)
def test_cpp_obeys_the_rule(n: Packed, dtype: torch.dtype, isa: str) -> None:
    given = inputs(n, dtype)
    with checks.isa(isa):
        got = run("cpp:fp32", n, given)
    checks.assert_twice(got, run("torch", n, given), run("torch", n, doubles(given)))


TILE_CASES = [
    *CASES,
    Packed((31, 32, 33, 63, 64, 65, 127, 128, 129), 6, 2, 64),  # tiles and blocks ± 1
    Packed((257, 511), 2, 1, 32, window=33),
    Packed((300,), 3, 1, 64, window=65, softcap=3.0),
]


@needs_tiles
@pytest.mark.parametrize("n", TILE_CASES, ids=str)
def test_tiles_obey_the_rule_in_bf16(n: Packed) -> None:
    given = inputs(n, torch.bfloat16)
    got = run("cpp", n, given)
    checks.assert_same_bits(got, run("cpp:bf16x3", n, given))  # what auto takes
    checks.assert_twice(got, run("torch", n, given), run("torch", n, doubles(given)))


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", TILE_CASES, ids=str)
def test_tiles_err_as_little_as_their_products(n: Packed, dtype: torch.dtype) -> None:
    """Two products one after the other, of 4e-6 each; fp16's own rounding beside it is 3e-4."""
    given = inputs(n, dtype)
    limit = 1e-5 if dtype == torch.float32 else 4e-4
    for got, exact in zip(
        run("cpp:bf16x3", n, given), run("torch", n, doubles(given)), strict=True
    ):
        # Of one key there is no gradient, yet rounding of what cancels: two sums of D products.
        rest = 1e-6 * given[3].double().norm() * n.width**0.5
        assert (got.double() - exact).norm() <= limit * exact.norm() + rest


@in_cpp
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (2, 2)])
def test_cpp_gives_the_same_bits_again_and_on_any_number_of_threads(
    heads: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    """One document is a task for each query head where there are threads for them, many are not."""
    for lengths in ((500,), (60,) * 14):
        n = Packed(lengths, *heads, 48)
        given = inputs(n, dtype)
        checks.assert_steady(lambda n=n, given=given: run(backend, n, given))


@everywhere
@pytest.mark.parametrize("window", [0, 20])
def test_other_documents_change_no_bit(window: int, backend: str) -> None:
    """Whatever they hold, NaN too, and however long they are."""
    n = Packed((130, 300, 41), 4, 2, 32, window)
    given = inputs(n, torch.float32)
    want = [t[130:430] for t in by_token(run(backend, n, given))]
    for value in (3.0, torch.nan):
        changed = [t.clone() for t in given]
        for t in changed:
            t[:130], t[430:] = value, value
        checks.assert_same_bits([t[130:430] for t in by_token(run(backend, n, changed))], want)
    cut = [t[123:471] for t in given]
    shorter = Packed((7, 300, 41), 4, 2, 32, window)
    checks.assert_same_bits([t[7:307] for t in by_token(run(backend, shorter, cut))], want)


@everywhere
def test_later_tokens_change_no_bit(backend: str) -> None:
    n = Packed((400,), 2, 1, 32)
    given = inputs(n, torch.float32)
    o, lse, *_ = run(backend, n, given)
    changed = [t.clone() for t in given]
    for t in changed[:3]:
        t[301:] = 7.0
    again, lse_again, *_ = run(backend, n, changed)
    checks.assert_same_bits([again[:301], lse_again[:, :301]], [o[:301], lse[:, :301]])
    assert not torch.equal(again[301:], o[301:])


@in_cpp
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_reads_views(dtype: torch.dtype, backend: str) -> None:
    """Parts of one fused projection, heads before tokens, D with gaps, expanded."""
    n = Packed((70, 29), 4, 2, 24)
    given = inputs(n, dtype)
    want = run(backend, n, given)
    fused = torch.cat(given[:3], 1)
    parts = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    gapped = [torch.stack([t, t], -1)[..., 0] for t in given]
    for args in ([*parts, given[3]], turned, gapped):
        checks.assert_same_bits(run(backend, n, args), want)
    one = [t[:1].expand(99, -1, -1) for t in given]
    checks.assert_same_bits(run(backend, n, one), run(backend, n, [t.contiguous() for t in one]))


@everywhere
@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("rest", [0, 4])
def test_no_documents(rest: int, lengths: tuple[int, ...], backend: str) -> None:
    n = Packed(lengths, 4, 2, 8, rest=rest)
    given = inputs(n, torch.float32)
    for got, like in zip(by_token(run(backend, n, given)), [0, None, 0, 1, 2], strict=True):
        shape = (rest, 4) if like is None else given[like].shape
        assert got.shape == shape and not got.any()


@in_cpp
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_passes_what_is_not_finite(isa: str, backend: str) -> None:
    """To the tokens that see it, which with a window are not all."""
    n = Packed((300,), 2, 1, 32, window=50)
    q, k, v, do = inputs(n, torch.float32)
    k[40, 0, 3] = torch.nan
    with checks.isa(isa):
        o, lse, *_ = run(backend, n, [q, k, v, do])
    assert o[40:90].isnan().all() and lse[:, 40:90].isnan().all()
    assert o[:40].isfinite().all() and o[300 - 140 :].isfinite().all()


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_keeps_scores_of_any_size(isa: str) -> None:
    """Up to ±1,000 apart: one key has all the weight, and nothing overflows."""
    n = Packed((260,), 2, 1, 32)
    q, k, v, do = inputs(n, torch.float32)
    given = [60 * q, k, v, do]
    with checks.isa(isa):
        got = run("cpp", n, given)
    checks.assert_twice(got, run("torch", n, given), run("torch", n, doubles(given)))


@everywhere
def test_compiles_whole(backend: str) -> None:
    n = Packed((9, 4), 2, 1, 8)
    q, k, v, _ = inputs(n, torch.float32)

    def function(q, k, v, cu_seqlens):
        return varlen_attention(q, k, v, cu_seqlens, backend=backend)[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    checks.assert_same_bits([compiled(q, k, v, n.cu_seqlens)], [function(q, k, v, n.cu_seqlens)])


@backends
def test_goes_with_autocast(backend: str) -> None:
    n = Packed((20, 11), 2, 1, 16)
    given = inputs(n, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, *_ = varlen_attention(*given[:3], n.cu_seqlens, backend=backend)
    want, *_ = varlen_attention(*(t.bfloat16() for t in given[:3]), n.cu_seqlens, backend=backend)
    checks.assert_same_bits([o], [want])


def test_lse_has_no_gradient() -> None:
    n = SMALL[0]
    q, k, v, _ = (t.requires_grad_() for t in inputs(n))
    o, lse = varlen_attention(q, k, v, n.cu_seqlens, backend="torch")
    assert o.requires_grad and not lse.requires_grad


@checks.needs_extension
def test_heads_too_wide_are_the_definitions() -> None:
    assert dispatch.choose("varlen_attention", head_dim=256).backend == "cpp"
    wide = dispatch.choose("varlen_attention", head_dim=264)
    assert (wide.backend, wide.why) == (
        "torch",
        "plain definition; no vendor: tensors are on the CPU; no triton: tensors are on the CPU; "
        "no cpp: heads are 264 wide, over 256",
    )
    n = Packed((5,), 1, 1, 264)
    q, k, v, _ = inputs(n, torch.float32)
    auto = varlen_attention(q, k, v, n.cu_seqlens)
    checks.assert_same_bits(auto, varlen_attention(q, k, v, n.cu_seqlens, backend="torch"))
    with pytest.raises(KernelError, match="heads are 264 wide; backend cpp takes up to 256"):
        varlen_attention(q, k, v, n.cu_seqlens, backend="cpp")


@backends
def test_what_does_not_fit_is_refused(backend: str) -> None:
    n = Packed((5, 4), 4, 2, 8)
    q, k, v, _ = inputs(n, torch.float32)
    cu = n.cu_seqlens

    def refused(message: str, *args, **more) -> None:
        with pytest.raises(KernelError, match=message):
            varlen_attention(*args, backend=backend, **more)

    refused("k \\(9, 2, 8\\), v \\(9, 2, 7\\)", q, k, v[..., :7], cu)
    refused("q is \\(8, 4, 8\\)", q[:8], k, v, cu)
    refused("divide over", q[:, :3], k, v, cu)
    refused("int32 or int64 is wanted", q, k, v, cu.float())
    refused("window is -1", q, k, v, cu, window=-1)
    for wrong in ([0, 5, 4, 9], [1, 9], [0, 10], []):
        refused("must start with 0, never fall and end", q, k, v, torch.tensor(wrong).long())
