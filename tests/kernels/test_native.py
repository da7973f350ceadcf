"""The door to the extension: when it is shut, and that it says why."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimpot.kernels import native


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRIMPOT_NATIVE", raising=False)
    native.state.cache_clear()
    yield
    monkeypatch.undo()
    native.state.cache_clear()


def test_the_switch_shuts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMPOT_NATIVE", "0")
    assert native.state() == native.State(False, "TRIMPOT_NATIVE=0 is set")


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimpot.kernels._native", None)
    monkeypatch.setitem(sys.modules, "trimpot.kernels._native_absent", None)
    state = native.state()
    assert not state.available
    assert state.why == "the extension is not built; install trimpot with pip to build it"


def test_the_build_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = types.ModuleType("trimpot.kernels._native_absent")
    absent.WHY = "no working C++ compiler was found"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trimpot.kernels._native", None)
    monkeypatch.setitem(sys.modules, "trimpot.kernels._native_absent", absent)
    assert native.state() == native.State(False, "no working C++ compiler was found")


def test_a_broken_file_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"not an ELF file")
    monkeypatch.delitem(sys.modules, "trimpot.kernels._native", raising=False)
    monkeypatch.setattr(native, "_NAME", "_native")
    monkeypatch.syspath_prepend(str(tmp_path))
    state = native.state()
    assert not state.available
    assert state.why.startswith("the extension does not load: ")
    assert "\n" not in state.why


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("trimpot.kernels._native")
    other.interface = native.INTERFACE + 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trimpot.kernels._native", other)
    state = native.state()
    assert not state.available
    assert f"these sources want {native.INTERFACE}; install trimpot again" in state.why


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="Linux tells in /proc/cpuinfo")
def test_cpu_features_are_those_that_linux_lists() -> None:
    state = native.state()
    if not state.available:
        pytest.skip(state.why)
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    listed = {
        word
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for word in line.partition(":")[2].split()
    }
    # Linux's own names for the same: Documentation/arch/x86/cpuinfo.rst, arm64/elf_hwcaps.rst.
    names = {
        "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx512vnni": "avx512_vnni",
        "avx512fp16": "avx512_fp16", "avx512bf16": "avx512_bf16", "avxvnni": "avx_vnni",
        "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
        "neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp",
    }  # fmt: skip
    known = [
        "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "avx", "f16c", "fma", "avx2", "bmi2",
        "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni", "avx512fp16", "avx512bf16",
        "avxvnni", "amx-tile", "amx-int8", "amx-bf16",
        "neon", "fp16", "dotprod", "sve", "sve2", "i8mm", "bf16", "sme",
    ]  # fmt: skip
    assert set(state.cpu_features) == {name for name in known if names.get(name, name) in listed}
