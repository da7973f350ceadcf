"""Errors of the kernels floor: what is, what was wanted, what to do. They pickle.

This floor may not import the runner's errors, so they carry the same exit code by themselves.
"""

from __future__ import annotations


class KernelError(ValueError):
    """An argument that an op can't take: its shape, its type, its range."""

    exit_code = 2


class BackendError(KernelError):
    """A backend was asked for that does not exist or can't run here."""
