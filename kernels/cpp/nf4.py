"""4-bit weights in C++ (csrc/nf4.cpp); definition in ops/nf4.py."""

from __future__ import annotations

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp.tensors import check
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.nf4 import BLOCK, CODE, thresholds


def quantise_flat(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kind = check("nf4", weight)
    weight, count = weight.contiguous(), weight.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-count // BLOCK))
    native.extension().nf4_quantise(
        kind, weight.data_ptr(), thresholds().data_ptr(), packed.data_ptr(), absmax.data_ptr(),
        count,
    )  # fmt: skip
    return packed, absmax


def forward(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: float,
    out: torch.Tensor,
) -> None:
    kind = check("nf4", out)
    if packed.device.type != "cpu":
        raise KernelError(
            f"nf4: the weight is on {packed.device}; backend cpp computes on the CPU; use auto"
        )
    code = torch.tensor(CODE)
    nested = absmax.dtype == torch.uint8
    native.extension().nf4_dequantise(
        kind, packed.data_ptr(), absmax.data_ptr(), nested_absmax.data_ptr() if nested else 0,
        nested_map.data_ptr(), offset, code.data_ptr(), out.data_ptr(), out.numel(),
    )  # fmt: skip
