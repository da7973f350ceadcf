"""Predicted peak memory of one worker, by formula.

Weights, gradients and optimizer state follow Rajbhandari et al. 2020 (ZeRO, §3.1, §5):
bf16 weights and gradients 2 B each, fp32 master and two Adam moments 12 B per trained parameter.
Activations count what autograd keeps per token of a pre-norm decoder with SDPA (no s² term:
Korthikanti et al. 2022, §4.1, less its dropout masks), and logits with their fp32 copies; where our
kernels run, what those keep. Weights that lie in the files as they are computed with, and are
packed, are in memory as packs alone (kernels/mapped.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from trimpot.runner.config import Config
from trimpot.runner.families import FAMILIES, NORMED_HEADS, SANDWICHED
from trimpot.runner.plan.facts import ModelFacts
from trimpot.runner.plan.kernels import GATED, OFF
from trimpot.runner.plan.nf4_files import NF4, bytes_of
from trimpot.runner.types import Memory

Kernels = dict[str, dict[str, str]]
"""{op: {"backend", "why"}}, as Plan has it."""
CHUNK_ROWS = 1024
"""Of logits that are there at a time, at most (kernels/ops/logits.py)."""
PACKED_BYTES = {"int16": 2, "int8": 2, "bf16x3": 4}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Of each precision, as config.json names it."""


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


def predict_memory(
    config: Config, facts: ModelFacts, at: Arrangement, kernels: Kernels | None = None
) -> Memory:
    """Peak bytes of one worker at `at`, in forward + backward + step. `kernels`: of the plan."""
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
    ours = Ours(config, facts, kernels or {})
    if world == 1:  # others write theirs anew, as the first one has them
        weights -= ours.in_files() * item
    return Memory(
        weights=weights + ours.packs(),
        gradients=_gradients(config, trained, item, at),
        optimizer=0 if config.fleet.offload_optimizer else optimizer,
        activations=_activations(config, facts, at.micro_batch_size, item, ours),
        logits=ours.logit_rows(_tokens(config, facts, at.micro_batch_size))
        * facts.vocab
        * (item + 8),
    )


def _gradients(config: Config, trained: int, item: int, at: Arrangement) -> int:
    if not config.deterministic:
        return trained * item // (at.world_size if at.zero_stage >= 2 else 1)
    # Own ones, those of others on their way, and the fp32 sum: a slice of it, at last the whole.
    # Where the number of workers may change, one alone is not the dearest.
    alone = at.world_size == 1 and config.fleet.worker_range is None
    exchanged = 0 if alone else item + 4
    return trained * (item + exchanged) + 4 * trained // at.world_size


@dataclass(frozen=True)
class Ours:
    """What our kernels leave out and add, in models whose layers are known."""

    config: Config
    facts: ModelFacts
    kernels: Kernels

    def on(self, op: str) -> bool:
        return self.facts.family in FAMILIES and self._backend(op) != OFF

    def _backend(self, op: str) -> str:
        return self.kernels.get(op, {}).get("backend", OFF)

    def layers(self) -> bool:
        """Whether norms' outputs and gated products are made again (runner/fused/remake.py)."""
        gated = GATED.get(self.facts.activation, "")
        return all(map(self.on, ("add_rms_norm", "rope", "varlen_attention", gated)))

    def logit_rows(self, tokens: int) -> int:
        return min(tokens, CHUNK_ROWS) if self.on("linear_cross_entropy") else tokens

    def packs(self) -> int:
        """Frozen linear layers and the head once more, as CPU products of 16 bits want them."""
        if self.config.method != "lora" or not self._backend("lora_linear").startswith("cpp"):
            return 0
        sizes = [d_out * d_in for d_out, d_in in self.facts.linears("all-linear").values()]
        return self._packed_bytes() * (sum(sizes) + self.facts.vocab * self.facts.hidden)

    def in_files(self) -> int:
        """Parameters whose pages go when they are packed. Not a tied head's: the embedding brings
        most of them back."""
        config, facts = self.config, self.facts
        mapped = DTYPES[config.precision] == facts.dtype and config.model.quantization == "none"
        if not mapped or not self.packs():
            return 0
        sizes = facts.linears(config.adapter.target_modules).values()
        untied = any(name.endswith("lm_head.weight") for name in facts.shapes)
        head = facts.vocab * facts.hidden if untied and self.on("linear_cross_entropy") else 0
        return sum(d_out * d_in for d_out, d_in in sizes) + head

    def _packed_bytes(self) -> int:
        """Of an item of a weight."""
        gemm = self._backend("lora_linear").partition(":")[2] or self.config.kernels.cpu_gemm
        low = gemm == "auto" and self.config.precision == "bf16"
        return PACKED_BYTES.get(gemm, 2 if low else 0)


def _quantised_less_plain(config: Config, facts: ModelFacts, item: int) -> int:
    """What NF4 changes: frozen linear layers in 4 bits, and those in use dequantised: a layer that
    is recomputed has all of its own at a time, another the two that share an input."""
    sizes = [d_out * d_in for d_out, d_in in facts.linears("all-linear").values()]
    in_use = 2 * max(sizes, default=0)
    if config.model.activation_checkpointing is True:
        in_use = facts.largest_layer
    return sum(bytes_of(n, config.model.double_quant) - n * item for n in sizes) + in_use * item


def _tokens(config: Config, facts: ModelFacts, micro_batch_size: int) -> int:
    """Of one micro-batch in one worker."""
    row = micro_batch_size * min(config.data.max_length, facts.max_positions)
    return -(-row // config.fleet.sequence_parallel_size)


def _activations(
    config: Config, facts: ModelFacts, micro_batch_size: int, item: int, ours: Ours
) -> int:
    tokens = _tokens(config, facts, micro_batch_size)
    attention = facts.heads * facts.head_dim
    kv = facts.kv_heads * facts.head_dim
    # Per token: two norms keep an fp32 input, an fp32 normed copy and their output; q, k, v
    # before and after the rotation; attention's output; gate, up, their product, silu(gate).
    norms = 2 * (2 * facts.hidden * 4 + facts.hidden * item)
    rows = 2 * (attention + kv) + kv + attention + 4 * facts.intermediate + 2 * facts.hidden
    layer = tokens * (norms + rows * item)
    if config.model.activation_checkpointing is True:  # each keeps its input, one is recomputed
        return facts.layers * tokens * facts.hidden * item + layer
    if not ours.layers():
        return facts.layers * layer
    # Both sums of the residual stream, rotated q and k, v, attention's output; gate and up unless
    # they are made again. The rest is there in one layer at a time.
    kept = 2 * facts.hidden + 2 * (attention + kv)
    kept += 2 * facts.hidden if facts.family in SANDWICHED else 0
    kept += attention + kv if facts.family in NORMED_HEADS else 0
    products = (facts.layers - _selective_layers(config, facts)) * 2 * facts.intermediate
    return tokens * (facts.layers * kept + products) * item + layer


def _selective_layers(config: Config, facts: ModelFacts) -> int:
    """In how many layers gate and up are made again."""
    if config.model.activation_checkpointing != "selective":
        return 0
    return min(config.model.selective_layers or facts.layers, facts.layers)
