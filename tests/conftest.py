"""Shared by all tests: offline, quiet, one tiny pretrained model."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Any]:
    """An S3 server of this module's own, found through the environment."""
    from s3_server import running

    with pytest.MonkeyPatch.context() as patch, running(patch) as server:
        yield server


@pytest.fixture
def bucket(s3_server: Any) -> str:
    """A new bucket of it; what the server notes begins anew."""
    name = f"bucket-{secrets.token_hex(4)}"
    s3_server.client().create_bucket(Bucket=name)
    s3_server.requests.clear()
    return name


@pytest.fixture(autouse=True)
def no_pool() -> Iterator[None]:
    """What a test has set for its process, by a training in it, ends with it."""
    from trimpot.kernels import heap

    heap._Pool.on = False
    yield
    heap._Pool.on = False
