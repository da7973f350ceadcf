"""Predicted peak memory of one worker, by formula.

Weights, gradients and optimizer state follow Rajbhandari et al. 2020 (ZeRO, §3.1, §5):
bf16 weights and gradients 2 B each, fp32 master and two Adam moments 12 B per trained parameter.
Activations count what autograd keeps per token of a pre-norm decoder with SDPA (no s² term:
Korthikanti et al. 2022, §4.1, less its dropout masks), and logits with their fp32 copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimpot.runner.config import Config
from trimpot.runner.plan.facts import ModelFacts
from trimpot.runner.plan.nf4_files import NF4, bytes_of
from trimpot.runner.types import Memory


@dataclass(frozen=True)
class Arrangement:
    world_size: int
    micro_batch_size: int
    zero_stage: int


def trained_parameters(config: Config, facts: ModelFacts) -> int:
    """How many parameters the method trains."""
    if config.method == "lora":
        rank = config.adapter.lora_rank
        linears = facts.linears(config.adapter.target_modules)
        return sum(rank * (d_out + d_in) for d_out, d_in in linears.values())
    if config.method == "freeze":
        from fnmatch import fnmatchcase
        from math import prod

        patterns = config.freeze.trainable if config.freeze else []
        return sum(
            prod(shape)
            for name, shape in facts.shapes.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        )
    return facts.parameters


def predict_memory(config: Config, facts: ModelFacts, at: Arrangement) -> Memory:
    """Peak bytes of one worker at `at`, in forward + backward + step."""
    item = 2 if config.precision == "bf16" else 4
    world, stage = at.world_size, at.zero_stage
    trained = trained_parameters(config, facts)
    weights = (facts.parameters + (trained if config.method == "lora" else 0)) * item
    if config.model.quantization == NF4:
        weights += _quantised_less_plain(config, facts, item)
    if stage == 3:  # own share, and two gathered blocks: the running one and the prefetched one
        weights = weights // world + 2 * facts.largest_layer * item
    # fp32 training needs no master copy at stage 0; ZeRO's flat partitions are one.
    state = 12 if item == 2 or stage > 0 else 8
    optimizer = trained * state // (world if stage else 1)
    return Memory(
        weights=weights,
        gradients=trained * item // (world if stage >= 2 else 1),
        optimizer=0 if config.fleet.offload_optimizer else optimizer,
        activations=_activations(config, facts, at.micro_batch_size, item),
        logits=_tokens(config, facts, at.micro_batch_size) * facts.vocab * (item + 8),
    )


def _quantised_less_plain(config: Config, facts: ModelFacts, item: int) -> int:
    """What NF4 changes: frozen linear layers in 4 bits, and those in use dequantised: a layer that
    is recomputed has all of its own at a time, another the two that share an input."""
    sizes = [d_out * d_in for d_out, d_in in facts.linears("all-linear").values()]
    in_use = 2 * max(sizes, default=0)
    if config.model.activation_checkpointing:
        in_use = facts.largest_layer
    return sum(bytes_of(n, config.model.double_quant) - n * item for n in sizes) + in_use * item


def _tokens(config: Config, facts: ModelFacts, micro_batch_size: int) -> int:
    """Of one micro-batch in one worker."""
    row = micro_batch_size * min(config.data.max_length, facts.max_positions)
    return -(-row // config.fleet.sequence_parallel_size)


def _activations(config: Config, facts: ModelFacts, micro_batch_size: int, item: int) -> int:
    tokens = _tokens(config, facts, micro_batch_size)
    attention = facts.heads * facts.head_dim
    kv = facts.kv_heads * facts.head_dim
    # Per token: two norms keep an fp32 input, an fp32 normed copy and their output; q, k, v
    # before and after the rotation; attention's output; gate, up, their product, silu(gate).
    norms = 2 * (2 * facts.hidden * 4 + facts.hidden * item)
    rows = 2 * (attention + kv) + kv + attention + 4 * facts.intermediate + 2 * facts.hidden
    layer = tokens * (norms + rows * item)
    if config.model.activation_checkpointing:  # each layer keeps its input, one is recomputed
        return facts.layers * tokens * facts.hidden * item + layer
    return facts.layers * layer
