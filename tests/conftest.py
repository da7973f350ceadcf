"""Shared by all tests: offline, quiet, one tiny pretrained model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "true",
}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "chaos")]

CACHE = Path(__file__).parent.parent / ".cache"


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of a 1–2M-parameter Llama, pretrained on the standard library's documentation."""
    from tiny import tiny_model

    return tiny_model(CACHE)
