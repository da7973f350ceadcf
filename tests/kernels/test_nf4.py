"""4-bit weights: against bitsandbytes, against float64, and their bits on every backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import kernel_checks as checks
import pytest
import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import nf4
from trimpot.kernels.ops.nf4 import Nf4, dequantise, quantise

SHAPES = [(64, 64), (192, 576), (7, 576), (130, 100), (5, 77), (1, 1), (3, 0)]
"""576 · 192 items are 1,728 blocks, 6.75 nested ones; 5 · 77 an odd number of items."""
backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)]
)
either = pytest.mark.parametrize("double_quant", [True, False])


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of different scale, as a trained weight's are."""
    make = torch.Generator().manual_seed(sum(shape))
    rows = torch.rand(shape[0], 1, generator=make) + 0.1
    return (torch.randn(shape, generator=make) * rows / 10).to(dtype)


def parts(q: Nf4) -> list[torch.Tensor]:
    return [q.packed, q.absmax, q.nested_absmax, q.nested_map]


def exact(q: Nf4) -> torch.Tensor:
    """ŵ in float64, item by item as the format says."""
    scales = q.absmax.double()
    if q.double_quant:
        scales = torch.tensor(
            [
                q.nested_map[level].item() * q.nested_absmax[b // 256].item() + q.offset
                for b, level in enumerate(q.absmax.tolist())
            ],
            dtype=torch.float64,
        )
    levels = [n for byte in q.packed.tolist() for n in (byte // 16, byte % 16)]
    items = [nf4.CODE[levels[i]] * scales[i // 64].item() for i in range(math.prod(q.shape))]
    return torch.tensor(items, dtype=torch.float64).view(q.shape)


# --- against bitsandbytes


@either
@backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) % 2 == 0][:4])
def test_writes_what_bitsandbytes_writes(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str, double_quant: bool
) -> None:
    w = weight(shape, dtype)
    ours = quantise(w, double_quant, backend)
    packed, state = bnb.quantize_4bit(w.float(), compress_statistics=double_quant, quant_type="nf4")
    assert torch.equal(ours.packed, packed.flatten())
    if not double_quant:
        assert torch.equal(ours.absmax, state.absmax)
        return
    assert ours.offset == state.offset.item()
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_map, state.state2.code)
    # Its CPU code is off the nearest entry in one of 500 cases, where two are nearly as near.
    plain = quantise(w, False, backend).absmax - ours.offset
    of_block = ours.nested_absmax.repeat_interleave(256)[: plain.numel()]
    ours_off, theirs_off = (
        (ours.nested_map[levels.long()] * of_block - plain).abs()
        for levels in (ours.absmax, state.absmax)
    )
    assert (ours_off <= theirs_off + 1e-9).all()
    assert (ours.absmax != state.absmax).sum() <= 1 + plain.numel() / 100


@either
@backends
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (130, 100)])
def test_reads_what_bitsandbytes_wrote(
    shape: tuple[int, ...], backend: str, double_quant: bool
) -> None:
    packed, state = bnb.quantize_4bit(
        weight(shape), compress_statistics=double_quant, quant_type="nf4"
    )
    none = torch.empty(0)
    nested = (state.state2.absmax, state.state2.code) if double_quant else (none, none)
    offset = state.offset.item() if double_quant else 0.0
    read = Nf4(packed.flatten(), state.absmax, *nested, offset, shape)
    theirs = bnb.dequantize_4bit(packed, state)
    checks.assert_same_bits([dequantise(read, torch.float32, backend)], [theirs])
    # In 16 bits its CPU code rounds more than once.
    for dtype in (torch.bfloat16, torch.float16):
        got = dequantise(read, dtype, backend)
        assert torch.equal(got, theirs.to(dtype))


def test_the_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.CODE), bnb.get_4bit_type("nf4", device="cpu"))


# --- against the formula


@either
@backends
@pytest.mark.parametrize("shape", [(7, 576), (5, 77), (1, 1), (3, 0)])
def test_each_item_is_its_nearest_level(
    shape: tuple[int, ...], backend: str, double_quant: bool
) -> None:
    w = weight(shape).double().flatten()
    q = quantise(w.view(shape).float(), double_quant, backend)
    code = torch.tensor(nf4.CODE, dtype=torch.float64)
    for first in range(0, w.numel(), 64):
        block = w[first : first + 64]
        scaled = block / block.abs().max()
        nearest = (scaled[:, None] - code).abs().amin(1)
        levels = [n for byte in q.packed[first // 2 :][:32].tolist() for n in divmod(byte, 16)]
        taken = code[levels[: block.numel()]]
        assert ((scaled - taken).abs() <= nearest + 1e-6).all()
        if not double_quant:
            assert q.absmax[first // 64] == block.abs().max()


@either
@backends
@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_obeys_the_rule(dtype: torch.dtype, backend: str, double_quant: bool) -> None:
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the definition's own")
    q = quantise(weight((37, 576)), double_quant, "torch")
    truth = exact(q)
    got = dequantise(q, dtype, backend)
    # Rounded once: two roundings of the absmax and one of the product stand before it.
    assert checks.max_error(got, truth) <= 2 * checks.tiny(dtype, truth) + 2e-7 * truth.abs().max()
    plain = dequantise(q, dtype, "torch")
    checks.assert_twice([got], [plain], [truth])


@checks.needs_extension
@either
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_has_the_bits_of_the_definition(
    isa: str, dtype: torch.dtype, double_quant: bool
) -> None:
    for shape in SHAPES:
        w = weight(shape, dtype)
        with checks.isa(isa):
            q = quantise(w, double_quant, "cpp")
            got = [dequantise(q, out, "cpp") for out in checks.DTYPES]
        want = quantise(w, double_quant, "torch")
        assert all(map(torch.equal, parts(q), parts(want))) and q.offset == want.offset
        checks.assert_same_bits(got, [dequantise(want, out, "torch") for out in checks.DTYPES])


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
def test_every_level_of_both_nibbles(isa: str) -> None:
    """All 256 bytes, every entry of the map."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(32)
    absmax = torch.arange(256, dtype=torch.uint8)
    q = Nf4(packed, absmax, torch.tensor([0.7]), nf4.dynamic_map(), 0.9, (256, 64))
    with checks.isa(isa):
        got = dequantise(q, torch.float32, "cpp")
    checks.assert_same_bits([got], [dequantise(q, torch.float32, "torch")])
    assert checks.max_error(got, exact(q)) < 2e-7


INTERPRETED = """
import torch
from trimpot.kernels.proof import interpreter
from trimpot.kernels.ops.nf4 import Nf4, dequantise, quantise
interpreter.enable()
for shape in ((192, 576), (5, 77), (1, 1)):
    for double_quant in (True, False):
        q = quantise(torch.randn(shape), double_quant, "torch")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantise(q, dtype, "triton"), dequantise(q, dtype, "torch"))
q = Nf4(torch.arange(256, dtype=torch.uint8).repeat(32), torch.rand(256), torch.empty(0),
        torch.empty(0), 0.0, (256, 64))
assert torch.equal(dequantise(q, torch.float32, "triton"), dequantise(q, torch.float32, "torch"))
"""


def test_triton_has_the_bits_of_the_definition() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- edges


@either
@backends
def test_blocks_of_zeros_stay_zeros(backend: str, double_quant: bool) -> None:
    """Whatever the quantised absmax makes of theirs; and where no reciprocal is in float32."""
    w = weight((4, 64))
    w[1], w[2] = 0, 1e-39
    got = dequantise(quantise(w, double_quant, backend), torch.float32, backend)
    assert (got[1:3] == 0).all()
    assert (got[0] - w[0]).abs().max() < 0.2 * w[0].abs().max()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    w = weight((4, 64))
    w[2, 3] = value
    with pytest.raises(KernelError, match="not finite"):
        quantise(w)


def test_other_types_are_refused() -> None:
    with pytest.raises(KernelError, match=r"torch\.float64; float32, bf16 or fp16"):
        quantise(torch.zeros(4, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (192, 577)},
        {"absmax": torch.zeros(1727, dtype=torch.uint8)},
        {"absmax": torch.zeros(1728)},
        {"absmax": torch.zeros(1728, dtype=torch.int8)},
        {"nested_absmax": torch.zeros(6)},
        {"nested_map": torch.zeros(255)},
        {"nested_map": torch.zeros(256, dtype=torch.bfloat16)},
        {"packed": torch.zeros(55295, dtype=torch.uint8)},
        {"packed": torch.zeros(2 * 55296, dtype=torch.uint8)[::2]},
    ],
)
def test_parts_that_do_not_go_together(change: dict[str, Any]) -> None:
    q = quantise(weight((192, 576)))
    with pytest.raises(KernelError, match="are wanted"):
        dequantise(replace(q, **change), torch.float32)


@checks.needs_extension
def test_cpp_refuses_what_it_can_not_run() -> None:
    with pytest.raises(KernelError, match=r"not torch\.float64; use torch"):
        dequantise(quantise(weight((4, 64))), torch.float64, "cpp")


def test_bytes_of_a_weight() -> None:
    """0.516 an item; 0.5625 without double quantisation."""
    for double_quant, most in ((True, 0.52), (False, 0.5625)):
        q = quantise(weight((576, 1536)), double_quant)
        own = (q.packed, q.absmax, q.nested_absmax)
        assert sum(t.numel() * t.element_size() for t in own) <= most * 576 * 1536


# --- as torch wants it


@either
@backends
def test_is_an_op_as_torch_wants_it(backend: str, double_quant: bool) -> None:
    q = quantise(weight((6, 100)), double_quant)
    args = (*parts(q), q.offset, list(q.shape), torch.bfloat16, backend)
    torch.library.opcheck(nf4._op, args)


@backends
def test_compiles_whole(backend: str) -> None:
    q = quantise(weight((6, 100)))
    compiled = torch.compile(
        lambda: dequantise(q, torch.float32, backend) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(), dequantise(q, torch.float32, backend) * 2)


@checks.needs_extension
def test_cpp_gives_the_same_bits_on_any_number_of_threads() -> None:
    w = weight((130, 577))

    def run() -> list[torch.Tensor]:
        q = quantise(w, True, "cpp")
        return [q.nested_absmax, dequantise(q, torch.bfloat16, "cpp")]

    checks.assert_steady(run)
