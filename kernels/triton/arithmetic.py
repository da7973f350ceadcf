"""What kernels with matrix products share: dot in every type, tanh, stages.

float32 on NVIDIA: a product is three tf32 products, of operands split in two, summed for 32 columns
(in skinny products up to 128) and then added in float32. Tensor cores truncate where they
accumulate: a modelled sum of 4,096 that never leaves them is off by 1.5e-4, one of 32 at a time by
1.6e-6, torch's by 1.9e-6. AMD's multiply float32 as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.constexpr_function
def stages(count):
    """Tiles on their way; on AMD they wait in registers, its 64 KiB of shared memory hold one."""
    return min(count, 2) if is_hip() else count


@triton.jit
def dot(a, b, acc):
    """acc + a · b"""
    if a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif is_hip():
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc += tl.dot(a, b, input_precision="tf32x3")
    return acc


@triton.jit
def tanh(x):
    """Within 2 ulp, as in csrc/vec.h: `short_tanh` loses the digits of a small x."""
    # Not by a call: then ptxas keeps all there is (22 spills in token_logprobs on sm_100).
    square = x * x
    p = square * 0.0022958412 - 0.00834698
    p = p * square + 0.021769961
    p = p * square - 0.053959407
    p = p * square + 0.13333304
    p = p * square - 0.33333334
    far = 1.0 - 2.0 / (tl.exp(x + x) + 1.0)
    return tl.where(square < 0.390625, p * square * x + x, far)


@triton.jit
def short_tanh(x):
    """Within 1.2e-7 of tanh, absolutely."""
    return 1.0 - 2.0 / (tl.exp(x + x) + 1.0)
