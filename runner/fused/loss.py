"""Output layer and loss in one: the logits of a micro-batch are never whole.

B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimpot.kernels.ops.linear_cross_entropy import linear_cross_entropy
from trimpot.runner.data.batch import IGNORED
from trimpot.runner.fused.classes import renamed


class FusedHead(nn.Linear if TYPE_CHECKING else object):
    """The output layer. Its own module computes the loss, so that ZeRO-3 has its weight whole."""

    loss_backend: str
    loss_softcap: float

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V] of h [B, T, H]; with labels [B, T] the summed loss of their tokens."""
        if labels is None:
            return super().forward(input)
        return linear_cross_entropy(
            input,
            self.weight,
            labels,
            ignore_index=IGNORED,
            softcap=self.loss_softcap,
            backend=self.loss_backend,
        )


@functools.cache
def with_loss(original: type) -> type:
    """The model's class with one more argument: `loss_targets` [B, T] asks for the summed loss of
    predicting each of them at its place, in place of the logits."""

    class WithLoss(original):
        loss_is_fused = True

        @functools.wraps(original.forward)  # generate() reads the arguments off the signature
        def forward(
            self, *args: Any, loss_targets: torch.Tensor | None = None, **kwargs: Any
        ) -> Any:
            if loss_targets is None:
                return super().forward(*args, **kwargs)
            hidden_BTH = self.base_model(*args, **kwargs).last_hidden_state
            return self.get_output_embeddings()(hidden_BTH, labels=loss_targets)

    return renamed(WithLoss, original)


@torch.no_grad()
def head_is_plain(model: Any) -> bool:
    """Whether the logits are the output layer's of the last hidden state, and nothing else: told
    by the numbers of two tokens."""
    training = model.training
    model.eval()
    try:
        ids = torch.tensor([[1, 0]], device=next(model.parameters()).device)
        hidden = getattr(model.base_model(input_ids=ids), "last_hidden_state", None)
        if hidden is None:
            return False
        return torch.equal(model(input_ids=ids).logits, model.get_output_embeddings()(hidden))
    finally:
        model.train(training)
