"""Config + Fleet + ModelFacts → Plan. Pure: no torch, no ray, no clock."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from typing import Any

from trimpot.runner.config import Config, check_config
from trimpot.runner.errors import PlanError
from trimpot.runner.plan.facts import ModelFacts
from trimpot.runner.plan.kernels import ATTENTION, choose_kernels
from trimpot.runner.plan.memory import Arrangement, Kernels, Ours, predict_memory
from trimpot.runner.reading import parse_json
from trimpot.runner.types import Fleet, Memory, Plan

FITS = 0.92
"""Share of a worker's memory that the prediction may fill: allocators fragment by some percent."""


def make_plan(config: Config, fleet: Fleet, facts: ModelFacts, run_dir: str) -> Plan:
    """Arrange the run: the least recomputation of what may be chosen, then the lowest ZeRO stage,
    then the largest micro-batch, that fits.

    Raises PlanError where the batch does not divide or nothing fits.
    """
    world = _world_size(config, fleet)
    if facts.max_positions < config.data.max_length:
        raise PlanError(
            f"data.max_length {config.data.max_length} is over the model's "
            f"{facts.max_positions} positions; set data.max_length={facts.max_positions} or less"
        )
    _check_names(config, facts)
    if facts.quantization and config.model.quantization == "none":
        raise PlanError(
            f"{config.model.path} is in 4 bits already ({facts.quantization}); set "
            f"model.quantization={facts.quantization} to train adapters on it"
        )
    if facts.quantization and config.adapter.lora_init == "quantization_error":
        raise PlanError(
            f"{config.model.path} is in 4 bits already, so there is nothing to compare them with "
            "for adapter.lora_init=quantization_error; give the model as it was before, or set "
            "lora_init=random"
        )
    lanes = world // config.fleet.sequence_parallel_size
    kernels = choose_kernels(config, fleet, facts)
    _check_split(config, facts, kernels)
    config, stage, micro = _arrange(config, fleet, facts, world, kernels)
    fewest = config.fleet.worker_range[0] if config.fleet.worker_range else world
    memory = predict_memory(config, facts, Arrangement(fewest, micro, stage), kernels)
    return Plan(
        config=config,
        run_dir=run_dir,
        model_path=config.model.path,
        world_size=world,
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-config.optim.batch_size // (lanes * micro)),
        total_steps=config.optim.max_steps,
        zero=zero_section(config, stage),
        kernels=kernels,
        memory=memory,
    )


def for_workers(plan: Plan, world_size: int, facts: ModelFacts | None = None) -> Plan:
    """The same run on another number of workers: same micro-batches, ZeRO stage and kernels.

    Any number up to one worker (or group that shares rows) per micro-batch will do; where the
    micro-batches do not divide, some workers idle in each step's last round. `facts`: to predict
    memory anew; without them the prediction stays that of `plan`. Raises PlanError.
    """
    split, micros = plan.sequence_parallel_size, plan.micro_batches
    if world_size < 1 or world_size % split:
        raise PlanError(
            f"{world_size} workers do not divide into groups of fleet.sequence_parallel_size "
            f"{split}; take {max(1, round(world_size / split)) * split}"
        )
    lanes = world_size // split
    if lanes > micros:
        raise PlanError(
            f"{world_size} workers are more than the {micros} micro-batches of a step can occupy; "
            f"take at most {micros * split}, or a batch_size of {lanes * plan.micro_batch_size}"
        )
    memory = plan.memory
    if facts is not None:
        at = Arrangement(world_size, plan.micro_batch_size, plan.zero_stage)
        memory = predict_memory(plan.config, facts, at, plan.kernels)
    return plan.replace(
        world_size=world_size, gradient_accumulation_steps=-(-micros // lanes), memory=memory
    )


def _check_names(config: Config, facts: ModelFacts) -> None:
    """Whether what is to be trained is there. Raises PlanError."""
    known = sorted({name.rsplit(".", 1)[-1] for name in facts.linears("all-linear")})
    targets = config.adapter.target_modules
    if config.method == "lora" and not known:
        raise PlanError(
            f"{facts.architecture} has no linear layer that LoRA could adapt; "
            "set method: full, or freeze"
        )
    wanted = targets if config.method == "lora" and targets != "all-linear" else []
    if missing := [name for name in wanted if name not in known]:
        raise PlanError(
            f"adapter.target_modules names {', '.join(missing[:3])}, which {facts.architecture} "
            f"has not; its linear layers: {', '.join(known)}"
        )
    for pattern in config.freeze.trainable if config.freeze else []:
        if not any(fnmatchcase(name, pattern) for name in _parameter_names(facts)):
            raise PlanError(
                f"freeze.trainable {pattern!r} names no parameter; "
                f"names look like {next(iter(facts.shapes), '')}"
            )


def _parameter_names(facts: ModelFacts) -> list[str]:
    """What the model's parameters may be called: those of the file, and as transformers 5 renames
    them (a layer's experts are two parameters, every head is lm_head)."""
    experts = {
        re.sub(r"\.experts\.\d+\..*", ".experts", n) for n in facts.shapes if ".experts." in n
    }
    joined = [f"{e}.{part}_proj" for e in sorted(experts) for part in ("gate_up", "down")]
    return [*facts.shapes, "lm_head.weight", *joined]


def _world_size(config: Config, fleet: Fleet) -> int:
    """Workers of the first start, where they all find room."""
    split = config.fleet.sequence_parallel_size
    world = config.fleet.most_workers or max(split, fleet.nodes * fleet.gpus_per_node)
    if config.fleet.worker_range:
        return _range_top(config)
    if world % split:
        raise PlanError(
            f"{world} workers do not divide into groups of fleet.sequence_parallel_size {split}; "
            f"set fleet.workers={-(-world // split) * split}"
        )
    lanes, batch = world // split, config.optim.batch_size
    shared = f"{lanes} groups of {split} workers" if split > 1 else f"{world} workers"
    if batch % lanes:
        raise PlanError(
            f"batch_size {batch} does not divide over {shared}; "
            f"the next size that does is {-(-batch // lanes) * lanes}"
        )
    micro = config.optim.micro_batch_size
    if micro != "auto" and batch % (lanes * micro):
        raise PlanError(
            f"batch_size {batch} is no multiple of {shared} × micro_batch_size {micro}; "
            f"the next size that is: {-(-batch // (lanes * micro)) * lanes * micro}"
        )
    return world


def _range_top(config: Config) -> int:
    """The most workers of a range that have something to do. Raises PlanError."""
    assert config.fleet.worker_range is not None
    (least, most), split = config.fleet.worker_range, config.fleet.sequence_parallel_size
    given, batch = config.optim.micro_batch_size, config.optim.batch_size
    micros = batch if given == "auto" else batch // given
    top = min(most // split, micros) * split
    if top < least:
        why = (
            f"{micros} micro-batches a step keep {top} busy"
            if most // split > micros
            else f"groups of fleet.sequence_parallel_size {split} make {top} of them"
        )
        raise PlanError(
            f"fleet.workers is {least} to {most}, and {why}; set fleet.workers.min={top or split} "
            "or less, or a larger optim.batch_size"
        )
    return top


def _check_split(config: Config, facts: ModelFacts, kernels: dict[str, dict[str, str]]) -> None:
    """Whether attention can be split over the workers that share a row. Raises PlanError."""
    split = config.fleet.sequence_parallel_size
    if facts.heads % split:
        sizes = [n for n in range(1, facts.heads + 1) if facts.heads % n == 0]
        raise PlanError(
            f"fleet.sequence_parallel_size {split} does not divide the {facts.heads} attention "
            f"heads of {facts.architecture}; sizes that do: {', '.join(map(str, sizes))}"
        )
    if split > 1 and kernels[ATTENTION]["backend"] == "off":
        raise PlanError(
            f"fleet.sequence_parallel_size {split} wants attention by document, and "
            "kernels.varlen_attention is off; set it to auto"
        )


def _arrange(
    config: Config, fleet: Fleet, facts: ModelFacts, world: int, kernels: Kernels
) -> tuple[Config, int, int]:
    """(config with activation checkpointing decided, zero_stage, micro_batch_size), that fit
    however many of its workers a run has."""
    stages, micros = _choices(config, world)
    if config.fleet.worker_range:  # the fewer they are, the more each holds
        world = max(config.fleet.worker_range[0], config.fleet.sequence_parallel_size)
    kinds = _recomputations(config, facts, kernels)
    if not fleet.memory_bytes:  # unknown memory: nothing to fit into
        return kinds[0], stages[-1], micros[-1]

    def needs(kind: Config, stage: int, micro: int) -> Memory:
        return predict_memory(kind, facts, Arrangement(world, micro, stage), kernels)

    limit = FITS * fleet.memory_bytes
    for kind in kinds:
        for stage, micro in itertools.product(stages, micros):
            if needs(kind, stage, micro).total <= limit:
                if kind is not kinds[0] and kind.model.activation_checkpointing == "selective":
                    fewer = (_recomputing(kind, "selective", n + 1) for n in range(facts.layers))
                    kind = next(k for k in fewer if needs(k, stage, micro).total <= limit)
                return kind, stage, micro
    sparing = kinds[-1]
    if "auto" not in (config.optim.micro_batch_size, config.fleet.zero_stage):
        return sparing, stages[0], micros[0]  # the user's word: the prediction may be wrong
    least = min(needs(sparing, *at).total for at in itertools.product(stages, micros))
    whole = sparing.model.activation_checkpointing is True
    saving = "" if whole else "set model.activation_checkpointing=auto, "
    raise PlanError(
        f"the least this run needs is {gib(least)} GiB per worker, and a worker has "
        f"{gib(fleet.memory_bytes)} GiB; lower data.max_length, {saving}or use more workers"
    )


def _choices(config: Config, world: int) -> tuple[list[int], list[int]]:
    """(ZeRO stages, micro-batch sizes) to choose from, the fastest first."""
    lanes, batch = world // config.fleet.sequence_parallel_size, config.optim.batch_size
    whole = batch if config.fleet.worker_range else batch // lanes
    micros = [m for m in range(batch // lanes, 0, -1) if whole % m == 0]
    fewest = config.fleet.worker_range[0] if config.fleet.worker_range else world
    wanted, given = config.fleet.zero_stage, config.optim.micro_batch_size
    if wanted == "auto":
        lowest = 1 if config.fleet.offload_optimizer else 0
        highest = 3 if config.model.quantization == "none" else 2  # which partitions no 4 bits
        alone = max(fewest, config.fleet.sequence_parallel_size) == 1 or config.deterministic
        stages = [lowest] if alone else list(range(lowest, highest + 1))
    else:
        stages = [wanted]
    return stages, micros if given == "auto" else [given]


def _recomputations(config: Config, facts: ModelFacts, kernels: Kernels) -> list[Config]:
    """The config with each kind of activation checkpointing to choose from, the fastest first."""
    if config.model.activation_checkpointing != "auto":
        return [config]
    selective = Ours(config, facts, kernels).layers()
    return [_recomputing(config, kind) for kind in (False, *["selective"] * selective, True)]


def _recomputing(config: Config, kind: bool | str, layers: int | None = None) -> Config:
    changed = {"activation_checkpointing": kind, "selective_layers": layers}
    return config.model_copy(update={"model": config.model.model_copy(update=changed)})


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def zero_section(config: Config, stage: int) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if config.fleet.offload_optimizer and stage:
        section["offload_optimizer"] = {"device": "cpu"}
    return section


def plan_to_json(plan: Plan) -> str:
    values = {f.name: getattr(plan, f.name) for f in fields(plan)}
    values["config"] = plan.config.model_dump(mode="json", exclude_unset=True)
    values["memory"] = asdict(plan.memory) if plan.memory else None
    return json.dumps(values, indent=2)


def plan_from_json(text: str) -> Plan:
    values: dict[str, Any] = parse_json(text)
    memory: dict[str, int] | None = values.pop("memory")
    values["memory"] = Memory(**memory) if memory else None
    values["config"] = check_config(values["config"], "plan")
    return Plan(**values)
