"""Gradients that are summed in the same order at every number of workers: `deterministic: true`.

A sum of floating-point numbers depends on its order, and an all-reduce's order on who takes part.
Here each micro-batch's gradient is computed apart and added in fp32 as ((g₀ + g₁) + g₂) + …, in
the order of the micro-batches' numbers. Micro-batch j is computed in round j div L by lane j mod L
(`deal`), so that within a round this is the order of ranks. Where P' workers share each row, each
one's gradient of its own tokens is a term of its own.

Each of P workers owns a slice of the flat gradient. After each round's backward an all-to-all
brings it the round's terms of its slice, which it adds; after the last one an all-gather brings
everyone the whole sum. All workers then clip and step alike. Per step a worker sends
(P − 1)/P · N · (rounds · bytes of a gradient + 4) bytes, N the trained parameters; a ring
all-reduce sends (P − 1)/P · N · 2 · bytes of a gradient.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from trimpot.runner.config import Config

ALIGNED = 64
"""Elements that slices are a multiple of: no vector register lies across two."""


def fix_arithmetic(config: Config) -> None:
    """Let nothing but the numbers decide a run's bits, before the model is built.

    Sums of torch and its libraries are cut by the number of threads; on GPUs some operations add
    in the order in which threads arrive.
    """
    if not config.deterministic:
        return
    torch.set_num_threads(config.fleet.cpus_per_worker)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It costs, and finds bugs only.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


class InOrder:
    """The gradients of `parameters`, all of one type, at ZeRO stage 0. `masters`: the fp32 tensors
    that the optimizer steps, the parameters themselves in fp32. Every worker must call alike."""

    def __init__(self, parameters: list[nn.Parameter], masters: list[torch.Tensor]):
        self.parameters, self.masters = parameters, masters
        self.world = dist.get_world_size()
        self.sizes = [parameter.numel() for parameter in parameters]
        size = -(-sum(self.sizes) // (self.world * ALIGNED)) * ALIGNED
        first = parameters[0]
        self.own = torch.zeros(self.world * size, dtype=first.dtype, device=first.device)
        """This worker's gradient: backward adds to it, through its views."""
        self.terms = torch.empty_like(self.own) if self.world > 1 else self.own
        self.sum = torch.zeros(size, device=first.device)
        """fp32, of this worker's slice, over the rounds so far."""
        for parameter, gradient in zip(parameters, self._views(self.own), strict=True):
            parameter.grad = gradient

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def clear(self) -> None:
        """Before each backward: one micro-batch's gradient is to stand alone."""
        self.own.zero_()

    def add(self, workers: int) -> None:
        """After it: add those of the first `workers` ranks; the others had no micro-batch left."""
        if self.world > 1:
            dist.all_to_all_single(self.terms, self.own)
        for term in self.terms.view(self.world, -1)[:workers]:
            self.sum += term  # to fp32, which is exact

    def gather(self, max_norm: float | None) -> float:
        """Give everyone the whole sum, clipped, and begin a new one → its norm before clipping."""
        whole = self.sum
        if self.world > 1:
            whole = torch.empty(self.world * len(self.sum), device=self.sum.device)
            dist.all_gather_into_tensor(whole, self.sum)
        else:
            whole = whole.clone()
        self.sum.zero_()
        gradients = self._views(whole)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if max_norm is not None and norm > max_norm:
            whole *= max_norm / (norm + 1e-6)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights by what was gathered."""
        optimizer.step()
        views = self._views(self.own)
        for parameter, master, own in zip(self.parameters, self.masters, views, strict=True):
            if master is not parameter:
                master.grad = None
                parameter.data.copy_(master.data)
            parameter.grad = own
