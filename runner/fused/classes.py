"""A forward replaced in one instance alone: its class becomes a subclass of what it was."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def put(module: nn.Module, mixin: type, **settings: Any) -> None:
    """Give the module the mixin's forward, in place. `settings` become its attributes."""
    for name, value in settings.items():
        setattr(module, name, value)
    module.__class__ = _subclass(mixin, type(module))


@functools.cache
def _subclass(mixin: type, original: type) -> type:
    # Of the same name: transformers goes by it when it saves a model or looks for layers. The
    # subclass of a layer is wrapped anew for activation checkpointing, by transformers.
    return renamed(type(original.__name__, (mixin, original), {}), original)


def renamed(made: type, original: type) -> type:
    made.__module__ = original.__module__
    made.__name__, made.__qualname__ = original.__name__, original.__qualname__
    return made
