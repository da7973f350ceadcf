"""Our ops put into a model that transformers has built, module by module, as the plan says.

A swapped module gets a subclass of its own class whose forward calls the op. Its parameters and
their names stay; so does every other model in the process. Layers are told by the class that
transformers gives a known family, norms and output layers by their numbers. What is not known is
left to transformers' own code, and the table says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trimpot.runner import hub
from trimpot.runner.adapters.lora import LoraLinear, lora_layers
from trimpot.runner.adapters.nf4_linear import Nf4Linear
from trimpot.runner.errors import ConfigError
from trimpot.runner.families import FAMILIES, SANDWICHED
from trimpot.runner.fused.attention import AttentionKind, FusedAttention
from trimpot.runner.fused.classes import put
from trimpot.runner.fused.documents import with_documents
from trimpot.runner.fused.exchange import Workers
from trimpot.runner.fused.layer import Parts, PreNormLayer, SandwichLayer
from trimpot.runner.fused.loss import FusedHead, head_is_plain, with_loss
from trimpot.runner.fused.mlp import GATES, FusedMLP, gate_op
from trimpot.runner.fused.norm import FusedNorm, norm_kind

OFF = "off"
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one block that have the same input."""
NOUNS = {
    "add_rms_norm": "norms",
    "rope": "attention layers",
    "varlen_attention": "attention layers",
    "swiglu": "feed-forward layers",
    "geglu": "feed-forward layers",
    "lora_linear": "layers",
    "linear_cross_entropy": "output layer",
}

Table = dict[str, dict[str, str]]
Reach = Callable[[nn.Module, Iterable[nn.Parameter]], None]
"""Tells whoever partitions parameters that a module computes with some that are not its own."""


def swap_in(
    model: Any, kernels: Table, reach: Reach | None = None, workers: Workers | None = None
) -> Table:
    """Put the ops in, in place → `kernels` as it came true: how many modules run each op, or
    why none does. `reach`: given under ZeRO-3, where parameters are partitioned already.
    `workers`: those among whom rows are split."""
    swap = Swap(model, kernels, reach is not None, workers)
    swap.norms()
    swap.layers()
    swap.documents()
    swap.adapters()
    swap.loss()
    if reach is not None:
        _declare(model, reach)
    return {op: swap.row(op, choice) for op, choice in kernels.items()}


def remake_products(model: nn.Module, count: int | None = None) -> None:
    """Selective activation checkpointing, in place; of the first `count` layers: at their turn in
    backward what the others kept is gone. Raises ConfigError where no layer is ours."""
    layers = [module for module in model.modules() if isinstance(module, Parts)]
    if not layers:
        raise ConfigError(
            "model.activation_checkpointing is selective, and no layer of "
            f"{type(model).__name__} runs on the kernels add_rms_norm and "
            f"{' or '.join(GATES)}; take true"
        )
    for layer in layers[:count]:
        layer.remakes_products = True


class Swap:
    def __init__(self, model: Any, kernels: Table, partitioned: bool, workers: Workers | None):
        self.model, self.partitioned, self.workers = model, partitioned, workers
        self.backends = {op: choice["backend"] for op, choice in kernels.items()}
        self.done: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}

    def on(self, op: str) -> bool:
        return self.backends.get(op, OFF) != OFF

    def row(self, op: str, choice: dict[str, str]) -> dict[str, str]:
        if op not in NOUNS or choice["backend"] == OFF:
            return choice
        if not self.done[op]:
            known = f"the model has none of the layers known: {', '.join(FAMILIES)}"
            return {"backend": OFF, "why": self.reasons.get(op, known)}
        return {**choice, "why": f"{choice['why']}; {self.done[op]} {NOUNS[op]}"}

    def norms(self) -> None:
        if not self.on("add_rms_norm"):
            return
        self.reasons["add_rms_norm"] = "no module of the model computes an RMS norm"
        for module in list(self.model.modules()):
            if (kind := norm_kind(module)) is not None:
                put(module, FusedNorm, norm=kind, norm_backend=self.backends["add_rms_norm"])
                self.done["add_rms_norm"] += 1

    def layers(self) -> None:
        for module in list(self.model.modules()):
            if (family := hub.family_of(module)) not in FAMILIES:
                continue
            name = type(module).__name__
            if name.endswith("DecoderLayer"):
                self._layer(module, family)
            elif name.endswith("MLP"):
                self._mlp(module)
            elif name.endswith("Attention"):
                self._attention(module, family)

    def _layer(self, layer: nn.Module, family: str | None) -> None:
        norms = [part for name, part in layer.named_children() if name.endswith("layernorm")]
        if norms and all(isinstance(norm, FusedNorm) for norm in norms):
            kind = SandwichLayer if family in SANDWICHED else PreNormLayer
            put(layer, kind, remakes_products=False)

    def _mlp(self, mlp: Any) -> None:
        op = gate_op(mlp.act_fn)
        if op is None:
            for each in GATES:
                self.reasons[each] = f"the activation is {type(mlp.act_fn).__name__}"
        backend = self.backends.get(op or "", OFF)
        if backend != OFF or self.on("lora_linear"):
            put(mlp, FusedMLP, gate_op=op, gate_backend=backend)
        if op is not None and backend != OFF:
            self.done[op] += 1

    def _attention(self, attention: Any, family: str | None) -> None:
        if not any(self.on(op) for op in ("rope", "lora_linear", "varlen_attention")):
            return
        rotates = bool(getattr(attention, "use_rope", True))
        settings: dict[str, Any] = {}
        if family == "mistral":
            settings["sliding_window"] = attention.config.sliding_window
        elif hasattr(attention, "sliding_window"):
            settings["sliding_window"] = attention.sliding_window
        if family == "gemma2":
            settings["softcap"] = attention.attn_logit_softcapping
        kind = AttentionKind(
            code=hub.attention_code(attention),
            rope_backend=self.backends.get("rope", OFF),
            rotates=rotates,
            norm=self._head_norm(attention) if rotates and self.on("rope") else None,
            settings=settings,
            backend=self.backends.get("varlen_attention", OFF),
            workers=self.workers,
        )
        put(attention, FusedAttention, attention=kind)
        self.done["rope"] += rotates

    def documents(self) -> None:
        """Models whose attention layers are all ours tell them of documents in place of masks."""
        if not self.on("varlen_attention"):
            return
        for module in list(self.model.modules()):
            layers = getattr(module, "layers", None)
            if hub.family_of(module) not in FAMILIES or not isinstance(layers, nn.ModuleList):
                continue
            config: Any = module.config
            if config.attention_dropout:
                why = f"attention_dropout is {config.attention_dropout}"
                self.reasons["varlen_attention"] = f"{why}, and the op has none"
            elif getattr(config, "use_bidirectional_attention", False):
                self.reasons["varlen_attention"] = "attention is not causal"
            elif all(isinstance(layer.self_attn, FusedAttention) for layer in layers):
                module.__class__ = with_documents(type(module))
                self.done["varlen_attention"] += len(layers)

    def _head_norm(self, attention: Any) -> Any:
        """What q_norm and k_norm are, if the op may do both: they were found to be RMS norms."""
        kinds = {
            getattr(getattr(attention, name, None), "norm", None) for name in ("q_norm", "k_norm")
        }
        return kinds.pop() if len(kinds) == 1 else None

    def adapters(self) -> None:
        if not self.on("lora_linear"):
            return
        self.reasons["lora_linear"] = "no adapted layer is a plain torch.nn.Linear"
        for layer in lora_layers(self.model).values():
            if type(layer.base_layer) in (nn.Linear, Nf4Linear):
                layer.backend = self.backends["lora_linear"]
                self.done["lora_linear"] += 1

    def loss(self) -> None:
        if not self.on("linear_cross_entropy"):
            return
        if (why := self._loss_stays()) is not None:
            self.reasons["linear_cross_entropy"] = why
            return
        put(
            self.model.get_output_embeddings(),
            FusedHead,
            loss_backend=self.backends["linear_cross_entropy"],
            loss_softcap=float(getattr(self.model.config, "final_logit_softcapping", 0) or 0),
        )
        self.model.__class__ = with_loss(type(self.model))
        self.done["linear_cross_entropy"] += 1

    def _loss_stays(self) -> str | None:
        """Why the loss can't be computed from the last hidden state; None if it can."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if type(head) is not nn.Linear or head.bias is not None:
            return "the output layer is no plain linear layer without bias"
        if hub.family_of(self.model) in FAMILIES:
            return None
        name = type(self.model).__name__
        if self.partitioned:
            return f"{name} is not known, and can't be tried under ZeRO-3"
        if not head_is_plain(self.model):
            return f"{name} makes more of its logits than a product with the last hidden state"
        return None


def _declare(model: nn.Module, reach: Reach) -> None:
    """Say which modules compute with parameters of others."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.backend != OFF:
            reach(module, module.base_layer.parameters())
        if isinstance(module, FusedAttention) and module.attention.norm is not None:
            reach(module, (module.q_norm.weight, module.k_norm.weight))
        for names in SHARED:
            adapted = [
                layer for n in names if isinstance(layer := getattr(module, n, None), LoraLinear)
            ]
            for layer in adapted[1:]:
                if adapted[0].joins(layer):
                    reach(adapted[0], layer.parameters())
