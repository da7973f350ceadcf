"""Figures of the chaos suite: tests count, `make chaos` prints the sums."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.fixture
def draw() -> random.Random:
    """The same numbers for the same CHAOS_SEED."""
    return random.Random(SEED)


@pytest.fixture
def count() -> Callable[..., None]:
    """`count(crash_states=5000)` adds to the figures that `make chaos` prints."""

    def add(**figures: float) -> None:
        if path := os.environ.get("CHAOS_FIGURES"):
            with Path(path).open("a") as file:
                file.write(json.dumps(figures) + "\n")

    return add
