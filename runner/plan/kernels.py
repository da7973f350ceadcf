"""Which backend each op of a run takes: chosen once, before the launch, with its reason."""

from __future__ import annotations

from typing import Any

from trimpot.kernels.dispatch import AUTO, choose, preferred_arithmetic
from trimpot.runner.config import Config
from trimpot.runner.plan.facts import ModelFacts
from trimpot.runner.plan.nf4_files import NF4
from trimpot.runner.types import Fleet

OFF = "off"
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_python_tanh": "geglu",
    "gelu_new": "geglu",
}
"""{transformers' name of an activation: the op that gates with it}."""
ATTENTION = "varlen_attention"
DATA_OPS = ("content_hash", "pack")
"""What the tokens went through on their way; no choice of the user's."""


def choose_kernels(config: Config, fleet: Fleet, facts: ModelFacts) -> dict[str, dict[str, str]]:
    """{op: {"backend", "why"}} for what the run uses. Raises BackendError (exit code 2) where a
    backend was asked for that can't run."""
    section = config.kernels
    device = "cuda" if fleet.gpus_per_node else "cpu"
    dtype = "bfloat16" if config.precision == "bf16" else "float32"
    chosen: dict[str, dict[str, str]] = {}
    gemm = section.cpu_gemm
    if config.deterministic and gemm == AUTO and dtype == "bfloat16" and device == "cpu":
        gemm = preferred_arithmetic()  # a measurement may fall otherwise in another worker
    # Packs of weights that are dequantised for each call would be made as often.
    packs_are_lost = (
        config.model.quantization == NF4 and device == "cpu" and section.cpu_gemm == AUTO
    )
    for op in ops_of(config, facts):
        wanted = getattr(section, op) or section.default
        if op == NF4 and wanted == OFF:
            wanted = "torch"  # transformers has no code of its own for it
        if op == "lora_linear" and packs_are_lost:
            wanted = "torch" if wanted == AUTO else wanted
        if wanted == OFF:
            chosen[op] = {"backend": OFF, "why": "asked for; transformers' own code"}
            continue
        known: dict[str, Any] = {"device": device, "dtype": dtype, "gemm": gemm}
        if op == "adamw_step":  # its state is fp32, whatever the model's type, and may live apart
            known["dtype"] = "float32"
            known["device"] = "cpu" if config.fleet.offload_optimizer else device
        if op == ATTENTION:
            known["head_dim"] = facts.head_dim
        choice = choose(op, wanted, **known)
        split = config.fleet.sequence_parallel_size > 1  # sdpa can't do that
        if op == ATTENTION and wanted == AUTO and choice.backend == "torch" and not split:
            # A loop over documents with all their scores in memory: sdpa is faster.
            chosen[op] = {"backend": OFF, "why": f"transformers' own code; {choice.why}"}
            continue
        chosen[op] = {"backend": choice.backend, "why": choice.why}
    for op in DATA_OPS:
        choice = choose(op, AUTO)
        chosen[op] = {"backend": choice.backend, "why": choice.why}
    return chosen


def ops_of(config: Config, facts: ModelFacts) -> list[str]:
    """Ops of a training step. Whether the model has room for each is seen when it is built."""
    ops = ["add_rms_norm", "rope", ATTENTION, "linear_cross_entropy", "adamw_step"]
    ops += [GATED[facts.activation]] if facts.activation in GATED else []
    ops += ["lora_linear"] if config.method == "lora" else []
    ops += [NF4] if config.model.quantization == NF4 else []
    return sorted(ops)
