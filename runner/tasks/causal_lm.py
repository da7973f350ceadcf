"""Next-token prediction: what one micro-batch's loss is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from trimpot.runner.data.batch import IGNORED


def token_loss_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ over trained tokens of −log p(token | before it), in nats, fp32 scalar.

    A sum, not a mean: what it is divided by is the whole global batch's business (a mean of
    means weighs a token by the company it is in). `model` may be DeepSpeed's engine around one.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if getattr(getattr(model, "module", model), "loss_is_fused", False):
        return model(**inputs, loss_labels=batch["labels"])
    labels = batch["labels"][:, 1:]
    logits = model(**inputs).logits[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
