"""Next-token prediction: what one micro-batch's loss is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from trimpot.runner.data.batch import IGNORED, next_tokens
from trimpot.runner.pulse import PULSE


def token_loss_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ over trained tokens of −log p(token | before it), in nats, fp32 scalar.

    A sum, not a mean: what it is divided by is the whole global batch's business (a mean of
    means weighs a token by the company it is in). `model` may be DeepSpeed's engine around one.
    `batch` has labels, which each token's successor is read from, or targets, where that is done.
    """
    PULSE.enter("forward")
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "targets")}
    targets = batch["targets"] if "targets" in batch else next_tokens(batch["labels"])
    if getattr(getattr(model, "module", model), "loss_is_fused", False):
        return model(**inputs, loss_targets=targets)
    logits = model(**inputs).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
