"""Reads compiled kernels: registers, spills, shared memory, tensor-core instructions, load widths.

NVIDIA: `cuobjdump -res-usage -sass`, which triton ships. Its LOCAL is 0 even for code that spills,
so spills are the STACK bytes and the LDL/STL instructions. AMD: the assembly's own metadata and its
instructions.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:\d+")
_TENSOR = re.compile(r"^(HGMMA|HMMA|IMMA|DMMA|QGMMA|UTC\w*MMA)|^v_(mfma|smfmac)_")
_AMD_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.M)
_AMD_WIDTHS = {
    "dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16,
    "sshort": 16, "ubyte": 8, "sbyte": 8, "byte": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """One kernel as compiled for one target."""

    name: str
    threads: int
    registers: int
    """Per thread; on gfx942 the vector registers, accumulators included."""
    spills: int
    """Bytes of stack plus instructions that read or write it."""
    shared_bytes: int
    tensor_core: dict[str, int]
    """Tensor-core instructions, by the first word of their names."""
    load_bits: dict[int, int]
    """Global loads and asynchronous copies to shared memory: how many of each width."""
    instructions: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Code:
        """From what `as_dict` gave, also after a round trip through JSON."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        load_bits = {int(width): n for width, n in known.pop("load_bits").items()}
        return cls(**known, load_bits=load_bits)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "wide_share": self.wide_share}

    @property
    def wide_share(self) -> float:
        """Of the bits that all loads fetch: those that come 128 or more at a time."""
        bits = sum(width * n for width, n in self.load_bits.items())
        wide = sum(width * n for width, n in self.load_bits.items() if width >= 128)
        return wide / bits if bits else 1.0


def read(kernel: Any) -> Code:
    """What Triton's compiled kernel holds."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel.metadata, disassembled(kernel.asm["cubin"]))
    return _amd(kernel.metadata, kernel.asm["amdgcn"])


@functools.cache
def disassembled(cubin: bytes) -> str:
    """What cuobjdump says; 0.3 s each time, whatever the size, so equal code is asked once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", "-sass", path], capture_output=True, text=True, check=True
        )
    return done.stdout


def _nvidia(metadata: Any, text: str) -> Code:
    usage = _USAGE.search(text)
    assert usage, f"cuobjdump says nothing of {metadata.name}'s registers"
    registers, stack, _ = map(int, usage.groups())
    names = Counter(match[1] for match in _INSTRUCTION.finditer(text))
    local = sum(n for name, n in names.items() if name.startswith(("LDL", "STL")))
    return Code(
        name=metadata.name,
        threads=32 * metadata.num_warps,
        registers=registers,
        spills=stack + local,
        shared_bytes=metadata.shared,
        tensor_core=_tensor_core(names),
        load_bits=_nvidia_widths(names),
        instructions=sum(names.values()),
    )


def _tensor_core(names: Counter[str]) -> dict[str, int]:
    found: Counter[str] = collections.Counter()
    for name, n in names.items():
        if _TENSOR.match(name):
            found["MFMA" if name.startswith("v_") else name.split(".")[0]] += n
    return dict(found)


def _nvidia_widths(names: Counter[str]) -> dict[int, int]:
    found: Counter[int] = collections.Counter()
    for name, n in names.items():
        head, *marks = name.split(".")
        if head not in ("LDG", "LDGSTS"):
            continue
        width = next((m for m in marks if re.fullmatch(r"[US]?(8|16|64|128|256)", m)), "32")
        found[int(width.lstrip("US"))] += n
    return dict(found)


def _amd(metadata: Any, text: str) -> Code:
    def stated(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    names = Counter(_AMD_INSTRUCTION.findall(text))
    loads: Counter[int] = collections.Counter()
    for name, n in names.items():
        if re.match(r"(global|buffer|flat)_load_", name):
            width = next((w for w in _AMD_WIDTHS if w in name.split("_")), None)
            loads[_AMD_WIDTHS[width] if width else 0] += n
    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return Code(
        name=metadata.name,
        threads=64 * metadata.num_warps,
        registers=stated("vgpr_count"),
        spills=sum(map(stated, spills)),
        shared_bytes=stated("group_segment_fixed_size") or metadata.shared,
        tensor_core=_tensor_core(names),
        load_bits=dict(loads),
        instructions=sum(names.values()),
    )
