"""The types that every floor speaks in. Standard library only.

`Config` is the sixth; it validates, so it lives in `config.py` on pydantic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimpot.runner.config import Config


NODE = "TRIMPOT_NODE"
"""Environment variable that a launcher sets: the id of the node that a worker is on."""


@dataclass(frozen=True)
class Fleet:
    """The machines a run may use. `price_per_hour` is US$ for all of them together."""

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 1
    gpu: str | None = None
    memory_bytes: int = 0
    """Bytes one worker may use: of its GPU, or its share of the host without one."""
    price_per_hour: float | None = None
    preemptible: bool = False


@dataclass(frozen=True)
class Memory:
    """Predicted peak bytes of one worker, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """What a run does, derived from a Config and a Fleet. Workers get this and nothing else."""

    config: Config
    run_dir: str
    """Absolute. Every worker must see the same folder under this path."""
    model_path: str
    """Absolute path of the model's folder, or a hub id."""
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    """Rounds of a step: in the last one some lanes may have no micro-batch left."""
    total_steps: int | None
    """None until the data is compiled: an epoch's length is not known before."""
    zero: dict[str, Any]
    """DeepSpeed's `zero_optimization` section."""
    kernels: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """{op: {"backend", "why"}}, of the kernels that this run uses."""
    memory: Memory | None = None

    @property
    def zero_stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def sequence_parallel_size(self) -> int:
        """How many workers share each row of tokens."""
        return self.config.fleet.sequence_parallel_size

    @property
    def lanes(self) -> int:
        """How many micro-batches are computed at a time: data-parallel size."""
        return self.world_size // self.sequence_parallel_size

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has, over all workers."""
        return self.config.optim.batch_size // self.micro_batch_size

    @property
    def digest(self) -> str:
        """SHA-256 over what decides the numbers: two plans with one digest train the same adapter.

        World size, micro-batch, accumulation, ZeRO stage and folders are left out: a run may
        be resumed on another fleet. So are the parts of the config that only watch the run.
        Under `deterministic`, whatever decides a bit is in it.
        """
        numbers = decides_numbers(self.config.model_dump(mode="json"), self.kernels)
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()

    def replace(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, **changes)


NOT_NUMBERS = ("fleet", "checkpoint", "tracking", "samples", "output_dir", "evaluation", "health")
"""Health is among them so that a run that stopped at a bad step can go on and skip it: what was
decided until then is in the checkpoint."""


def decides_numbers(config: dict[str, Any], kernels: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The part of a dumped Config that decides what is trained; a copy. `kernels`: of the plan."""
    numbers: dict[str, Any] = json.loads(json.dumps(config))
    deterministic = bool(numbers.pop("deterministic"))
    micro, fleet = numbers["optim"].pop("micro_batch_size"), numbers["fleet"]
    chosen = {op: kernels[op]["backend"] for op in numbers["kernels"] if op in kernels}
    # Backends agree up to the rounding of one arithmetic, as fleets do; arithmetics differ more.
    numbers["kernels"] = {"cpu_gemm": numbers["kernels"]["cpu_gemm"]}
    for key in NOT_NUMBERS:
        numbers.pop(key, None)
    if deterministic:
        numbers["deterministic"] = {
            "micro_batch_size": micro,
            "sequence_parallel_size": fleet["sequence_parallel_size"],
            "cpus_per_worker": fleet["cpus_per_worker"],
            "kernels": chosen,
        }
    # Where a file lies is no number; what is in it has the data digest of the manifest. What is
    # made again in backward is bit for bit what was there.
    for section, key in (
        ("data", "train"),
        ("data", "eval"),
        ("model", "path"),
        ("model", "activation_checkpointing"),
        ("model", "selective_layers"),
    ):
        numbers[section].pop(key)
    return numbers


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as rank 0 saw it. Loss is nats per trained token of the global batch."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens that went through the model in this step, over all workers; padding excluded."""
    trained_tokens: int
    seconds: float
    memory_bytes: int
    """Peak of rank 0 so far: allocated GPU memory, or resident memory without one."""
    held_out_loss: float | None = None
    checkpoint: str | None = None
    health: str = "ok"
    """Or why the step did not update the weights, and what followed."""


@dataclass(frozen=True)
class Event:
    """Anything else a worker tells: start, phase, sample, eval, checkpoint, warning, bad_step,
    check, corruption, end."""

    kind: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    cursor: int
    """How many samples of the run's sequence are consumed. The next is number `cursor`."""
    plan_digest: str
    digest: str
    """SHA-256 of the manifest, which holds the SHA-256 of every file."""
    complete: bool = False
    """The run's last step is in it."""


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint, or what was exported from it, may be used; and why."""

    checkpoint_digest: str
    passed: bool
    scores: dict[str, float]
    reasons: list[str]
