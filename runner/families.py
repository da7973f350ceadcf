"""Families of models whose layers are known, by transformers' names. No torch: plans read it."""

from __future__ import annotations

FAMILIES = ("gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3", "smollm3")
SANDWICHED = ("gemma2", "gemma3")
"""With norms behind attention and the feed-forward layer too."""
NORMED_HEADS = ("gemma3", "qwen3")
"""With norms of q and k."""
