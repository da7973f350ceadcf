"""AdamW on the op adamw_step: one pass over memory, where torch's own takes several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trimpot.kernels.ops.adamw_step import adamw_step
from trimpot.runner.types import Plan


def make_optimizer(plan: Plan, parameters: list[nn.Parameter]) -> AdamW | TorchAdamW:
    """Ours where the plan has a kernel for it, torch's own otherwise."""
    optim, groups = plan.config.optim, _groups(plan, parameters)
    settings = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps}
    backend = plan.kernels.get("adamw_step", {"backend": "off"})["backend"]
    if backend in ("off", "torch"):
        return TorchAdamW(groups, **settings)
    return AdamW(groups, **settings, backend=backend)


def _groups(plan: Plan, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Weight decay on matrices only: on norms and biases it has nothing to regularise."""
    decay = plan.config.optim.weight_decay
    if not decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    # ZeRO-3 has flattened its parameters; ds_shape keeps what they were.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
    rest = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [(matrices, decay), (rest, 0.0)]
    return [{"params": part, "weight_decay": value} for part, value in groups if part]


class TorchAdamW(torch.optim.AdamW):
    """torch's own, whose update can be refused; see `AdamW.refuses`."""

    refuses: Callable[[], bool] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.refuses is not None and self.refuses():
            return None
        return super().step(closure)  # pyright: ignore[reportArgumentType, reportReturnType]


class AdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, state names included: DeepSpeed and checkpoints go by them.

    Parameters are fp32, as DeepSpeed's masters are.
    """

    refuses: Callable[[], bool] | None = None
    """Asked at the beginning of each step, where it is set: true leaves weights and moments
    untouched."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        backend: str = "auto",
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.backend = backend

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if self.refuses is not None and self.refuses():
            return None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    self._update(parameter, gradient, group)
        return loss

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        adamw_step(
            parameter,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            backend=self.backend,
        )
