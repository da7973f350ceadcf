"""Which backend runs an op, and why. Decided before the launch, never by trying and catching.

Every op has the backend "torch": its plain definition, which runs everywhere. It has that name
also where numpy is all the definition needs, so that a plan says the same word for every op.
Before it stand the faster ones, best first: "native" and "cpp" are the C++ extension (for data on
its way to training, and for tensors), "triton" is for GPUs, "vendor" what others made for them.
Each backend has a predicate over the
facts of the call; the first that says yes is taken. Facts, all optional: device ("cpu", "cuda"),
dtype ("float32" …), gemm (what `kernels.cpu_gemm` says of matrix products), head_dim (attention's
D), softcap (attention's), architecture ("sm_90") and flash (which FlashAttention torch calls on
it); op is always there.

No torch here: `trimpot plan` and `trimpot doctor` ask too.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimpot.kernels import native
from trimpot.kernels.errors import BackendError

AUTO = "auto"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What runs: `backend` for `op`. `why` is for people: the log, the journal, the doctor."""

    op: str
    backend: str
    why: str


@dataclass(frozen=True)
class Answer:
    """A predicate's: whether the backend can run on these facts, and the reason either way."""

    runs: bool
    why: str


@dataclass(frozen=True)
class Backend:
    name: str
    judge: Callable[[Facts], Answer]


def _native_pack(_: Facts) -> Answer:
    state = native.state()
    return Answer(state.available, "C++, segment tree" if state.available else state.why)


def _native_hash(_: Facts) -> Answer:
    state = native.state()
    if not state.available:
        return Answer(False, state.why)
    return Answer(True, f"C++, {state.hash_variants[0]}")


DTYPES = ("float32", "bfloat16", "float16")
"""Of tensors that C++ and Triton compute on; float64 is the definition's own."""


def _cpp(facts: Facts) -> Answer:
    state = native.state()
    if not state.available:
        return Answer(False, state.why)
    if (device := facts.get("device", "cpu")) != "cpu":
        return Answer(False, f"tensors are on {device}")
    if (dtype := facts.get("dtype", DTYPES[0])) not in DTYPES:
        return Answer(False, f"tensors are {dtype}")
    return Answer(True, f"C++, {native.extension().gemm_isa()}")


def _cpp_attention(facts: Facts) -> Answer:
    gemm, dtype = facts.get("gemm", AUTO), facts.get("dtype")
    if gemm == "bf16x3":
        return _cpp_gemm(facts)
    if not (answer := _cpp(facts)).runs:
        return answer
    tiles = native.extension().gemm_fast_split()
    low = tiles and gemm != FP32 and dtype in (None, "bfloat16")
    kind = "bf16 with fp32 sums under precision bf16, else fp32" if dtype is None else "bf16x3"
    return Answer(True, f"{answer.why}; {kind if low else FP32}")


ERRORS = {"fp32": "3e-7", "bf16x3": "4e-6", "int16": "1.5e-4", "bf16": "2.9e-3", "int8": "1e-2"}
"""Of a product, in norm, against float64: Gaussian data, 2,048 items of the contraction."""
FP32 = "fp32"


def arithmetics() -> dict[str, str]:
    """{what `kernels.cpu_gemm` may name on this machine: its error}; empty without the C++ core."""
    if not native.state().available:
        return {}
    tiles = native.extension().gemm_fast_split()
    return {n: e for n, e in ERRORS.items() if n != "bf16" and (n != "bf16x3" or tiles)}


def preferred_arithmetic() -> str:
    """What `auto` would try first of bf16 tensors' products on this machine, unmeasured; auto
    itself without the C++ core."""
    if not native.state().available:
        return AUTO
    if native.extension().gemm_fast_split():
        return "bf16x3"
    return "int16" if native.extension().gemm_fast_int16() else FP32


def _with_error(name: str) -> str:
    return FP32 if name == FP32 else f"{name} (error {ERRORS[name]}, bf16: {ERRORS['bf16']})"


def _cpp_gemm(facts: Facts) -> Answer:
    answer = _cpp(facts)
    if not answer.runs:
        return answer
    if facts.get("gemm") == "bf16x3" and not native.extension().gemm_fast_split():
        return Answer(False, "this processor has no AMX tiles of bfloat16")
    return Answer(True, f"{answer.why}; {_arithmetic(facts.get('dtype'), facts.get('gemm', AUTO))}")


def _arithmetic(dtype: str | None, gemm: str) -> str:
    """What a product computes in."""
    if gemm != AUTO:
        return _with_error(gemm)
    extension = native.extension()
    low = _with_error("int16") if extension.gemm_fast_int16() else FP32
    low = "bf16 with fp32 sums" if extension.gemm_fast_split() else low
    if dtype is None:
        return f"{FP32} under precision fp32; under bf16, {low} or torch's own, as measured"
    return FP32 if dtype == "float32" else f"{low} or torch's own, whichever is faster"


def _triton(facts: Facts) -> Answer:
    if (device := facts.get("device", "cpu")) not in ("cuda", "hip"):
        return Answer(False, f"tensors are on the {device.upper()}")
    if importlib.util.find_spec("triton") is None:
        return Answer(False, "triton is not installed; pip install trimpot[gpu]")
    if (op := facts.get("op")) and importlib.util.find_spec(f"{__package__}.triton.{op}") is None:
        return Answer(False, f"{op} has no Triton kernel yet")
    if (dtype := facts.get("dtype", DTYPES[0])) not in DTYPES:
        return Answer(False, f"tensors are {dtype}")
    return Answer(True, "Triton")


def _flash(facts: Facts) -> Answer:
    """FlashAttention through torch."""
    if (device := facts.get("device", "cpu")) != "cuda":
        return Answer(False, f"tensors are on the {device.upper()}")
    dtype = facts.get("dtype")
    if dtype not in (None, *DTYPES[1:]):
        return Answer(False, f"FlashAttention takes bf16 and fp16, tensors are {dtype}")
    if (width := facts.get("head_dim", 8)) % 8:
        return Answer(False, f"heads are {width} wide, no multiple of 8")
    if cap := facts.get("softcap"):
        return Answer(False, f"scores have a soft cap of {cap:g}, torch's FlashAttention none")
    architecture = facts.get("architecture", "sm_80")
    if not architecture.startswith("sm_") or int(architecture[3:]) < 80:
        return Answer(False, f"FlashAttention wants sm_80 or later, the GPU is {architecture}")
    if not (version := facts.get("flash", "FA2")):
        return Answer(False, "this torch was built without FlashAttention")
    what = f"FlashAttention ({version})"
    return Answer(True, what if dtype else f"{what} under precision bf16, else Triton")


def _definition(_: Facts) -> Answer:
    return Answer(True, "plain definition")


WIDEST_HEAD = 256
"""Of attention: in C++ blocks of keys and queries then stay in an L2 cache of 2 MiB, in Triton
their tiles and sums in the registers."""


def _with_heads(judge: Callable[[Facts], Answer]) -> Callable[[Facts], Answer]:
    """`judge`, for heads that are not too wide."""

    def judged(facts: Facts) -> Answer:
        answer, width = judge(facts), facts.get("head_dim", 1)
        if answer.runs and width > WIDEST_HEAD:
            return Answer(False, f"heads are {width} wide, over {WIDEST_HEAD}")
        return answer

    return judged


_TORCH = Backend("torch", _definition)
_TENSOR = (Backend("triton", _triton), Backend("cpp", _cpp), _TORCH)
_GEMM = (Backend("triton", _triton), Backend("cpp", _cpp_gemm), _TORCH)
_ATTENTION = (
    Backend("vendor", _with_heads(_flash)), Backend("triton", _with_heads(_triton)),
    Backend("cpp", _with_heads(_cpp_attention)), _TORCH,
)  # fmt: skip

OPS: dict[str, tuple[Backend, ...]] = {
    "adamw_step": _TENSOR,
    "add_rms_norm": _TENSOR,
    "geglu": _TENSOR,
    "linear_cross_entropy": _GEMM,
    "lora_linear": _GEMM,
    "nf4": _TENSOR,
    "rope": _TENSOR,
    "swiglu": _TENSOR,
    "token_logprobs": _GEMM,
    "varlen_attention": _ATTENTION,
    "content_hash": (Backend("native", _native_hash), _TORCH),
    "pack": (Backend("native", _native_pack), _TORCH),
}
"""Backends of each op, best first. The last one, torch, runs on any facts."""

TRAINING = tuple(op for op, backends in OPS.items() if backends in (_TENSOR, _GEMM, _ATTENTION))
"""Ops on tensors, which a run may choose backends for."""


def choose(op: str, wanted: str = AUTO, **facts: Any) -> Choice:
    """The backend for `op`: the best that runs on `facts`, or the `wanted` one. A C++ matrix
    product carries the arithmetic that was asked for behind a colon: "cpp:int16".

    Raises BackendError for an unknown op or backend, and for a wanted backend that can't run:
    what was asked for is never quietly replaced.
    """
    backends, facts = _backends(op), {**facts, "op": op}
    if wanted != AUTO:
        return _forced(op, wanted, facts)
    refusals: list[str] = []
    for backend in backends:
        answer = backend.judge(facts)
        if answer.runs:
            return Choice(op, _variant(op, backend, facts), "; ".join([answer.why, *refusals]))
        if backend.name == "cpp" and _wants_packs(facts):
            raise BackendError(
                f"cpu_gemm is {facts['gemm']}, and {op} can't run in it: {answer.why}; take auto"
            )
        refusals.append(f"no {backend.name}: {answer.why}")
    raise BackendError(f"no backend of {op} can run: {'; '.join(refusals)}")


def _wants_packs(facts: Facts) -> bool:
    """Whether an arithmetic was asked for that no other backend on a CPU has."""
    return facts.get("gemm") in ("int16", "bf16x3", "int8") and facts.get("device", "cpu") == "cpu"


def _forced(op: str, wanted: str, facts: Facts) -> Choice:
    by_name = {backend.name: backend for backend in _backends(op)}
    if wanted not in by_name:
        raise BackendError(f"{op} has no backend {wanted!r}; it has {', '.join(by_name)}, or auto")
    answer = by_name[wanted].judge(facts)
    if not answer.runs:
        raise BackendError(
            f"{op}: {wanted} was asked for and can't run: {answer.why}; use auto to take what can"
        )
    return Choice(op, _variant(op, by_name[wanted], facts), f"asked for; {answer.why}")


def _variant(op: str, backend: Backend, facts: Facts) -> str:
    gemm = facts.get("gemm", AUTO)
    if backend.name != "cpp" or gemm == AUTO or OPS[op] not in (_GEMM, _ATTENTION):
        return backend.name
    if OPS[op] is _ATTENTION and gemm in ("int16", "int8"):
        return backend.name  # those are of products with frozen weights
    return f"cpp:{gemm}"


def _backends(op: str) -> tuple[Backend, ...]:
    if op in OPS:
        return OPS[op]
    close = difflib.get_close_matches(op, OPS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(available_ops())}"
    raise BackendError(f"there is no op {op!r}; {hint}")


def available_ops() -> list[str]:
    return sorted(OPS)


def table(device: str = "cpu") -> list[Choice]:
    """What `auto` takes on this machine, op by op, for tensors on `device`."""
    return [choose(op, device=device) for op in available_ops()]
