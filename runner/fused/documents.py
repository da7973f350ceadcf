"""Which tokens of a micro-batch belong together, told once to all attention layers of a model.

B rows, T tokens of each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from trimpot.runner.fused.classes import renamed

DOCUMENTS = "documents"
"""The argument that carries cu_seqlens from the model to its layers."""
SPLIT = "split_documents"
"""The argument that says that the input is one worker's slice of a row: the row's cu_seqlens."""


def cu_seqlens(position_ids: torch.Tensor | None, rows: int, length: int) -> torch.Tensor:
    """Ends of the documents in B·T tokens, row by row, int64 [documents + 1] with 0 in front.

    A document ends with its row, and where the next position is not one more: so transformers
    tells packed documents apart. Without positions each row is one.
    """
    if position_ids is None:
        return torch.arange(rows + 1) * length
    starts = torch.ones(rows, length, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return torch.nn.functional.pad(
        starts.flatten().nonzero().flatten(), (0, 1), value=rows * length
    )


@functools.cache
def with_documents(original: type) -> type:
    """The class of a model without its head, whose layers attend by document: where neither a
    mask nor a cache of keys decides, no mask is made, and the layers are given cu_seqlens: those
    of the positions, or of `split_documents`."""

    class WithDocuments(original):
        @functools.wraps(original.forward)
        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: Any = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            use_cache: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            given = input_ids if inputs_embeds is None else inputs_embeds
            cached = self.config.use_cache if use_cache is None else use_cache
            cached = cached or past_key_values is not None
            wanted = kwargs.get("output_attentions", self.config.output_attentions)
            if given is not None and attention_mask is None and not cached and not wanted:
                if SPLIT not in kwargs:
                    cuts = cu_seqlens(position_ids, *given.shape[:2])
                    kwargs[DOCUMENTS] = cuts.to(given.device)
                # A mask of four dimensions is taken for one that the caller has made: nothing of
                # size T² comes of it, and the layers do not look at it.
                attention_mask = given.new_empty(1, 1, 1, 0, dtype=torch.int64)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )

    return renamed(WithDocuments, original)
