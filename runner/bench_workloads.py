"""What `trimpot bench step` trains: a model of random weights at a named shape, and one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimpot.kernels.bench.shapes import Shape, find_shape
from trimpot.runner.data.batch import IGNORED

if TYPE_CHECKING:
    import torch

DOCUMENTS = (512, 384, 320, 256, 224, 160, 128, 64)
"""Tokens of the packed documents, in 2,048."""
PACKED, FULL = "-packed", "-full"
Method = Literal["lora", "full"]
MODEL_TOKENS = 2048
"""In one batch of a model that is given as a folder."""


@dataclass(frozen=True)
class Workload:
    """`name` as the user gave it ("S", "S-packed", "S-full"), of a folder its last part."""

    name: str
    model: Shape | Path
    tokens: int
    packed: bool
    method: Method

    @property
    def documents(self) -> list[int]:
        if not self.packed:
            return [self.tokens]
        lengths = [n * self.tokens // sum(DOCUMENTS) for n in DOCUMENTS]
        lengths[0] += self.tokens - sum(lengths)
        return lengths


def find_workload(name: str, tokens: int | None) -> Workload:
    """Raises KernelError for a name that is neither a shape's nor a folder's."""
    plain, packed = name.removesuffix(PACKED), name.endswith(PACKED)
    method: Method = "lora"
    if plain.endswith(FULL) and not Path(plain).is_dir():
        plain, method = plain.removesuffix(FULL), "full"
    if (folder := Path(plain)).is_dir():
        named = Path(name).name
        return Workload(named, folder.resolve(), tokens or MODEL_TOKENS, packed, method)
    shape = find_shape(plain)
    return Workload(name, shape, tokens or shape.tokens, packed, method)


def write_model(shape: Shape, folder: Path) -> None:
    """A Llama of this shape with weights as they are before training: normal, σ = 0.02.

    Their values are bfloat16's, as those of most released checkpoints are.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size)
        if len(size) == 1
        else torch.empty(size).normal_(0, 0.02, generator=generator).bfloat16().float()
        for name, size in _sizes(shape)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4 * MODEL_TOKENS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, i, kv = shape.hidden, shape.intermediate, shape.kv_width
    yield "model.embed_tokens.weight", (shape.vocab, h)
    for n in range(shape.layers):
        layer = f"model.layers.{n}"
        yield f"{layer}.self_attn.q_proj.weight", (h, h)
        yield f"{layer}.self_attn.k_proj.weight", (kv, h)
        yield f"{layer}.self_attn.v_proj.weight", (kv, h)
        yield f"{layer}.self_attn.o_proj.weight", (h, h)
        yield f"{layer}.mlp.gate_proj.weight", (i, h)
        yield f"{layer}.mlp.up_proj.weight", (i, h)
        yield f"{layer}.mlp.down_proj.weight", (h, i)
        yield f"{layer}.input_layernorm.weight", (h,)
        yield f"{layer}.post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)


def make_batch(vocabulary: int, documents: list[int]) -> dict[str, torch.Tensor]:
    """One row of random tokens: input_ids, labels, and position_ids where it holds several
    documents, whose first tokens nobody predicts. As `data/batch.py` has it."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, sum(documents)), generator=generator)
    labels = ids.clone()
    if len(documents) == 1:
        return {"input_ids": ids, "labels": labels}
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    labels[positions == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def trained_tokens(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())
