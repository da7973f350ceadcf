"""The shapes that are benched, and the calls of each op that one of them stands for. No torch.

S is SmolLM-135M's, M has the widths of Llama-3.2-1B, T is for trying things out.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from trimpot.kernels.errors import KernelError

RANK = 16
"""Of LoRA in every benched call."""


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama-like model, and the tokens that go through it at once."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int
    layers: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.head_dim * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's seven matrices."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("T", 256, 512, 4, 2, 4096, 256, 2),
        Shape("S", 576, 1536, 9, 3, 49152, 2048, 30),
        Shape("M", 2048, 8192, 32, 8, 128256, 2048, 4),
        Shape("llama3-8b", 4096, 14336, 32, 8, 128256, 8192, 32),
        Shape("llama3-70b", 8192, 28672, 64, 8, 128256, 8192, 80),
    )
}

OPS = (
    "lora_linear",
    "linear_cross_entropy",
    "token_logprobs",
    "add_rms_norm",
    "rope",
    "varlen_attention",
    "swiglu",
    "geglu",
    "adamw_step",
)


@dataclass(frozen=True)
class Call:
    """One call of an op: `outs` are the siblings' widths of a LoRA linear, else empty."""

    op: str
    case: str
    shape: Shape
    width: int = 0
    outs: tuple[int, ...] = ()


def find_shape(name: str) -> Shape:
    """Raises KernelError for a name that is not in SHAPES."""
    if name in SHAPES:
        return SHAPES[name]
    raise KernelError(_unknown("shape", name, tuple(SHAPES)))


def calls(op: str, shape: Shape) -> list[Call]:
    """What a decoder layer of `shape` asks of `op`. Raises KernelError for an unknown op."""
    if op not in OPS:
        raise KernelError(_unknown("op", op, OPS))
    h, i, kv = shape.hidden, shape.intermediate, shape.kv_width
    if op == "lora_linear":
        return [
            Call(op, "qkv", shape, h, (h, kv, kv)),
            Call(op, "o", shape, h, (h,)),
            Call(op, "gate_up", shape, h, (i, i)),
            Call(op, "down", shape, i, (h,)),
        ]
    if op == "varlen_attention":
        return [Call(op, case, shape, shape.head_dim) for case in ("causal", "packed")]
    width = {"swiglu": i, "geglu": i, "rope": shape.head_dim}.get(op, h)
    case = {
        "linear_cross_entropy": "frozen_head",
        "token_logprobs": "frozen_head",
        "add_rms_norm": "residual",
        "rope": "qk",
        "adamw_step": "layer",
    }.get(op, "mlp")
    return [Call(op, case, shape, width)]


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f"there is no {what} {name!r} to bench; {hint}"
