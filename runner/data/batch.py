"""Samples → the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimpot.runner.data.compile import Compiled

IGNORED = -100
"""Label of a token that is not trained, as torch's cross_entropy has it."""


def collate(data: Compiled, samples: Sequence[int], packed: bool) -> dict[str, torch.Tensor]:
    """input_ids, labels (and position_ids when packed), each int64 [samples, longest].

    Rows are padded on the right, where causal attention never looks, so no attention mask is
    needed. Packed rows carry positions that restart with each document: transformers keeps
    documents apart by them, and the padding is one more document.
    """
    rows = [data.parts(sample) for sample in samples]
    longest = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    position_ids = torch.zeros_like(input_ids)
    for r, row in enumerate(rows):
        at = 0
        for tokens, trained in row:
            ids = torch.from_numpy(tokens.astype("int64"))
            end = at + len(ids)
            input_ids[r, at:end] = ids
            labels[r, at:end] = torch.where(torch.from_numpy(trained).bool(), ids, IGNORED)
            position_ids[r, at:end] = torch.arange(len(ids))
            at = end
        position_ids[r, at:] = torch.arange(longest - at)
    batch = {"input_ids": input_ids, "labels": labels}
    return batch | {"position_ids": position_ids} if packed else batch
