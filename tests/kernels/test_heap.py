"""Freed memory stays with the process: counted in page faults, in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from trimpot.kernels.heap import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
torch.set_num_threads(1)
def step():
    blocks = [torch.empty(mib << 18).fill_(1) for mib in (5, 40, 100)]
for _ in range(8):  # until the heap has grown
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory on request")
def test_a_step_finds_the_memory_of_the_last_one() -> None:
    assert 10 * faults(keep=True) < faults(keep=False)
