"""Mends for Triton 3.9's interpreter, so that what it computes is what a GPU would.

As shipped it keeps bfloat16 as uint16 bit patterns and computes on the patterns: +, ×, dot and sum
of bf16 are silently wrong. It truncates where a GPU rounds float32 to bf16 to nearest even, runs a
`tf32` dot in full float32, and hands a kernel Python floats (64 bits, no `.to`) where a GPU gets
float32. `enable()` mends all of that in this process, which must have been started with
TRITON_INTERPRET=1. What a GPU does here:

- bf16 and fp16 operands of `tl.dot`: exact products, float32 sums;
- bf16 arithmetic: computed in float32, each result rounded to nearest even;
- a reduction of bf16: kept in float32 and rounded once (a GPU rounds at each step, in an order of
  its own: kernels should widen first);
- float32 operands of a tf32 dot: rounded to 10 bits of fraction, half away from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as shipped
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from trimpot.kernels.errors import BackendError
from trimpot.kernels.triton.launch import interpreted

VERSION = "3.9"

_ON_PATTERNS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
"""Binary operations that are meant to see bits."""

_enabled = False


def enable() -> None:
    """Mends the interpreter of this process; a second call does nothing.

    Raises BackendError where Triton was not told to interpret, or is a version whose interpreter
    these mends don't know.
    """
    global _enabled
    if _enabled:
        return
    if not interpreted() or not knobs.runtime.interpret:
        raise BackendError("TRITON_INTERPRET is not 1; set it before Python starts")
    if not triton.__version__.startswith(VERSION):
        raise BackendError(
            f"the interpreter's mends know triton {VERSION}, this is {triton.__version__}; "
            f"install triton=={VERSION}.0"
        )
    _mend_arithmetic()
    _mend_casts()
    _mend_dot()
    for operation in (shipped.ReduceOps, shipped.ScanOps):
        operation.apply_impl = _on_widened(operation.apply_impl)
    shipped._implicit_cvt = _float_as_float32(shipped._implicit_cvt)
    _enabled = True


def widen(pattern: np.ndarray) -> np.ndarray:
    """float32 values of bf16 bit patterns (uint16)."""
    return (np.ascontiguousarray(pattern).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) of values, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):  # NaN patterns may wrap; they are replaced
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def as_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the 10 bits of fraction that a tensor core looks at (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _up(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle(widen(handle.data).reshape(handle.data.shape), tl.float32)


def _down(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data).reshape(handle.data.shape), tl.bfloat16)


def _mend_arithmetic() -> None:
    builder: Any = InterpreterBuilder
    binary, unary, ternary, fma, rsqrt = (
        builder.binary_op,
        builder.unary_op,
        builder.ternary_op,
        builder.create_fma,
        builder.create_rsqrt,
    )

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if op in _ON_PATTERNS or not (_is_bf16(lhs) or _is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        out = op(_up(lhs).data, _up(rhs).data)
        if out.dtype == np.bool_:
            return TensorHandle(out, tl.int1)
        return _down(TensorHandle(out, tl.float32))

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _down(unary(self, _up(arg), op)) if _is_bf16(arg) else unary(self, arg, op)

    def ternary_op(
        self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any
    ) -> TensorHandle:
        if op is np.where or not _is_bf16(c):
            return ternary(self, a, b, c, op)
        return _down(ternary(self, _up(a), _up(b), _up(c), op))

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return _down(fma(self, _up(x), _up(y), _up(z))) if _is_bf16(z) else fma(self, x, y, z)

    def create_rsqrt(self: Any, arg: TensorHandle) -> TensorHandle:
        return _down(rsqrt(self, _up(arg))) if _is_bf16(arg) else rsqrt(self, arg)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_rsqrt = create_fma, create_rsqrt


def _mend_casts() -> None:
    builder: Any = InterpreterBuilder
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return cast(self, src, dst_type)
        if source == tl.bfloat16:
            return _up(src) if target == tl.float32 else cast(self, _up(src), dst_type)
        if target == tl.bfloat16:
            return _down(TensorHandle(src.data.astype(np.float32), tl.float32))
        return cast(self, src, dst_type)

    def create_fp_to_fp(
        self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any
    ) -> TensorHandle:
        to_bf16 = src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16
        if to_bf16 and rounding_mode != shipped._ir.ROUNDING_MODE.RTZ:
            return _down(src)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _mend_dot() -> None:
    builder: Any = InterpreterBuilder
    dot = builder.create_dot

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: Any
    ) -> TensorHandle:
        if precision == shipped._ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a = TensorHandle(as_tf32(a.data), tl.float32)
            b = TensorHandle(as_tf32(b.data), tl.float32)
        return dot(self, _up(a), _up(b), d, precision, imprecise)

    builder.create_dot = create_dot


def _on_widened(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan that sees bf16 as float32, and rounds what comes out."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        narrow_again = [_is_bf16(tensor.handle) for tensor in inputs]
        if not any(narrow_again):
            return apply(self, inputs)
        wide = tuple(_widened(self, t) if _is_bf16(t.handle) else t for t in inputs)
        out = apply(self, wide)
        out = list(out) if isinstance(out, (list, tuple)) else [out]
        for i, was_bf16 in enumerate(narrow_again):
            if was_bf16 and out[i].dtype == tl.float32:
                out[i] = _rounded(out[i])
        return out

    return apply_impl


def _widened(operation: Any, tensor: Any) -> Any:
    return operation.to_tensor(_up(tensor.handle).data, tl.float32)


def _rounded(tensor: Any) -> Any:
    handle = _down(tensor.handle)
    shape = list(handle.data.shape)
    kind = tl.block_type(tl.bfloat16, shape) if tensor.type.is_block() else tl.bfloat16
    return tl.core.tensor(handle, kind)


def _float_as_float32(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, float):
            handle = TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(arg)

    return implicit_cvt
