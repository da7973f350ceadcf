"""What a model is, read from its config.json and safetensors headers: no torch, no weights."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.runner.errors import ModelError
from trimpot.runner.plan.nf4_files import STATE, quantization_of, unpacked
from trimpot.runner.reading import JSON_BYTES, parse_json, read_bounded

MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
LARGEST = {
    "num_hidden_layers": 4096, "n_layer": 4096, "num_layers": 4096,
    "max_position_embeddings": 1 << 40, "n_positions": 1 << 40,
}  # fmt: skip
LARGEST_SIZE = 1 << 24
"""Of any other size in a config.json; vocabularies have 262,144. What builds a model of absurd
sizes takes all memory before it meets weights that have others."""
CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "gpt2", "openai-gpt")
"""Architectures whose layers are transformers' Conv1D, which is no nn.Linear."""
ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one model. `shapes` is {parameter name: shape}."""

    architecture: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    shapes: dict[str, tuple[int, ...]]
    activation: str = ""
    """Of its feed-forward layers, as config.json names it."""
    family: str = ""
    """The model type that config.json names, of a multimodal model its text part's."""
    dtype: str = ""
    """Of the weights in its files, as config.json names it."""
    quantization: str = ""
    """nf4, where the files hold linear layers so already."""

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest block: what ZeRO-3 gathers at a time, embeddings aside."""
        blocks: dict[str, int] = {}
        for name, shape in self.shapes.items():
            found = re.search(r"\.(\d+)\.", name)
            if found:
                blocks[name[: found.end()]] = blocks.get(name[: found.end()], 0) + math.prod(shape)
        return max(blocks.values(), default=self.parameters // max(1, self.layers))

    def linears(self, targets: str | list[str]) -> dict[str, tuple[int, ...]]:
        """Weights of the linear layers that LoRA adapts: {name: (d_out, d_in)}.

        Experts and their routers are not among them: transformers 5 makes them parameters, not
        nn.Linear.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight")
            in_block = re.search(r"\.\d+\.", name) is not None
            if len(shape) != 2 or module == name or not in_block:
                continue
            if self.architecture in CONV1D or re.search(r"\.experts\.\d+\.", name):
                continue
            block, _, layer = module.rpartition(".")
            if layer in ROUTERS and any(n.startswith(f"{block}.experts.") for n in self.shapes):
                continue
            if targets == "all-linear" or module.rsplit(".", 1)[-1] in targets:
                found[module] = shape
        return found


def read_facts(folder: Path) -> ModelFacts:
    """Facts of the model in a local folder. Raises ModelError."""
    check_whole(folder)
    return facts_from(read_json(folder / "config.json"), read_shapes(folder), str(folder))


def check_whole(folder: Path) -> None:
    """Whether a folder holds a model. transformers takes one with an adapter_config.json for an
    adapter, and loads the model that this names, wherever that is. Raises ModelError."""
    path = folder / "adapter_config.json"
    if os.path.lexists(path):
        raise ModelError(
            f"{path} makes the folder an adapter of another model; give the folder of a whole "
            "model, such as one with the adapter merged"
        )


def facts_from(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str) -> ModelFacts:
    def first(*keys: str, default: int = 0) -> int:
        for key in keys:
            if isinstance(value := text.get(key), int):
                if value <= 0:
                    raise ModelError(
                        f"{name}/config.json: {key} is {value}; one or more is wanted; "
                        "download or save the model again"
                    )
                if value > (most := LARGEST.get(key, LARGEST_SIZE)):
                    raise ModelError(
                        f"{name}/config.json: {key} is over {most}, of which there is no model; "
                        "download or save the model again"
                    )
                return int(value)
        return default

    # Multimodal models keep the language model's shapes in a section of their own.
    section = config.get("text_config")
    text: dict[str, Any] = section if isinstance(section, dict) else config  # pyright: ignore[reportUnknownVariableType]
    heads, hidden = (
        first("num_attention_heads", "n_head", default=1),
        first("hidden_size", "n_embd", "d_model"),
    )
    named = config.get("architectures")
    architectures = [str(n) for n in named] if isinstance(named, list) else []  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if text.get("tie_word_embeddings"):  # some files hold the head all the same
        shapes = {n: shape for n, shape in shapes.items() if n != "lm_head.weight"}
    if not hidden or not config.get("model_type"):
        raise ModelError(
            f"{name}/config.json names no model_type or hidden_size; "
            "a folder saved by transformers' save_pretrained is wanted"
        )
    return ModelFacts(
        architecture=architectures[0] if architectures else str(config["model_type"]),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        layers=first("num_hidden_layers", "n_layer", "num_layers", default=1),
        hidden=hidden,
        intermediate=first("intermediate_size", "n_inner", "d_ff", "ffn_dim", default=4 * hidden),
        heads=heads,
        kv_heads=first("num_key_value_heads", default=heads),
        head_dim=first("head_dim", default=hidden // heads),
        vocab=first("vocab_size"),
        max_positions=first("max_position_embeddings", "n_positions", default=1 << 30),
        shapes=shapes,
        activation=_activation(text),
        family=str(text.get("model_type") or config["model_type"]).removesuffix("_text"),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or ""),
        quantization=quantization_of(config, name),
    )


def _activation(config: dict[str, Any]) -> str:
    given = config.get("hidden_activation") or config.get("hidden_act")
    usual = "gelu_pytorch_tanh" if "gemma" in str(config.get("model_type")) else "silu"
    return str(given or usual)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} over all safetensors files of a model folder."""
    shapes: dict[str, tuple[int, ...]] = {}
    states: dict[str, bytes] = {}
    for path in weight_files(folder):
        shapes |= read_header(path)
        states |= _nf4_states(path)
    return unpacked(shapes, states)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ModelError where one is missing."""
    index = folder / "model.safetensors.index.json"
    files = _index_files(index) if index.is_file() else ["model.safetensors"]
    for path in (folder / file for file in files):
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no file; download or save the model again")
        if not path.is_file():
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
            hint = (
                f"{pickled[0].name} is pickled and is never loaded; convert it to safetensors"
                if pickled
                else "save the model with save_pretrained"
            )
            raise ModelError(f"{path} is not there; {hint}")
    return [folder / file for file in files]


def _index_files(index: Path) -> list[str]:
    """Names of the files that an index spreads the weights over."""
    names = read_json(index).get("weight_map")
    listed: list[Any] = list(names.values()) if isinstance(names, dict) else []  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    files = {name for name in listed if isinstance(name, str)}
    if not files or len(files) < len({str(n) for n in listed}) or not all(map(_is_weights, files)):
        what = "a file outside its folder" if files else "no file in its weight_map"
        raise ModelError(f"{index} names {what}; download or save the model again")
    return sorted(files)


def _is_weights(name: str) -> bool:
    """Whether an index's name is that of a file in its own folder."""
    plain = name == Path(name).name and name.isprintable() and len(name.encode()) <= 255
    return plain and name.endswith(".safetensors")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of one safetensors file (format: 8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ModelError(f"{path} is no safetensors file; download or convert it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: _shape(e) for name, e in header.items()}
            end = max((int(e["data_offsets"][1]) for e in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ModelError(f"{path} has a damaged header; download or convert it again") from None
        if missing := end - (path.stat().st_size - 8 - length):
            what = f"{missing} bytes are missing" if missing > 0 else f"{-missing} bytes too many"
            raise ModelError(f"{path} is not whole ({what}); download or convert it again")
        return shapes


def _shape(entry: dict[str, Any]) -> tuple[int, ...]:
    """Of a header's entry. Raises ValueError for what no tensor has."""
    shape = tuple(map(int, entry["shape"]))
    if (
        shape != tuple(entry["shape"])
        or len(shape) > 16
        or not all(0 <= n < 1 << 48 for n in shape)
    ):
        raise ValueError("no shape of a tensor")
    first, end = entry["data_offsets"]
    if not 0 <= first <= end:
        raise ValueError("no place in a file")
    return shape


def _nf4_states(path: Path) -> dict[str, bytes]:
    """{name: content} of what bitsandbytes says of its weights, in a file that is whole."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header: dict[str, Any] = json.loads(file.read(length))
        found: dict[str, bytes] = {}
        for name, entry in header.items():
            if name.endswith(STATE):
                first, end = map(int, entry["data_offsets"])
                file.seek(8 + length + first)
                found[name] = file.read(max(0, end - first))
        return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_bounded(path, JSON_BYTES).decode())
    except FileNotFoundError:
        raise ModelError(
            f"{path} is not there; a folder saved by transformers' save_pretrained is wanted"
        ) from None
    except (ValueError, UnicodeDecodeError):
        raise ModelError(f"{path} is not valid JSON; download or save the model again") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; download or save the model again")
    return value  # pyright: ignore[reportUnknownVariableType]
