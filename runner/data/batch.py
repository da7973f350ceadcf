"""Samples → the tensors of one micro-batch: padded rows, or one row that nothing is padded in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from trimpot.runner.data.compile import Compiled

Batch = dict[str, torch.Tensor]
IGNORED = -100
"""Label of a token that is not trained, as torch's cross_entropy has it."""


def collate(data: Compiled, samples: Sequence[int], packed: bool) -> Batch:
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


def join(data: Compiled, samples: Sequence[int]) -> Batch:
    """input_ids, labels, position_ids, each int64 [1, tokens of all samples together].

    One document stands after the other, whatever sample it is of, without padding: for models
    that attend by document. Others would make a mask of tokens².
    """
    parts = [part for sample in samples for part in data.parts(sample)]
    ids = torch.from_numpy(np.concatenate([tokens for tokens, _ in parts]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([trained for _, trained in parts])).bool()
    # A document's first token is never trained, so none is predicted from the document before.
    labels = torch.where(trained, ids, IGNORED)
    positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in parts])
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}


def slice_of(row: Batch, rank: int, size: int) -> Batch:
    """Slice `rank` of `size` equal ones of what `join` made: input_ids, targets, position_ids
    [1, t], and split_documents, cu_seqlens of the whole row.

    Labels become targets before the cut: a slice's last token predicts the next one's first.
    The last slice may end with some tokens, fewer than `size`, that belong to no document.
    """
    tokens = row["input_ids"].shape[1]
    each = -(-tokens // size)
    targets = next_tokens(row["labels"])
    whole = {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
    padded = {key: pad(x, (0, each * size - tokens)) for key, x in whole.items()}
    padded["targets"] = pad(targets, (0, each * size - tokens), value=IGNORED)
    starts = (row["position_ids"][0] == 0).nonzero().flatten()
    own = slice(rank * each, (rank + 1) * each)
    cut = {key: x[:, own].contiguous() for key, x in padded.items()}
    return cut | {"split_documents": pad(starts, (0, 1), value=tokens)}


def next_tokens(labels_BT: torch.Tensor) -> torch.Tensor:
    """What is to be predicted at each place → [B, T]: the label after it, none after the last."""
    return pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
