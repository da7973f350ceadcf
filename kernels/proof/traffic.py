"""Counts what kernels move, and finds what they must not do, under the interpreter.

    with counting() as launches:
        forward(x, ...)             # the wrapper, on CPU tensors
    sum(launch.unique_bytes for launch in launches)

Unique bytes: each element of memory counts once per launch for reading and once for writing. That
is what must cross the memory bus if the cache keeps everything inside a launch and nothing between
launches: the lower bound of HBM traffic. Total bytes: each load and store counts the distinct
addresses that it touches; total over unique is how often the L2 cache is asked again.

Faults, as lines of text: an access past the memory of a launch's tensors (dropped, not run); two
programs writing one element; one program reading what another writes; one store writing an element
twice. A masked load without `other` gives NaN (integers: −1) in masked lanes instead of the
interpreter's zero, since on a GPU they are undefined: use of them shows in the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as shipped
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from trimpot.kernels.proof import interpreter

_NOBODY, _MANY = 0, -1
"""Marks in the maps of readers and writers, beside a program's number (1 and up)."""


@dataclass
class Moved:
    """What one launch read and wrote of one tensor's memory; bytes."""

    name: str
    start: int
    """Address, as is `end`."""
    end: int
    granule: int
    """Bytes of an element: the unit of the maps."""
    read_total: int = 0
    written_total: int = 0
    read_unique: int = 0
    written_unique: int = 0
    readers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    writers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)


@dataclass
class Counted:
    """One launch."""

    kernel: str
    programs: int = 0
    flops: int = 0
    """Of dots; a multiplication and an addition count as two."""
    tensors: list[Moved] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def unique_bytes(self) -> int:
        return sum(t.read_unique + t.written_unique for t in self.tensors)

    @property
    def total_bytes(self) -> int:
        return sum(t.read_total + t.written_total for t in self.tensors)


_running: Counted | None = None


@contextlib.contextmanager
def counting() -> Iterator[list[Counted]]:
    """Launches inside are counted; the list has one entry for each that has ended."""
    interpreter.enable()
    done: list[Counted] = []
    builder: Any = InterpreterBuilder
    changed: list[tuple[Any, str, Any]] = []

    def change(where: Any, name: str, make: Any) -> None:
        changed.append((where, name, getattr(where, name)))
        setattr(where, name, make(getattr(where, name)))

    change(builder, "create_masked_load", _counted_load)
    change(builder, "create_masked_store", _counted_store)
    change(builder, "create_atomic_rmw", _counted_atomic)
    change(builder, "create_dot", _counted_dot)
    change(GridExecutor, "_init_args_hst", _noting_tensors)
    change(GridExecutor, "__call__", lambda call: _counted_call(call, done))
    try:
        yield done
    finally:
        for where, name, original in changed:
            setattr(where, name, original)


def _counted_call(call: Any, done: list[Counted]) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _running
        _running = Counted(self.fn.__name__)
        try:
            returned = call(self, *args, **kwargs)
            _close(_running)
            done.append(_running)
        finally:
            _running = None
        return returned

    return counted


def _close(launch: Counted) -> None:
    launch.programs = int(np.prod(shipped.interpreter_builder.grid_dim))
    for moved in launch.tensors:
        moved.read_unique = int(np.count_nonzero(moved.readers)) * moved.granule
        moved.written_unique = int(np.count_nonzero(moved.writers)) * moved.granule
        moved.readers = moved.writers = np.zeros(0, np.int32)


def _noting_tensors(init: Any) -> Any:
    """After the launch's tensors are on the host: where the memory of each begins and ends."""

    def noting(self: Any, args: Any, kwargs: Any) -> Any:
        on_host, named_on_host = init(self, args, kwargs)
        if _running is not None:
            named = [*zip(self.arg_names, on_host, strict=False), *named_on_host.items()]
            _running.tensors = _extents(named)
        return on_host, named_on_host

    return noting


def _extents(named: list[tuple[str, Any]]) -> list[Moved]:
    """One entry per storage, from the lowest to the highest address that its views reach."""
    by_storage: dict[int, Moved] = {}
    for name, value in named:
        value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        start = value.data_ptr()
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
        end = start + reach * value.element_size()
        known = by_storage.get(value.untyped_storage().data_ptr())
        if known is None:
            moved = Moved(name, start, end, value.element_size())
            by_storage[value.untyped_storage().data_ptr()] = moved
        else:
            known.start, known.end = min(known.start, start), max(known.end, end)
            known.granule = min(known.granule, value.element_size())
    for moved in by_storage.values():
        elements = -(-(moved.end - moved.start) // moved.granule)
        moved.readers, moved.writers = np.zeros(elements, np.int32), np.zeros(elements, np.int32)
    return sorted(by_storage.values(), key=lambda moved: moved.start)


def _program() -> int:
    (x, y, z), (_, ny, nz) = (
        shipped.interpreter_builder.grid_idx,
        shipped.interpreter_builder.grid_dim,
    )
    return (x * ny + y) * nz + z + 1


def _access(pointers: TensorHandle, mask: TensorHandle, reads: bool, writes: bool) -> np.ndarray:
    """Notes one access of `_running`; the mask without the lanes that leave every tensor."""
    launch = _running
    allowed = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    if launch is None:
        return allowed
    size = max(1, shipped._get_np_dtype(pointers.get_element_ty()).itemsize)
    addresses = pointers.data.astype(np.int64)
    inside = np.zeros_like(allowed)
    for moved in launch.tensors:
        here = allowed & (addresses >= moved.start) & (addresses + size <= moved.end)
        if not here.any():
            continue
        inside |= here
        elements = (addresses[here] - moved.start) // moved.granule
        if size > moved.granule:
            elements = (elements[:, None] + np.arange(size // moved.granule)).ravel()
        _note(launch, moved, elements, reads, writes)
    out = allowed & ~inside
    if out.any():
        what = "store" if writes else "load"
        launch.faults.append(
            f"{launch.kernel}: {what} of program {_program() - 1}: {int(out.sum())} lanes are out "
            f"of bounds, {_nearest(launch, int(addresses[out][0]))}"
        )
    return inside


def _nearest(launch: Counted, address: int) -> str:
    if not launch.tensors:
        return "there is no tensor"
    near = min(launch.tensors, key=lambda t: max(t.start - address, address - t.end))
    return f"the first {address - near.start} B from the start of {near.name}"


def _note(launch: Counted, moved: Moved, elements: np.ndarray, reads: bool, writes: bool) -> None:
    program, atomic = _program(), reads and writes
    distinct = np.unique(elements)
    if reads:
        moved.read_total += distinct.size * moved.granule
        others = moved.readers[distinct]
        moved.readers[distinct] = np.where(
            (others == _NOBODY) | (others == program), program, _MANY
        )
    if writes:
        moved.written_total += distinct.size * moved.granule
        if not atomic and distinct.size < elements.size:
            launch.faults.append(f"{launch.kernel}: one store writes {moved.name} twice")
    if atomic:
        moved.writers[distinct] = _MANY
        return
    racing = _foreign(moved.writers[distinct], program)
    if writes:
        racing |= _foreign(moved.readers[distinct], program)
        moved.writers[distinct] = program
    if racing.any():
        launch.faults.append(
            f"{launch.kernel}: program {program - 1} {'writes' if writes else 'reads'} "
            f"{int(racing.sum())} elements of {moved.name} that another program uses or writes"
        )


def _foreign(owners: np.ndarray, program: int) -> np.ndarray:
    return (owners != _NOBODY) & (owners != program)


def _counted_load(load: Any) -> Any:
    def counted(self: Any, ptrs: Any, mask: Any, other: Any, policy: Any, volatile: Any) -> Any:
        inside = _access(ptrs, mask, reads=True, writes=False)
        loaded = load(self, ptrs, TensorHandle(inside, tl.int1), other, policy, volatile)
        if other is None and not inside.all():
            loaded.data[~inside] = _poison(loaded)
        return loaded

    return counted


def _poison(handle: TensorHandle) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return np.uint16(0x7FC0)
    if handle.data.dtype.kind == "f":
        return np.nan
    return True if handle.data.dtype.kind == "b" else np.array(-1).astype(handle.data.dtype)


def _counted_store(store: Any) -> Any:
    def counted(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        inside = _access(ptrs, mask, reads=False, writes=True)
        return store(self, ptrs, value, TensorHandle(inside, tl.int1), policy)

    return counted


def _counted_atomic(atomic: Any) -> Any:
    def counted(self: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        inside = _access(ptr, mask, reads=True, writes=True)
        return atomic(self, op, ptr, val, TensorHandle(inside, tl.int1), sem, scope)

    return counted


def _counted_dot(dot: Any) -> Any:
    def counted(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if _running is not None:
            _running.flops += 2 * int(d.data.size) * a.data.shape[-1]
        return dot(self, a, b, d, precision, imprecise)

    return counted
