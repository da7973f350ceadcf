"""What FlashAttention a GPU has: torch's own, or a later one that is installed beside it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)

OWN = "FA2"
"""What torch is built with."""
LATER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
"""{compute capability, its first digit: (torch's name of an implementation for it, its module)}"""


@functools.cache
def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What `dispatch.choose` wants to know of a GPU; nothing of another device."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return {"architecture": properties.gcnArchName.split(":")[0]}
    there = torch.backends.cuda.is_flash_attention_available()
    return {
        "architecture": f"sm_{properties.major}{properties.minor}",
        "flash": version(properties.major) if there else "",
    }


@functools.cache
def version(major: int) -> str:
    """The implementation that torch calls on GPUs of this compute capability.

    A later one than torch's own, where it is installed, is put in place for the whole process,
    unless the process has chosen one itself. One that can't be used is named with its reason.
    """
    name, module = LATER.get(major, (OWN, ""))
    if current_flash_attention_impl() is not None or name not in list_flash_attention_impls():
        return current_flash_attention_impl() or OWN
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module) is not None:
            try:
                activate_flash_attention_impl(name)
            except (ImportError, RuntimeError) as error:  # of another version than torch wants
                return f"{OWN}, since {name} can't be used: {error}"
    return current_flash_attention_impl() or OWN
