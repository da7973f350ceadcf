"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

Written and read here without importing PEFT; the tests load what is written with PEFT itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.config import AdapterSection
from trimpot.runner.errors import CheckpointError
from trimpot.runner.reading import JSON_BYTES, parse_json, read_bounded

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def peft_name(parameter: str) -> str:
    """`model.layers.0.x.lora_A` → `base_model.model.model.layers.0.x.lora_A.weight`."""
    return f"{PREFIX}{parameter}.weight"


def save_adapter(
    tensors: dict[str, torch.Tensor], adapter: AdapterSection, base: str, folder: Path
) -> None:
    """Write {our parameter name: tensor} as a PEFT adapter; the folder appears whole or not."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed writer left
    partial.mkdir(parents=True)
    write_adapter(tensors, adapter, base, partial)
    replace_folder(partial, folder)


def write_adapter(
    tensors: dict[str, torch.Tensor], adapter: AdapterSection, base: str, folder: Path
) -> None:
    """The two files of a PEFT adapter, into a folder that is there."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise CheckpointError(f"the adapter would be empty: {(empty or ['no tensors'])[0]}")
    named = {peft_name(n): t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    modules = sorted({name.rsplit(".", 2)[-2] for name in tensors})
    text = json.dumps(_config(adapter, modules, base), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one; where that fails, the older one stays."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    replaces = folder.exists()
    if replaces:
        folder.replace(old)
    try:
        partial.replace(folder)
    except OSError:
        if replaces:
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _config(adapter: AdapterSection, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.lora_rank,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def read_adapter(folder: Path) -> tuple[AdapterSection, dict[str, torch.Tensor]]:
    """The adapter in `folder`: its settings, and {our parameter name: tensor}.

    Reads plain LoRA, by whomever it was written. Raises CheckpointError.
    """
    try:
        config = parse_json(read_bounded(folder / CONFIG, JSON_BYTES))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable PEFT adapter: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/{CONFIG} holds no JSON object; copy the adapter again")
    if odd := _beyond_plain(config):
        raise CheckpointError(f"{folder} uses {', '.join(odd)}; a plain LoRA adapter is wanted")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix(PREFIX).removesuffix(".weight")
        if peft_name(ours) != name or not ours.endswith((".lora_A", ".lora_B")):
            raise CheckpointError(f"{folder} holds {name}, which plain LoRA has not")
        if not tensor.numel():
            raise CheckpointError(f"{folder}: {name} is empty, the adapter was not saved whole")
        named[ours] = tensor
    if not named:
        raise CheckpointError(
            f"{folder}/{WEIGHTS} holds no tensors, the adapter was not saved whole"
        )
    try:
        section = AdapterSection(
            lora_rank=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout") or 0.0,
            target_modules=sorted({_layer(name).rpartition(".")[2] for name in named}),
        )
    except (KeyError, ValueError) as error:
        fault = str(error).replace("\n", " ")[:200]
        raise CheckpointError(f"{folder}/{CONFIG} is no LoRA configuration: {fault}") from None
    return section, named


HARMLESS = {
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "auto_mapping", "loftq_config", "eva_config", "ensure_weight_tying",
}  # fmt: skip
"""Keys that change nothing about y = x Wᵀ + scale · (x Aᵀ) Bᵀ once A and B are there."""
INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave W as it was. PiSSA and its like take their start off W."""


def _beyond_plain(config: dict[str, Any]) -> list[str]:
    """What the configuration asks for that LoraLinear does not compute.

    PEFT gets new variants with each release. They are switches (true) or sections (a mapping, a
    list); numbers and texts only tune what a switch turns on.
    """
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')}"]
    odd = [f"bias {config['bias']}"] if config.get("bias", "none") != "none" else []
    if config.get("init_lora_weights", True) not in INITS:
        odd.append(f"init_lora_weights {config['init_lora_weights']}")
    sections = {key for key, value in config.items() if value and isinstance(value, dict | list)}
    switches = {key for key, value in config.items() if value is True}
    return odd + sorted((sections | switches) - HARMLESS - {"init_lora_weights"})


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter in `folder` onto a plain model, in place. Raises CheckpointError."""
    section, tensors = read_adapter(folder)
    put_adapter(model, section, tensors, folder)


def put_adapter(
    model: nn.Module, section: AdapterSection, tensors: dict[str, torch.Tensor], source: Path
) -> None:
    """Put {our parameter name: tensor} onto a plain model, in place.

    The layers are those that the tensors name: `target_modules` of an adapter may be a pattern.
    Raises CheckpointError; the model is then as it was.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({_layer(name) for name in tensors})
    wanted: dict[str, tuple[int, int]] = {}
    for name in names:
        if name not in linears:
            raise CheckpointError(
                f"{source} is no adapter of this model: it adapts {name}, no linear layer here"
            )
        layer = linears[name]
        wanted[f"{name}.lora_A"] = (section.lora_rank, layer.in_features)
        wanted[f"{name}.lora_B"] = (layer.out_features, section.lora_rank)
    for name, shape in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{source} lacks {name}; copy the adapter again")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, and the model wants {shape}"
            )
    add_lora(model, section, seed=0, names=names)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
