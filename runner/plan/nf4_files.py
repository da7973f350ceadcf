"""How bitsandbytes writes a 4-bit weight into safetensors, as far as shapes go: no torch.

x.weight                                     uint8 [⌈n/2⌉, 1], two items a byte
x.weight.absmax                              uint8, or float32 without double quantisation
x.weight.nested_absmax, .nested_quant_map    float32, with double quantisation
x.weight.quant_map                           float32 [16]
x.weight.quant_state.bitsandbytes__nf4       uint8: JSON with the shape and the offset
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trimpot.runner.errors import ModelError

NF4 = "nf4"
STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
BLOCK, NESTED_BLOCK = 64, 256
AGAIN = "quantise the model again with bitsandbytes' defaults, or give the unquantised one"


@dataclass(frozen=True)
class Stored:
    """What the state of one weight says."""

    shape: tuple[int, ...]
    double_quant: bool
    offset: float


def quantization_of(config: dict[str, Any], name: str) -> str:
    """ "nf4" of a config.json whose weights bitsandbytes has quantised so, else "".

    Raises ModelError for its other formats. What else may be quantised is transformers' business.
    """
    section: Any = config.get("quantization_config")
    if not isinstance(section, dict):
        return ""
    said: dict[str, Any] = {str(k): v for k, v in section.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if said.get("quant_method") != "bitsandbytes":
        return ""
    kind = said.get("bnb_4bit_quant_type", "fp4") if said.get("load_in_4bit") else "int8"
    storage = said.get("bnb_4bit_quant_storage", "uint8")
    if kind != NF4 or storage != "uint8":
        raise ModelError(
            f"{name} was quantised by bitsandbytes to {kind} in {storage}; nf4 in uint8 can be "
            f"trained on; {AGAIN}"
        )
    return NF4


def read_state(raw: bytes, name: str) -> Stored:
    """The state of weight `name`. Raises ModelError."""
    try:
        said: dict[str, Any] = json.loads(raw)
        shape = tuple(map(int, said["shape"]))
        double = "nested_offset" in said
        blocks = (said["blocksize"], said.get("nested_blocksize", NESTED_BLOCK))
        stored = Stored(shape, double, float(said.get("nested_offset", 0.0)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(
            f"{name}{STATE} is no state of a 4-bit weight; download or convert the model again"
        ) from None
    if said.get("quant_type") != NF4 or blocks != (BLOCK, NESTED_BLOCK) or len(shape) != 2:
        raise ModelError(
            f"{name} is {said.get('quant_type')} of shape {list(shape)} in blocks of "
            f"{blocks[0]}, {blocks[1]}; nf4 matrices in blocks of {BLOCK}, {NESTED_BLOCK} can be "
            f"trained on; {AGAIN}"
        )
    return stored


def unpacked(
    shapes: dict[str, tuple[int, ...]], states: dict[str, bytes]
) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of tensors in a file: packed ones as the weights that they stand for."""
    real = dict(shapes)
    for state, raw in states.items():
        weight = state.removesuffix(STATE)
        real[weight] = read_state(raw, weight).shape
        for part in (*PARTS, STATE):
            real.pop(f"{weight}{part}", None)
    return real


def bytes_of(items: int, double_quant: bool) -> int:
    """What a weight of so many items takes in NF4."""
    blocks = -(-items // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) if double_quant else 4 * blocks
    return -(-items // 2) + scales
