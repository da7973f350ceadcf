"""Tests of Triton kernels that are interpreted. Triton decides when it is imported whether it
interprets, so a file's functions named interpreted_* run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_interpreted(file: str) -> None:
    """Passes if all of the file's interpreted_* do."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, "-o", "python_functions=interpreted_*", file],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def mended() -> None:
    """The interpreter computes as a GPU does. For import into such a file."""
    from trimpot.kernels.triton import launch

    if launch.interpreted():
        from trimpot.kernels.proof import interpreter

        interpreter.enable()
