"""AdamW in one pass: against torch's, and its bits on every backend."""

from __future__ import annotations

import math
from typing import Any

import kernel_checks as checks
import pytest
import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import adamw_step as op
from trimpot.kernels.ops.adamw_step import adamw_step

SETTINGS: dict[str, Any] = {
    "lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.37,
}  # fmt: skip
STATES = ("param", "exp_avg", "exp_avg_sq", "copy_out")
backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)]
)


def inputs(
    shape: tuple[int, ...],
    grad: torch.dtype = torch.float32,
    copy: torch.dtype | None = torch.bfloat16,
) -> dict[str, Any]:
    make = torch.Generator().manual_seed(sum(shape))
    p, g, m, v = (torch.randn(shape, generator=make) for _ in range(4))
    copy_out = None if copy is None else torch.zeros(shape, dtype=copy)
    moments = {"exp_avg": m / 100, "exp_avg_sq": v.square() / 1e4}
    return {"param": p, "grad": (g / 100).to(grad), **moments, "copy_out": copy_out}


def stepped(given: dict[str, Any], backend: str, **changed: Any) -> list[torch.Tensor]:
    """Copies of param, exp_avg, exp_avg_sq and copy_out after a step."""
    own = {name: None if t is None else t.clone() for name, t in given.items()}
    adamw_step(**own, **{**SETTINGS, "step": 7, **changed}, backend=backend)
    return [own[name] for name in STATES if own[name] is not None]


@backends
def test_is_torchs_adamw_over_ten_steps(backend: str) -> None:
    given = inputs((50, 7))
    weight = torch.nn.Parameter(given["param"].clone())
    exact = torch.nn.Parameter(given["param"].double())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    theirs = torch.optim.AdamW([weight], **settings, fused=True)
    truth = torch.optim.AdamW([exact], **settings)
    ours, m, v = given["param"].clone(), torch.zeros(50, 7), torch.zeros(50, 7)
    copy = torch.zeros(50, 7, dtype=torch.bfloat16)
    make = torch.Generator().manual_seed(0)
    for step in range(1, 11):
        grad = torch.randn(50, 7, generator=make)
        # A loss scaled by 1024 and a gradient clipped to a norm of 1.
        clip = 1 / grad.norm().item()
        weight.grad, exact.grad = grad * clip, grad.double() * clip
        theirs.step()
        truth.step()
        adamw_step(
            ours, grad * 1024, m, v, copy, lr=1e-2, beta2=0.95, weight_decay=0.1, step=step,
            grad_scale=clip / 1024, backend=backend,
        )  # fmt: skip
    checks.assert_twice([ours], [weight.detach()], [exact.detach()])
    assert torch.equal(copy, ours.bfloat16())


@backends
@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("grad", checks.DTYPES)
def test_obeys_the_rule(grad: torch.dtype, copy: torch.dtype | None, backend: str) -> None:
    given = inputs((3, 101), grad, copy)
    got = stepped(given, backend)
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    exact = op.reference(*(given[n].double() for n in names), **SETTINGS, step=7)
    plain = op.reference(*(given[n] for n in names), **SETTINGS, step=7)
    checks.assert_twice(got[:3], plain, exact)
    if copy is not None:
        assert torch.equal(got[3], got[0].to(copy))


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("grad", checks.DTYPES)
def test_cpp_has_the_bits_of_the_definition(grad: torch.dtype, isa: str) -> None:
    for count in (1, 15, 16, 1000, 40001):
        copy = torch.float16 if count == 1000 else torch.bfloat16
        given = inputs((count,), grad, copy)
        with checks.isa(isa):
            param, *moments, copied = stepped(given, "cpp")
        checks.assert_same_bits(moments, stepped(given, "torch")[1:3])
        # torch's own root may be MKL's, which is off by an ulp at times.
        root = moments[1].double().sqrt().float()
        rate, keep = SETTINGS["lr"] / (1 - 0.9**7), 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
        denominator = root / math.sqrt(1 - 0.95**7) + SETTINGS["eps"]
        want = given["param"] * keep - moments[0] * rate / denominator
        checks.assert_same_bits([param, copied], [want, want.to(copy)])


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_passes_what_is_not_finite(isa: str) -> None:
    given = inputs((4, 16))
    specials = [torch.nan, torch.inf, -torch.inf, 3e38, 1e-40, 0.0]
    for row, name in enumerate(("param", "grad", "exp_avg", "exp_avg_sq")):
        given[name][row, :6] = torch.tensor(specials)
    with checks.isa(isa):
        got = stepped(given, "cpp")
    checks.assert_same_specials(got, stepped(given, "torch"))


@checks.needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_rounds_the_copy_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """Every exponent, ties, numbers that are subnormal in the copy, infinite in it, or NaN."""
    bits = torch.arange(-(2**31), 2**31, 2**15 - 1, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000
    half_ties = (torch.arange(0x3300, 0x4780, dtype=torch.int32) << 16) + 0x1000
    param = torch.cat([bits, ties, half_ties]).view(torch.float32)
    still = torch.zeros_like(param)
    given = {"param": param, "grad": still, "exp_avg": still, "exp_avg_sq": still}
    given["copy_out"] = torch.zeros(param.shape, dtype=dtype)
    with checks.isa(isa):
        got = stepped(given, "cpp", weight_decay=0.0)
    want = param.to(dtype)
    assert torch.equal(got[3].isnan(), want.isnan())
    known = ~want.isnan()
    checks.assert_same_bits([got[3][known]], [want[known]])


@checks.needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_reads_every_gradient(isa: str, dtype: torch.dtype) -> None:
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros(grad.shape)
    given = {"param": zeros, "grad": grad, "exp_avg": zeros, "exp_avg_sq": zeros, "copy_out": None}
    with checks.isa(isa):
        got = stepped(given, "cpp", beta1=0.0, grad_scale=1.0)[1]
    known = ~grad.isnan()
    assert torch.equal(got.isnan(), ~known)
    # exp_avg · 0 + grad: −0 becomes 0.
    checks.assert_same_bits([got[known]], [grad.float()[known] + 0.0])


@checks.needs_extension
def test_cpp_gives_the_same_bits_on_any_number_of_threads() -> None:
    given = inputs((50001,))
    checks.assert_steady(lambda: stepped(given, "cpp"))


@backends
def test_tensors_with_gaps(backend: str) -> None:
    given = inputs((6, 10))
    want = stepped(given, "torch")
    gapped = {
        name: t.t().contiguous().t() if name != "exp_avg" else torch.stack([t, t], -1)[..., 0]
        for name, t in given.items()
    }
    adamw_step(**gapped, **SETTINGS, step=7, backend=backend)
    checks.assert_same_bits([gapped[name] for name in STATES], want)


@backends
@pytest.mark.parametrize("copy", [torch.bfloat16, None])
def test_is_an_op_as_torch_wants_it(copy: torch.dtype | None, backend: str) -> None:
    given = inputs((4, 3), copy=copy)
    scalars = [SETTINGS[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")]
    torch.library.opcheck(op._op, (*given.values(), *scalars, 7, 0.5, backend))


@backends
def test_nothing_to_do(backend: str) -> None:
    assert all(t.numel() == 0 for t in stepped(inputs((0,)), backend))


def test_the_bias_is_corrected_in_the_first_step() -> None:
    """m and v start at 0: whatever the gradient, the first step has the length of lr."""
    given = inputs((100,))
    given |= {"exp_avg": torch.zeros(100), "exp_avg_sq": torch.zeros(100)}
    got = stepped(given, "torch", step=1, weight_decay=0.0, grad_scale=1e3)
    moved = (got[0] - given["param"]).abs()
    assert math.isclose(moved.max().item(), SETTINGS["lr"], rel_tol=1e-3)
    assert math.isclose(moved.min().item(), SETTINGS["lr"], rel_tol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(3).bfloat16()}, r"param is \(3,\) torch.bfloat16; \(3,\) float32"),
        ({"grad": torch.zeros(3).double()}, "grad is .* float32 or bfloat16 or float16 is wanted"),
        ({"exp_avg": torch.zeros(4)}, r"exp_avg is \(4,\)"),
        ({"copy_out": torch.zeros(3)}, "copy_out is .* bfloat16 or float16 is wanted"),
        ({"step": 0}, "step is 0; the first is 1"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = inputs((3,)) | SETTINGS | {"step": 1} | change
    with pytest.raises(KernelError, match=message):
        adamw_step(**given, backend="torch")
