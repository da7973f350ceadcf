"""varlen_attention in Triton, interpreted: against torch's definition in float64 (which
test_varlen_attention.py holds to plain softmax and torch's sdpa), and against itself."""

from __future__ import annotations

import interpreted
import kernel_checks as checks
import pytest
import torch
from attention_cases import Packed, by_token, doubles, inputs, run

pytest.importorskip("triton")

from trimpot.kernels import dispatch
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops.varlen_attention import varlen_attention
from trimpot.kernels.proof.limits import SHARED_BYTES, TARGETS
from trimpot.kernels.triton import varlen_attention as backend

mended = interpreted.mended
every_dtype = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)

CASES = [
    Packed((1,), 1, 1, 32),
    Packed((5, 0, 1, 40, 0, 0, 13), 4, 1, 64, rest=3),
    Packed((127, 128, 129), 1, 1, 32),  # a tile ± 1
    Packed((150, 30), 1, 1, 96, window=37),
    Packed((300,), 1, 1, 64, window=130),  # queries that see nothing of a tile they share
    Packed((50,), 2, 1, 128, window=1),
    Packed((90,), 1, 1, 256, window=64, softcap=20.0),
    Packed((70, 9), 2, 2, 72, softcap=5.0, rest=20),
    Packed((60, 61), 8, 1, 7),
    Packed((70,), 2, 1, 16, scale=-0.3),
    Packed((40,), 1, 1, 16, scale=0.0),
]


def test_under_the_interpreter() -> None:
    """The rest of this file, in a process where Triton interprets."""
    interpreted.run_interpreted(__file__)


@every_dtype
@pytest.mark.parametrize("n", CASES, ids=str)
def interpreted_obeys_the_rule(n: Packed, dtype: torch.dtype) -> None:
    given = inputs(n, dtype)
    got, plain = run("triton", n, given), run("torch", n, given)
    # Of one key torch's weight is exactly 1; ours has the rounding of s, 32 products summed twice,
    # where 2 units in the last place of s were seen.
    units = 4 * float(plain[1].abs().max()) if n.lengths == (1,) else 0.5
    checks.assert_twice(got, plain, run("torch", n, doubles(given)), units)


@pytest.mark.parametrize("target", sorted(backend.TILES))
@pytest.mark.parametrize("width", [64, 128, 256])
def interpreted_every_tile_obeys_the_rule(
    width: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other GPUs than the one whose tiles are taken where none is."""
    monkeypatch.setattr(backend, "architecture", lambda _: target)
    n = Packed((1, 80), 1, 1, width, window=70)
    for dtype in (torch.bfloat16, torch.float32):
        given = inputs(n, dtype)
        got = run("triton", n, given)
        checks.assert_twice(got, run("torch", n, given), run("torch", n, doubles(given)))


@pytest.mark.parametrize("window", [0, 20])
def interpreted_other_documents_change_no_bit(window: int) -> None:
    """Whatever they hold, NaN too, and however long they are."""
    n = Packed((70, 150, 41), 2, 1, 32, window)
    given = inputs(n, torch.float32)
    want = [t[70:220] for t in by_token(run("triton", n, given))]
    for value in (3.0, torch.nan):
        changed = [t.clone() for t in given]
        for t in changed:
            t[:70], t[220:] = value, value
        checks.assert_same_bits([t[70:220] for t in by_token(run("triton", n, changed))], want)
    shorter = Packed((7, 150), 2, 1, 32, window, rest=5)
    got = by_token(run("triton", shorter, [t[63:225] for t in given]))
    checks.assert_same_bits([t[7:157] for t in got], want)


def interpreted_later_tokens_change_no_bit() -> None:
    n = Packed((200,), 2, 1, 32)
    given = inputs(n, torch.float32)
    o, lse, *_ = run("triton", n, given)
    changed = [t.clone() for t in given]
    for t in changed[:3]:
        t[151:] = 7.0
    again, lse_again, *_ = run("triton", n, changed)
    checks.assert_same_bits([again[:151], lse_again[:, :151]], [o[:151], lse[:, :151]])
    assert not torch.equal(again[151:], o[151:])


def interpreted_gives_the_same_bits_again_without_races() -> None:
    """Nothing is read or written outside of the tensors either, and nothing is left unwritten."""
    from trimpot.kernels.proof.traffic import counting

    n = Packed((130, 0, 1, 40), 4, 2, 40, window=50, softcap=9.0, rest=9)
    given = inputs(n, torch.bfloat16)
    with counting() as launches:
        first = run("triton", n, given)
    assert [fault for one in launches for fault in one.faults] == []
    assert all(t.isfinite().all() for t in first)
    assert all((t[171:] == 0).all() for t in by_token(first))
    checks.assert_same_bits(run("triton", n, given), first)


def interpreted_reads_views() -> None:
    """Parts of one fused projection, heads before tokens, D with gaps, expanded."""
    n = Packed((15, 14), 4, 2, 24)
    given = inputs(n, torch.bfloat16)
    want = run("triton", n, given)
    fused = torch.cat(given[:3], 1)
    parts = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    gapped = [torch.stack([t, t], -1)[..., 0] for t in given]
    for args in ([*parts, given[3]], turned, gapped):
        checks.assert_same_bits(run("triton", n, args), want)
    one = [t[:1].expand(29, -1, -1) for t in given]
    whole = [t.contiguous() for t in one]
    checks.assert_same_bits(run("triton", n, one), run("triton", n, whole))


@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("rest", [0, 4])
def interpreted_no_documents(rest: int, lengths: tuple[int, ...]) -> None:
    n = Packed(lengths, 4, 2, 8, rest=rest)
    given = inputs(n, torch.float32)
    for got in by_token(run("triton", n, given)):
        assert got.shape[0] == rest and not got.any()


def interpreted_many_documents_are_found() -> None:
    """More than are looked through at once."""
    n = Packed((3, *(0,) * 257, 1, 20), 1, 1, 16)
    given = inputs(n, torch.float32)
    got = run("triton", n, given)
    checks.assert_twice(got, run("torch", n, given), run("torch", n, doubles(given)))


def interpreted_passes_what_is_not_finite() -> None:
    """To the tokens that see it, which with a window are not all."""
    n = Packed((300,), 2, 1, 32, window=50)
    q, k, v, do = inputs(n, torch.float32)
    k[40, 0, 3] = torch.nan
    o, lse, *_ = run("triton", n, [q, k, v, do])
    assert o[40:90].isnan().all() and lse[:, 40:90].isnan().all()
    assert o[:40].isfinite().all() and o[90:].isfinite().all()


def interpreted_keeps_scores_of_any_size() -> None:
    """Up to ±1,000 apart: one key has all the weight, and nothing overflows."""
    n = Packed((130,), 2, 1, 32)
    q, k, v, do = inputs(n, torch.float32)
    given = [60 * q, k, v, do]
    got, plain = run("triton", n, given), run("torch", n, given)
    # A weight has the rounding of its score, which is summed once more in backward.
    checks.assert_twice(got, plain, run("torch", n, doubles(given)), float(plain[1].abs().max()))


def interpreted_a_wrong_list_on_a_gpu_leaves_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read on the host there; what is outside of the tensors is not touched."""
    from trimpot.kernels.proof.traffic import counting

    monkeypatch.setattr(backend, "boundaries", lambda *_: None)
    n = Packed((20, 30), 2, 1, 16)
    q, k, v, do = inputs(n, torch.float32)
    for wrong in ([0, 30, 10, 50], [-7, 20, 90], [40, 60], [0, 2**31 + 5]):
        cuts = torch.tensor(wrong)
        with counting() as launches:
            o, lse = backend.forward(q, k, v, cuts, 0.3, 0, 0.0)
            backend.backward(do, q, k, v, o, lse, cuts, 0.3, 0, 0.0)
        outside = [f for one in launches for f in one.faults if "out of bounds" in f]
        assert outside == [], wrong


def interpreted_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = inputs(Packed((5, 4), 4, 2, 8), torch.float32)
    for wrong in ([0, 5, 4, 9], [1, 9], [0, 10], []):
        with pytest.raises(KernelError, match="must start with 0, never fall and end"):
            varlen_attention(q, k, v, torch.tensor(wrong).long(), backend="triton")
    q, k, v, _ = inputs(Packed((5,), 1, 1, 264), torch.float32)
    with pytest.raises(KernelError, match="264 wide; backend triton takes up to 256; use torch"):
        varlen_attention(q, k, v, torch.tensor([0, 5]), backend="triton")


def interpreted_compiles_whole() -> None:
    n = Packed((9, 4), 2, 1, 8)
    q, k, v, _ = inputs(n, torch.float32)

    def function(q, k, v, cu_seqlens):
        return varlen_attention(q, k, v, cu_seqlens, backend="triton")[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    checks.assert_same_bits([compiled(q, k, v, n.cu_seqlens)], [function(q, k, v, n.cu_seqlens)])


def test_needs_a_gpu_or_the_interpreter() -> None:
    n = Packed((3,), 1, 1, 8)
    q, k, v, _ = inputs(n, torch.float32)
    with pytest.raises(BackendError, match="it runs on a GPU"):
        varlen_attention(q, k, v, n.cu_seqlens, backend="triton")


def test_is_taken_on_a_gpu() -> None:
    gpu = {"device": "cuda", "dtype": "float32"}
    taken = dispatch.choose("varlen_attention", head_dim=256, **gpu)
    assert taken.backend == "triton" and taken.why.startswith("Triton; no vendor: FlashAttention")
    wide = dispatch.choose("varlen_attention", head_dim=264, **gpu)
    assert wide.backend == "torch"
    assert "no triton: heads are 264 wide, over 256" in wide.why


@pytest.mark.parametrize(
    ("architecture", "table"),
    [
        ("sm_80", "sm_80"), ("sm_87", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100"),
        ("sm_103", "sm_100"), ("sm_86", "sm_89"), ("sm_89", "sm_89"), ("sm_120", "sm_89"),
        ("sm_75", "sm_89"), ("gfx942", "gfx942"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"),
    ],
)  # fmt: skip
def test_every_gpu_has_tiles(architecture: str, table: str) -> None:
    assert backend.family(architecture) == table


def test_the_tables_are_whole() -> None:
    """And keys and values of all stages fit in shared memory."""
    room = {**SHARED_BYTES, "sm_89": 99 << 10}
    assert set(backend.TILES) == {*TARGETS, "sm_89"}
    for target, tiles in backend.TILES.items():
        assert set(tiles) == {(size, width) for size in (2, 4) for width in (64, 128, 256)}
        for (size, width), of_kernels in tiles.items():
            for queries, keys, stages, threads in of_kernels:
                held = size * width * min(queries, keys) * 2 * (1 if target == "gfx942" else stages)
                assert held <= room[target] and threads in (128, 256)
