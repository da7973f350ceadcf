"""The extension's door, as csrc/bindings.cpp defines it. Only kernels/native.py imports it."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

interface: int

def cpu_features() -> list[str]: ...
def hash_variants() -> list[str]: ...
def pack(lengths: NDArray[np.int64], capacity: int, bins: NDArray[np.int64]) -> int: ...
def hash_documents(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    seed: int,
    hashes: NDArray[np.uint64],
    variant: str,
) -> None: ...

# Memory of large tensors, csrc/pool_bindings.cpp. Sizes in bytes.
class Block(Buffer): ...

def pool_block(bytes: int) -> Block | None: ...
def pool_in_use() -> int: ...
def pool_extent() -> int: ...

# Elementwise kernels, csrc/elementwise_bindings.cpp. Addresses: torch's data_ptr(), 0 for none.
# Strides in items. type: kernels/cpp/tensors.py.
rope_widest: int

def elementwise_isa(name: str | None = None) -> str: ...
def norm_forward(
    type: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    y: int,
    s: int,
    rstd: int,
    rows: int,
    columns: int,
    eps: float,
    offset: float,
) -> None: ...
def norm_backward(
    type: int,
    dy: int,
    dy_stride: int,
    ds: int,
    ds_stride: int,
    s: int,
    s_stride: int,
    weight: int,
    rstd: int,
    dx: int,
    partials: int,
    dw: int,
    blocks: int,
    rows: int,
    columns: int,
    offset: float,
) -> None: ...
def glu_forward(
    type: int,
    gelu: bool,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    y: int,
    rows: int,
    columns: int,
) -> None: ...
def glu_backward(
    type: int,
    gelu: bool,
    dy: int,
    dy_stride: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dgate: int,
    dup: int,
    rows: int,
    columns: int,
) -> None: ...

_Strided = tuple[int, int, int, int]  # address, strides of batch, token, head
_Side = tuple[int, _Strided, int, int, int, _Strided, int, int]  # see csrc/rope.h

def rope(
    back: bool,
    type: int,
    angles: tuple[int, int, int, int, int, int, int],  # type, cos, strides, sin, strides
    sizes: tuple[int, int, int, int],  # batch, length, width, half
    blocks: int,
    eps: float,
    offset: float,
    q: _Side,
    k: _Side,
) -> None: ...

_Tokens = tuple[int, int, int]  # address, strides of token and head
_Sizes = tuple[int, int, int, int]  # tokens, heads, heads of keys, width

def attention_forward(
    type: int,
    sizes: _Sizes,
    cuts: list[int],
    scale: float,
    window: int,
    softcap: float,
    q: _Tokens,
    k: _Tokens,
    v: _Tokens,
    o: int,
    lse: int,
) -> None: ...
def attention_backward(
    type: int,
    sizes: _Sizes,
    cuts: list[int],
    scale: float,
    window: int,
    softcap: float,
    q: _Tokens,
    k: _Tokens,
    v: _Tokens,
    o: _Tokens,
    d_o: _Tokens,
    lse: int,
    dq: int,
    dk: int,
    dv: int,
) -> None: ...
def adamw_step(
    param: int,
    grad: int,
    grad_type: int,
    exp_avg: int,
    exp_avg_sq: int,
    copy: int,
    copy_type: int,
    count: int,
    grad_scale: float,
    keep: float,
    beta1: float,
    rest1: float,
    beta2: float,
    rest2: float,
    rate: float,
    correction: float,
    eps: float,
) -> None: ...
def nf4_quantise(
    type: int, weight: int, thresholds: int, packed: int, absmax: int, count: int
) -> None: ...
def nf4_dequantise(
    type: int,
    packed: int,
    absmax: int,
    nested_absmax: int,
    nested_map: int,
    offset: float,
    code: int,
    out: int,
    count: int,
) -> None: ...
def softmax_loss(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    labels: int,
    weights: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    loss: int,
    lse: int,
    gradient: bool,
) -> None: ...
