"""Whether two models say the same: their logits on real tokens, and their weights bit for bit.

T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trimpot.runner.data.compile import load_splits
from trimpot.runner.errors import ExportError

SEQUENCES, TOKENS = 4, 128
"""At most 512 tokens: with 128k words in the vocabulary their logits take 260 MB."""


Logits = list[torch.Tensor]
"""fp32 [T, V] of each sequence."""


def check_sequences(run: Path, vocabulary: int) -> tuple[list[torch.Tensor], str]:
    """(token ids, each int64 [1, T], what they are): held-out samples of the run, else training
    samples, else random."""
    splits = load_splits(run / "data")
    for data, what in ((splits and splits[1], "held-out"), (splits and splits[0], "training")):
        if data is not None and len(data):
            documents = [data.parts(i)[0][0][:TOKENS] for i in range(min(SEQUENCES, len(data)))]
            return [torch.from_numpy(ids.astype("int64"))[None] for ids in documents], what
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (1, TOKENS), generator=draw) for _ in range(SEQUENCES)]
    return ids, "random"


def logits_of(model: nn.Module, sequences: list[torch.Tensor]) -> Logits:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in sequences]


def distance(found: Logits, exact: Logits) -> float:
    """max |found - exact| / max |exact|; infinite where either is not finite."""
    if not _finite(found, exact):
        return math.inf
    scale = max(float(logits.abs().max()) for logits in exact)
    error = max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))
    return error / max(scale, 1e-30)


def rms_distance(found: Logits, exact: Logits) -> float:
    """‖found - exact‖ / ‖exact‖; infinite where either is not finite.

    For half precision, where the largest error is that of one odd token, and a matter of luck.
    """
    if not _finite(found, exact):
        return math.inf
    scale = sum(float(logits.double().square().sum()) for logits in exact)
    error = sum(float((a - b).double().square().sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(error / max(scale, 1e-30))


def _finite(*models: Logits) -> bool:
    return all(bool(logits.isfinite().all()) for model in models for logits in model)


@dataclass
class Reference:
    """What an exported model is held to: fp32 logits of base + adapter on the run's own tokens."""

    sequences: list[torch.Tensor]
    what: str
    """held-out | training | random"""
    exact: Logits
    scores: dict[str, float] = field(default_factory=dict)
    """Of the verdict; errors are in parts of the logits' scale."""

    def __post_init__(self) -> None:
        self.scores["tokens"] = float(sum(ids.shape[1] for ids in self.sequences))

    def score(
        self, model: nn.Module, name: str, measure: Callable[[Logits, Logits], float] = distance
    ) -> float:
        self.scores[name] = measure(logits_of(model, self.sequences), self.exact)
        return self.scores[name]

    def demand(self, error: float, limit: float, who: str) -> None:
        """Raises ExportError where an error is over its limit."""
        if not error <= limit:
            raise ExportError(
                f"{who} has logits that are {error:.1e} of their scale away from those of base + "
                f"adapter, over the {limit:.1e} allowed; nothing is written"
            )


def fingerprints(model: nn.Module) -> dict[str, str]:
    """{parameter: digest of its shape, dtype and bytes}, so that two models can be compared
    without holding both."""
    return {name: _digest(parameter) for name, parameter in model.named_parameters()}


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(flat)
    return digest.hexdigest()
