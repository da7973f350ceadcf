"""Freed memory stays with the process, or does not: counted in page faults and at the peak, in
processes of their own."""

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


LAYERS = """
import re, torch
from pathlib import Path
from trimpot.kernels import heap
def peak():  # in kB; ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
assert heap.keep_freed_memory()
if {give_back}:
    assert heap.give_back_freed_memory()
begin = peak()
kept = []
for layer in range(20):  # each wants somewhat more than the hole that the one before has left
    passing = torch.empty((12 << 18) + layer * 4096).fill_(1)
    kept.append(torch.empty(2 << 18).fill_(1))
    del passing
print(peak() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory on request")
def test_what_is_given_back_leaves_no_holes() -> None:
    """20 × 2 MiB stay and 12 MiB pass by at a time; kept, the holes are 20 × 12 MiB."""
    peaks = []
    for give_back in (False, True):
        command = [sys.executable, "-c", LAYERS.format(give_back=give_back)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 70 * 1024 < 200 * 1024 < peaks[0]
