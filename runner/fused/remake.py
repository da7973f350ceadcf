"""Activations that cost less to make again than to keep: autograd holds what they are made of.

A norm's output and a gate's are read once more in backward, by the linear layers behind them, and
what they come of is kept anyway. Making them again is 1 % of a step at S (SmolLM-135M, 2,048
tokens) and saves 17 MB of 65 a layer. `products` are the outputs of gate and up too, another 25 MB,
for a product a layer (Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models", make others again). The same functions make them, so no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

Make = Callable[[], torch.Tensor]
Produce = Callable[[torch.Tensor], list[torch.Tensor]]


class Remaking:
    """A layer's forward runs inside. What is remembered stays alive until then: its address tells
    it from others."""

    def __init__(self, products: bool):
        self.products = products
        self.known: dict[int, tuple[torch.Tensor, Make]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, had_again)

    def __enter__(self) -> None:
        self.token = _active.set(self)
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        _active.reset(self.token)
        self.known.clear()

    def make_of(self, tensor: torch.Tensor) -> Make | None:
        found, make = self.known.get(tensor.untyped_storage().data_ptr(), (None, None))
        if found is None or found.numel() != tensor.numel() or found.dtype != tensor.dtype:
            return None
        return make

    def keep(self, saved: torch.Tensor) -> Any:
        make = self.make_of(saved)
        return saved if make is None else (make, saved.shape)


_active: ContextVar[Remaking | None] = ContextVar("remaking", default=None)


def to_keep(saved: torch.Tensor) -> Any:
    """What autograd is to hold of a tensor: for hooks in a layer, which hide the layer's own."""
    remaking = _remaking()
    return saved if remaking is None else remaking.keep(saved)


@torch.no_grad()
def had_again(kept: Any) -> torch.Tensor:
    """What `to_keep` was given."""
    if isinstance(kept, torch.Tensor):
        return kept
    make, shape = kept
    return make().view(shape)


def _remaking() -> Remaking | None:
    return None if torch.compiler.is_compiling() else _active.get()


def remember(tensor: torch.Tensor, make: Make) -> None:
    """`make` gives the same values again from tensors that are kept anyway."""
    remaking = _remaking()
    if remaking is not None and tensor.is_contiguous():
        remaking.known[tensor.untyped_storage().data_ptr()] = (tensor.detach(), make)


def produced(produce: Produce, x: torch.Tensor) -> tuple[list[torch.Tensor], list[Make]]:
    """produce(x), and how each output is had again."""
    remaking = _remaking()
    if remaking is None or not remaking.products:
        outputs = produce(x)
        return outputs, [_Kept(output.detach()) for output in outputs]
    state = torch.get_rng_state()
    outputs = produce(x)
    again = _Again(produce, remaking.make_of(x) or _Kept(x.detach()), state)
    makes = [again.output(i) for i in range(len(outputs))]
    for output, make in zip(outputs, makes, strict=True):
        remember(output, make)
    return outputs, makes


class _Kept:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class _Again:
    """Outputs that are made together, once for all who read them. They go with the last of those:
    autograd drops what a node has saved when the node is done."""

    def __init__(self, produce: Produce, x: Make, state: torch.Tensor):
        self.produce, self.x, self.state = produce, x, state
        self.made: list[torch.Tensor] | None = None

    def output(self, i: int) -> Make:
        return lambda: self._outputs()[i]

    def _outputs(self) -> list[torch.Tensor]:
        if self.made is None:
            with torch.random.fork_rng(devices=[]):  # seeds of dropout come of torch's generator
                torch.set_rng_state(self.state)
                self.made = self.produce(self.x())
        return self.made


def pays(layer: Any) -> bool:
    """Not where the whole layer is made again, where nothing is kept, where the compiler, which
    takes no such hooks, decides, or where autocast, which is over by then, chose the types."""
    whole = getattr(layer, "gradient_checkpointing", False) and layer.training
    if whole or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
