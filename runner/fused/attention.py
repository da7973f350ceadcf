"""Attention layers: q, k, v as one product, their norms and rotation as one op, and then attention
over packed documents, or whatever transformers has been told to use.

B batch, T tokens, H hidden, N heads (of q, or fewer of k and v), D of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimpot.kernels.ops.rope import rope
from trimpot.kernels.ops.varlen_attention import varlen_attention
from trimpot.runner.adapters.lora import project
from trimpot.runner.fused.exchange import Workers, to_heads, to_tokens
from trimpot.runner.fused.norm import NormKind
from trimpot.runner.hub import AttentionCode

OFF = "off"


@dataclass(frozen=True)
class AttentionKind:
    """What differs from family to family."""

    code: AttentionCode
    rope_backend: str
    rotates: bool
    """SmolLM3 leaves every fourth layer without positions."""
    norm: NormKind | None
    """Of q_norm and k_norm, where the op does them."""
    settings: dict[str, Any]
    """Passed on to the attention function: sliding_window, softcap."""
    backend: str = OFF
    """Of varlen_attention, where the layer is told of documents."""
    workers: Workers | None = None
    """Among whom rows are split, where they are."""


class FusedAttention(nn.Module if TYPE_CHECKING else object):
    attention: AttentionKind
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        documents: torch.Tensor | None = None,
        split_documents: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ (output [B, T, H], what the attention function says of its weights).

        documents: cu_seqlens of the B·T tokens, in place of a mask and a cache; split_documents:
        of the whole row that B·T tokens are one worker's slice of (documents.py).
        """
        shape = hidden_states.shape[:-1]
        projected = project([self.q_proj, self.k_proj, self.v_proj], hidden_states)
        q_BTND, k_BTND, v_BTND = (y.view(*shape, -1, self.head_dim) for y in projected)
        q_BNTD, k_BNTD = self._rotated(q_BTND, k_BTND, position_embeddings)
        cuts = documents if split_documents is None else split_documents
        if cuts is not None:
            workers = None if split_documents is None else self.attention.workers
            output = self._by_document(q_BNTD, k_BNTD, v_BTND, cuts, workers)
            return self.o_proj(output.reshape(*shape, -1)), None
        v_BNTD = v_BTND.transpose(1, 2)
        if past_key_values is not None:
            k_BNTD, v_BNTD = past_key_values.update(k_BNTD, v_BNTD, self.layer_idx)
        attend = self.attention.code.function(self.config)
        output, weights = attend(
            self,
            q_BNTD,
            k_BNTD,
            v_BNTD,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.attention.settings,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _by_document(
        self,
        q_BNTD: torch.Tensor,
        k_BNTD: torch.Tensor,
        v_BTND: torch.Tensor,
        cuts: torch.Tensor,
        workers: Workers | None,
    ) -> torch.Tensor:
        """→ [B·T, N, D]"""
        q_TND, k_TND = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTD, k_BNTD))
        v_TND = v_BTND.flatten(0, 1)
        if workers is not None:
            q_TND, k_TND, v_TND = to_heads(q_TND, k_TND, v_TND, workers)
        settings = self.attention.settings
        output, _ = varlen_attention(
            q_TND,
            k_TND,
            v_TND,
            cuts,
            scale=self.scaling,
            window=settings.get("sliding_window") or 0,
            softcap=settings.get("softcap") or 0.0,
            backend=self.attention.backend,
        )
        return output if workers is None else to_tokens(output, workers)

    def _rotated(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, T, N, D] → normed, rotated and transposed to [B, N, T, D]."""
        kind, weights = self.attention, ()
        if kind.norm is not None:
            weights = (self.q_norm.weight, self.k_norm.weight)
        elif hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if not kind.rotates:
            return q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = position_embeddings
        if kind.rope_backend == OFF:
            return kind.code.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        half = cos.shape[-1] // 2  # the table's second half repeats the first
        norm = {} if kind.norm is None else {"eps": kind.norm.eps, "offset": kind.norm.offset}
        q, k = rope(
            q, k, cos[..., :half], sin[..., :half], *weights, backend=kind.rope_backend, **norm
        )
        return q.transpose(1, 2), k.transpose(1, 2)
