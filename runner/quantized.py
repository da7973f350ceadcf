"""A base model whose linear layers are held in NF4, all but the output layer: read and quantised
weight by weight, so that no worker holds the model in 16 bits at any time.

From a folder of unquantised weights, or one that bitsandbytes has quantised, whose bits are taken
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import nf4
from trimpot.kernels.ops.nf4 import Nf4
from trimpot.runner import hub
from trimpot.runner.adapters.nf4_linear import Nf4Linear, nf4_layers
from trimpot.runner.errors import ModelError
from trimpot.runner.plan.facts import weight_files
from trimpot.runner.plan.nf4_files import AGAIN, STATE, read_state

Tensors = Mapping[str, Callable[[], torch.Tensor]]
"""{name in the files: reads it}"""


def load_nf4(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    double_quant: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """As hub.load_causal_lm, with linear layers in NF4; all else in `dtype`. Raises ModelError.

    `double_quant`: of weights that are not quantised yet. `backend` dequantises.
    """
    with _opened(folder) as tensors:
        empty = hub.empty_causal_lm(folder)
        names = {n for n, m in empty.named_modules() if isinstance(m, nn.Linear)} - head_of(empty)
        stored = {key.removesuffix(f".weight{STATE}") for key in tensors if key.endswith(STATE)}
        if odd := sorted(stored - names):
            raise ModelError(f"{folder} holds {odd[0]} in 4 bits, no linear layer inside; {AGAIN}")
        if not stored and not all(f"{name}.weight" in tensors for name in names):
            config: Any = empty.config
            own = config.dtype or torch.float32
            return _load_whole(folder, own, dtype, attention, double_quant, backend)
        held: dict[str, Nf4] = {}
        for name in sorted(stored or names):
            held[name] = (
                _read(folder, name, tensors)
                if stored
                else _quantised(folder, name, tensors[f"{name}.weight"](), double_quant)
            )
            layer = empty.get_submodule(name)
            wanted = (layer.out_features, layer.in_features)
            if held[name].shape != wanted:
                raise ModelError(f"{folder}: {name} is {held[name].shape}, not {wanted}")
        model = hub.fill_causal_lm(
            empty, folder, _rest(tensors, held, dtype), dtype=dtype, attention=attention
        )
    for name, weight in held.items():
        _put(model, name, weight, dtype, backend)
    return model


def dequantise_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Each NF4 layer to a plain one with the weight that it stands for, in place."""
    for name, layer in nf4_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dequantised(dtype), requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        _replace(model, name, plain)


@contextmanager
def unquantised(folder: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Reads a linear layer's weight [N, K] by the layer's name, from files that hold it whole."""
    with _opened(folder) as tensors:

        def read(name: str) -> torch.Tensor:
            if f"{name}.weight" not in tensors:
                raise ModelError(
                    f"{folder} has no {name}.weight for adapter.lora_init=quantization_error to "
                    "compare 4 bits with; set lora_init=random"
                )
            return tensors[f"{name}.weight"]()

        yield read


def head_of(model: nn.Module) -> set[str]:
    """The name of the output layer, if there is one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name for name, module in model.named_modules() if module is head}


@contextmanager
def _opened(folder: Path) -> Iterator[Tensors]:
    with ExitStack() as stack:
        tensors: dict[str, Callable[[], torch.Tensor]] = {}
        try:
            for path in weight_files(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118
                    tensors[key] = lambda key=key, file=file: file.get_tensor(key)
            yield tensors
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder} can't be read: {error}; download it again") from None


def _rest(tensors: Tensors, held: Mapping[str, Nf4], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is not in 4 bits; and for what is, zeros that have the shape and no memory."""
    rest: dict[str, torch.Tensor] = {}
    for key, read in tensors.items():
        name, _, part = key.partition(".weight")
        if name not in held or not key.startswith(f"{name}.weight"):
            rest[key] = read()
        elif not part:
            rest[key] = torch.zeros((), dtype=dtype).expand(held[name].shape)
    return rest


def _load_whole(
    folder: Path,
    own: torch.dtype,
    dtype: torch.dtype,
    attention: str,
    double_quant: bool,
    backend: str,
) -> nn.Module:
    """Of files whose names transformers translates while it loads: in their `own` type at first,
    so that the 4 bits are the same whatever `dtype` is."""
    model = hub.load_causal_lm(folder, dtype=own, attention=attention, deepspeed=None)
    head = head_of(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name not in head:
            weight = _quantised(folder, name, layer.weight.detach(), double_quant)
            _put(model, name, weight, dtype, backend)
    for parameter in model.parameters():  # and no buffers: rotary frequencies stay fp32
        parameter.data = parameter.data.to(dtype)
    return model


def _quantised(folder: Path, name: str, weight: torch.Tensor, double_quant: bool) -> Nf4:
    try:
        return nf4.quantise(weight, double_quant)
    except KernelError as error:
        raise ModelError(f"{folder}: {name} can't be held in 4 bits: {error}") from None


def _read(folder: Path, name: str, tensors: Tensors) -> Nf4:
    """A weight as bitsandbytes has written it."""
    weight = f"{name}.weight"
    try:
        state = read_state(bytes(tensors[f"{weight}{STATE}"]().tolist()), weight)
        none = torch.empty(0)
        held = Nf4(
            tensors[weight]().flatten(),
            tensors[f"{weight}.absmax"](),
            tensors[f"{weight}.nested_absmax"]() if state.double_quant else none,
            tensors[f"{weight}.nested_quant_map"]() if state.double_quant else none,
            state.offset,
            state.shape,
        )
        code = tensors[f"{weight}.quant_map"]()
    except KeyError as error:
        raise ModelError(f"{folder} lacks {error.args[0]}; {AGAIN}") from None
    if not torch.equal(code, torch.tensor(nf4.CODE)):
        raise ModelError(f"{folder}: {name} is not in the code of NF4; {AGAIN}")
    try:
        nf4.check(held)
    except KernelError as error:
        raise ModelError(f"{folder}: {name}: {error}; download it again") from None
    return held


def _put(model: nn.Module, name: str, weight: Nf4, dtype: torch.dtype, backend: str) -> None:
    bias = model.get_submodule(name).bias
    assert bias is None or isinstance(bias, nn.Parameter)
    _replace(model, name, Nf4Linear(weight, bias, dtype, backend))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.train(model.training))
