"""The one door to DeepSpeed: start it, step it, and reach its state by parameter name.

Nothing is compiled at run time: `shm_comm` (66 CPU-seconds, serves inference only) is declared
absent, and the optimizer is torch's own or ours. DeepSpeed's checkpoints are not used: they are
pickled
and tied to the world size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trimpot.runner.fused.exchange import Workers
from trimpot.runner.in_order import InOrder
from trimpot.runner.optimizer import AdamW, TorchAdamW, make_optimizer
from trimpot.runner.pulse import PULSE
from trimpot.runner.types import Plan

State = dict[str, dict[str, torch.Tensor]]
"""{parameter name: {"weight" | "exp_avg" | "exp_avg_sq": fp32 tensor of the parameter's shape}}."""
Share = dict[str, tuple[int, dict[str, torch.Tensor]]]
"""What one worker holds of it: {name: (first element, {key: fp32 [elements], flattened})}."""
ReadWhole = Callable[[str, str], torch.Tensor]
"""(parameter name, key) → fp32 tensor of the parameter's shape, from a checkpoint."""
ReadPart = Callable[[str, str, int, int], torch.Tensor]
"""(parameter name, key, start, stop) → elements start … stop − 1 of it, flattened."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Judge = Callable[[float], str]
"""Norm of a step's gradient → why it must not be followed, or ""."""


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration of a plan."""
    optim = plan.config.optim
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        # DeepSpeed wants this product. It knows of no workers that share a row, and none that
        # repeat a micro-batch at weight 0.
        "train_batch_size": plan.micro_batch_size
        * plan.gradient_accumulation_steps
        * plan.world_size,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_optimization": plan.zero,
        "bf16": {"enabled": plan.config.precision == "bf16"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # ours; its state is that of torch's AdamW
        "steps_per_print": 1 << 40,
    }


def join_workers() -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR name; alone without them."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False)


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@dataclass
class Engine:
    """A model under DeepSpeed. `names` are the trained parameters, in the model's order."""

    inner: Any
    optimizer: AdamW | TorchAdamW
    names: dict[str, nn.Parameter]
    zero_stage: int
    plain_norm: float = 0.0
    in_order: InOrder | None = None
    """Under `deterministic`: sums the gradients and steps, in place of DeepSpeed."""
    _judge: Judge | None = None
    _verdict: str | None = None

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def averaged_over(self) -> int:
        """How many workers' gradients `backward` makes a mean of; 1 where it makes a sum."""
        return 1 if self.in_order is not None else ranks()[1]

    def backward(self, loss: torch.Tensor, workers: int | None = None) -> None:
        """Add the loss's gradients; the last call of a step reduces them over the workers.

        Gradients are summed over accumulation steps and averaged over workers, but for
        `averaged_over`. `workers`: how many, the first by rank, have something to add; the others'
        loss must have weight 0. `update` is to follow the last call of a step.
        """
        PULSE.enter("backward")
        if self.in_order is not None:
            self.in_order.clear()
            self.inner.backward(loss, scale_wrt_gas=False)
            self.in_order.add(workers or ranks()[1])
            return
        self.inner.backward(loss, scale_wrt_gas=False)
        if not self.inner.is_gradient_accumulation_boundary():
            self.inner.step()  # counts the accumulation step, and no more
        elif self.inner.optimizer is self.optimizer:
            # At stage 0 in fp32 DeepSpeed clips without telling the norm.
            gradients = [p.grad for p in self.names.values() if p.grad is not None]
            self.plain_norm = float(torch.nn.utils.get_total_norm(gradients))

    def update(self, judge: Judge) -> str:
        """Follow the gradient, unless `judge` says on any worker why not → what was said.

        DeepSpeed learns the norm on the way to the optimizer that it wraps, and that one asks
        whether to go on. Refused, it touches nothing: DeepSpeed then copies the old masters over
        weights that are their rounding already, and drops the gradient as after any step.
        """
        PULSE.enter("optimizer")
        self._judge, self._verdict = judge, None
        self.optimizer.refuses = lambda: bool(self._refusal())
        if self.in_order is not None:
            self.plain_norm = self.in_order.gather(self.inner.gradient_clipping() or None)
            self.in_order.step(self.optimizer)
        else:
            self.inner.step()
        why = self._refusal()  # of an infinite norm stage 3 and bf16 at stage 0 never ask
        self.optimizer.refuses = None
        if why:
            self._begin_moments()
        return why

    def _refusal(self) -> str:
        """What the judge says of this step, asked once."""
        assert self._judge is not None
        if self._verdict is None:
            self._verdict = self._judge(self.grad_norm())
            # From stage 1 on the norm is a sum over the workers. At stage 0 each has one of its
            # own, of gradients that should be equal; should.
            if not self.zero_stage and any(sum_over_workers([float(bool(self._verdict))])):
                self._verdict = first_text(self._verdict)
        return self._verdict

    def set_learning_rate(self, value: float) -> None:
        for group in self.inner.optimizer.param_groups:
            group["lr"] = value

    def grad_norm(self) -> float:
        """Norm of the step's gradient, before clipping; known once the step is at its update."""
        if self.in_order is not None or self.inner.optimizer is self.optimizer:
            return self.plain_norm
        return float(self.inner.optimizer._global_grad_norm)

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, parameters that ZeRO-3 has partitioned are whole on every worker."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3)

    def state(self) -> State:
        """A copy of the fp32 weights and moments of what is trained, on the CPU. Every worker must
        call; all get it. Moments are absent before the first step.
        """
        self._link_moments()
        found: State = {}
        for name, parameter in self.names.items():
            get = self._reader(parameter)
            values = {key: get(key) for key in ("weight", *MOMENTS)}
            found[name] = {k: _copied(v) for k, v in values.items() if v is not None}
        return found

    def _reader(self, parameter: nn.Parameter) -> Callable[[str], torch.Tensor | None]:
        if self.zero_stage:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            return lambda key: (
                safe_get_full_fp32_param(parameter)
                if key == "weight"
                else safe_get_full_optimizer_state(parameter, key)
            )
        master = self.master(parameter)
        state = self.optimizer.state.get(master, {})
        return lambda key: master if key == "weight" else state.get(key)

    def share(self) -> Share:
        """A copy of this worker's part of what `state` gives, on the CPU, after at least one step.

        Together the workers' parts are everything, once. Nothing is sent between them.
        """
        self._link_moments()
        rank, world = ranks()
        found: Share = {}
        for name, parameter in self.names.items():
            start, stop = held = self._extent(parameter)
            if not self.zero_stage:  # everyone holds all of it
                start, stop = stop * rank // world, stop * (rank + 1) // world
            if start < stop:
                values = {
                    key: _copied(self._local(parameter, key)[start - held[0] : stop - held[0]])
                    for key in ("weight", *MOMENTS)
                }
                found[name] = (start, values)
        return found

    def shapes(self) -> dict[str, list[int]]:
        """{name: shape} of what is trained, also where ZeRO-3 has partitioned it."""
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.names.items()}

    def _link_moments(self) -> None:
        """Stages 1 and 2 link parameters to their moments after the first group's first step, when
        a second group (weight decay makes two) has none yet, and never again (DeepSpeed 0.19)."""
        relink = getattr(self.inner.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if self.zero_stage in (1, 2) and relink is not None:
            self.inner.optimizer._hp_optimizer_states_linked = False
            relink()

    def _extent(self, parameter: Any) -> tuple[int, int]:
        """(start, stop) of the elements whose master and moments this worker holds.

        Stages 1 and 2 cut the concatenation of all parameters into equal parts, wherever that
        falls; stage 3 cuts each parameter, and pads the last part.
        """
        if self.zero_stage == 3:
            size = parameter.ds_tensor.numel()
            start = min(dist.get_rank() * size, parameter.ds_numel)
            return start, min(start + size, parameter.ds_numel)
        if self.zero_stage:
            mapping = parameter._hp_mapping
            at = mapping.lp_fragment_address if mapping is not None else None
            return (at.start, at.start + at.numel) if at is not None else (0, 0)
        return 0, parameter.numel()

    def _local(self, parameter: Any, key: str) -> torch.Tensor:
        """The fp32 elements of `_extent`, flattened; at stage 3 with its padding."""
        if self.zero_stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            if key == "weight":
                return safe_get_local_fp32_param(parameter)
            return safe_get_local_optimizer_state(parameter, key)
        if self.zero_stage:
            return parameter._hp_mapping.get_hp_fragment(None if key == "weight" else key)
        master = self.master(parameter)
        tensor = master if key == "weight" else self.optimizer.state[master][key]
        return tensor.detach().view(-1)

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 tensor that the optimizer steps at stage 0: bf16 runs keep a copy apart."""
        wrapped = self.inner.optimizer
        if wrapped is self.optimizer:
            return parameter
        for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
            for p, master in zip(low, high, strict=True):
                if p is parameter:
                    return master
        raise AssertionError("a trained parameter that the optimizer does not hold")

    def load_moments(self, read: ReadPart, step: int) -> None:
        """Put back what `state()` or all `share()`s gave, after `step` steps.

        Each worker reads what it holds. Weights must stand in the model already, from before
        DeepSpeed took it over: later, its bf16 copy would be stale.
        """
        self._make_moments()
        self._load(read, step)

    def rewind(self, whole: ReadWhole, part: ReadPart, step: int) -> None:
        """Put back what was saved after `step` steps, whatever became of it since."""
        load_weights(self.module, whole, self.zero_stage)
        self._load(part, step)

    def _load(self, read: ReadPart, step: int) -> None:
        self._link_moments()
        for name, parameter in self.names.items():
            start, stop = self._extent(parameter)
            for key in ("weight", *MOMENTS) if start < stop else ():
                self._write(parameter, key, read(name, key, start, stop))
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """How many steps Adam believes to have done: it divides by 1 − βˢᵗᵉᵖ."""
        for moments in self.optimizer.state.values():
            if "step" in moments:
                moments["step"] = torch.full_like(moments["step"], float(step))

    def _write(self, parameter: Any, key: str, value: torch.Tensor) -> None:
        if self.zero_stage != 3:
            with torch.no_grad():
                self._local(parameter, key).copy_(value)
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        value = nn.functional.pad(value, (0, parameter.ds_tensor.numel() - len(value)))
        if key == "weight":
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)

    def _begin_moments(self) -> None:
        """What Adam's first step would begin with, where it was refused: checkpoints have it."""
        inner, groups = self.inner.optimizer, self.optimizer.param_groups
        masters = [p for group in groups for p in group["params"]]
        if self.zero_stage == 3:
            masters = inner.fp32_partitioned_groups_flat
        for master in masters:
            moments = self.optimizer.state[master]
            if not moments:
                moments["step"] = torch.zeros(())
                moments |= {key: torch.zeros_like(master) for key in MOMENTS}

    def _make_moments(self) -> None:
        """One step with learning rate 0 and gradient 0: until then Adam has no moments."""
        rates = [group["lr"] for group in self.inner.optimizer.param_groups]
        self.set_learning_rate(0.0)
        self.module.train()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device())
        for _ in range(self.inner.gradient_accumulation_steps()):
            self.backward(self.inner(input_ids=ids).logits.float().sum() * 0.0)
        self.update(lambda _: "")
        for group, rate in zip(self.inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def start_engine(plan: Plan, model: nn.Module) -> Engine:
    """Hand the model to DeepSpeed. Every worker must call."""
    import deepspeed

    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(plan, list(names.values()))
    if plan.zero_stage:
        _import_muon()
    inner, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(plan)
    )
    engine = Engine(inner, optimizer, names, plan.zero_stage)
    if plan.config.deterministic:
        inner.enable_backward_allreduce = False
        trained = list(names.values())
        engine.in_order = InOrder(trained, [engine.master(p) for p in trained])
    # In bf16 at stage 0 DeepSpeed makes the moments by a step of its own, and counts it: the
    # first update would be 0.74 of what Adam says.
    engine.set_step(0)
    return engine


def _import_muon() -> None:
    """ZeRO imports this optimizer with its first gradient, whatever a run trains with, and it is
    decorated for torch's compiler: with that one's default backend, 0.7 s of imports more."""
    if hasattr(torch.compiler, "set_default_backend"):
        torch.compiler.set_default_backend("eager")
        try:
            with contextlib.suppress(ImportError):
                importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            torch.compiler.set_default_backend(None)


def reach(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Under ZeRO-3: have these whole, too, while the module computes and goes back."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def load_weights(model: nn.Module, read: ReadWhole, zero_stage: int) -> None:
    """Copy trained weights into a model, one by one. One that `start_engine` has seen holds its
    masters elsewhere: see `Engine.rewind`."""
    import deepspeed

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        partitioned = zero_stage == 3 and hasattr(parameter, "ds_id")
        with (
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned),
            torch.no_grad(),
        ):
            if not partitioned or dist.get_rank() == 0:
                parameter.copy_(read(name, "weight"))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def first_text(text: str) -> str:
    """The first text of a worker, by rank, that is not empty; every worker must call."""
    return next((found for found in texts(text) if found), "")


def texts(text: str) -> list[str]:
    """Each worker's text, by rank, of 4,096 bytes at most; every worker must call."""
    raw = text.encode()[:4096]
    tensor = torch.zeros(4096 + 2, dtype=torch.int32)
    tensor[0] = len(raw)
    tensor[1 : 1 + len(raw)] = torch.tensor(list(raw), dtype=torch.int32)
    tensor = tensor.to(device())
    gathered = [torch.empty_like(tensor) for _ in range(ranks()[1])]
    with PULSE.meeting():
        dist.all_gather(gathered, tensor)
        return [bytes(x[1 : 1 + int(x[0])].tolist()).decode(errors="replace") for x in gathered]


def sum_over_workers(values: list[float]) -> list[float]:
    """Each value summed over all workers, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    with PULSE.meeting():  # on a GPU, which computes behind our back, the values are waited for
        dist.all_reduce(tensor)
        return tensor.tolist()


LEAVE_S = 0.1
"""gloo's threads outlive their group, which DeepSpeed holds on to, and drop the tensors of the last
collective under Python's lock: one that asks for it as Python ends aborts the process."""


def leave_workers() -> None:
    sequence_workers.cache_clear()  # its groups end here; a later join makes new ones
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LEAVE_S)


def memory_bytes() -> int:
    """Peak memory of this worker: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def sequence_workers(size: int) -> Workers | None:
    """Who shares each row with this worker: `size` ranks in a row, likely of one node; None where
    each worker has rows of its own. Every worker must call."""
    if size == 1:
        return None
    rank, world = ranks()
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    return Workers(groups[rank // size], size, rank % size)


def ranks() -> tuple[int, int]:
    """(rank, world_size)."""
    return dist.get_rank(), dist.get_world_size()
