"""Linear layers that share an input, each with low-rank updates (Hu et al. 2021, §4.1).

M tokens, K = d_in, N_j = d_out of sibling j (q, k and v; gate and up), R = rank, n adapters.
D_j = keep / (1 − p) is counter-based dropout (philox.py): recomputed, never stored.

    S_j = (D_j ⊙ x) A_jᵀ,  Y_j = x W_jᵀ + bias_j + s_j S_j B_jᵀ

    dS_j = s_j dY_j B_j,  dB_j = s_j dY_jᵀ S_j,  dA_j = dS_jᵀ (D_j ⊙ x)
    dx = Σ_j dY_j W_j + D_j ⊙ (dS_j A_j)

W is frozen. Saved for backward are x, S and the seeds. W, A and B are read in the type of x, which
under autocast is autocast's. Several adapters stand in stacks a_j [n, R, K], b_j [n, N_j, R], of
lower rank by zeros; `segments` [S, 3] rows (adapter, first row, rows) say which of them each token
has. Rows in no segment have none, and their S is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.implementation import implementation, resolve
from trimpot.kernels.ops.opmath import as_given, in_working_type
from trimpot.kernels.ops.philox import draw_seeds, dropped

Tensors = list[torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout: float | Sequence[float] = 0.0,
    seeds: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    backend: str = "auto",
) -> Tensors:
    """Y_j [..., N_j] of x [..., K].

    weights: [N_j, K]. a, b: [R, K] and [N_j, R] of one adapter, or stacks of n. scales: J · n
    floats, sibling by sibling. dropout: of all adapters, or one of each. seeds: int64 [J, n],
    drawn from torch's generator where dropout needs them and none are given. segments: int32
    [S, 3] over the rows of x flattened to [M, K]; without them, adapter 0 has all rows.
    Raises KernelError where shapes do not go together.
    """
    x = in_working_type(x)
    a = [p[None] if p.dim() == 2 else p for p in a]
    b = [p[None] if p.dim() == 2 else p for p in b]
    adapters = a[0].shape[0] if a else 0
    rates = [dropout] * adapters if isinstance(dropout, int | float) else list(dropout)
    flat = x.reshape(-1, x.shape[-1])
    given = [None] * len(weights) if biases is None else list(biases)
    _check(flat, weights, given, a, b, scales, rates)
    if seeds is None:
        drawn = any(rates)
        seeds = draw_seeds(len(a), adapters) if drawn else torch.zeros(len(a), adapters).long()
    if segments is None:
        segments = torch.tensor([[0, 0, flat.shape[0]]], dtype=torch.int32)
    _check_tables(seeds, segments, len(a), adapters)
    none = x.new_empty(0)
    ys, _ = _op(
        flat,
        list(weights),
        [none if bias is None else bias for bias in given],
        a,
        b,
        [float(s) for s in scales],
        rates,
        seeds,
        segments,
        backend,
    )
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _check(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    a: Tensors,
    b: Tensors,
    scales: Sequence[float],
    dropouts: Sequence[float],
) -> None:
    if not weights or not len(weights) == len(a) == len(b) == len(biases):
        raise KernelError(
            f"lora_linear: {len(weights)} weights, {len(a)} A, {len(b)} B and {len(biases)} "
            "biases; one of each per sibling is wanted"
        )
    n, rank = a[0].shape[:2] if a[0].dim() == 3 else (0, 0)
    for j, (w, p, q, bias) in enumerate(zip(weights, a, b, biases, strict=True)):
        outputs, depth = w.shape[0] if w.dim() else 0, x.shape[1]
        wanted = ((outputs, depth), (n, rank, depth), (n, outputs, rank))
        if (tuple(w.shape), tuple(p.shape), tuple(q.shape)) != wanted:
            raise KernelError(
                f"lora_linear: x {tuple(x.shape)}, W {tuple(w.shape)}, A {tuple(p.shape)}, "
                f"B {tuple(q.shape)} of sibling {j}; [M, K], [N, K], [n, R, K], [n, N, R] are "
                "wanted, with one n and R for all siblings"
            )
        if bias is not None and tuple(bias.shape) != (outputs,):
            raise KernelError(
                f"lora_linear: bias {tuple(bias.shape)} of sibling {j}; ({outputs},) is wanted"
            )
    if len(scales) != len(a) * n or len(dropouts) != n:
        raise KernelError(
            f"lora_linear: {len(scales)} scales and {len(dropouts)} dropouts; "
            f"{len(a) * n} (siblings × adapters) and {n} (adapters) are wanted"
        )
    if not all(0 <= p < 1 for p in dropouts):
        raise KernelError(f"lora_linear: dropouts are {list(dropouts)}; 0 ≤ p < 1 is wanted")


def _check_tables(
    seeds: torch.Tensor, segments: torch.Tensor, siblings: int, adapters: int
) -> None:
    fits = segments.dim() == 2 and segments.shape[1] == 3
    if not fits or tuple(seeds.shape) != (siblings, adapters):
        raise KernelError(
            f"lora_linear: seeds {tuple(seeds.shape)}, segments {tuple(segments.shape)}; "
            f"({siblings}, {adapters}) and [S, 3] are wanted"
        )


def reference(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    drop: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer with one adapter by the formula, differentiable by torch itself.

    drop: D [M, K], what dropout multiplies x with.
    """
    y = torch.nn.functional.linear(x, w, bias)
    return y + scale * (((x if drop is None else x * drop) @ a.T) @ b.T)


def forward(
    x: torch.Tensor,
    weights: Tensors,
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
) -> tuple[Tensors, Tensors]:
    """→ ys [M, N_j], ss [M, R]. The update is added into the base product: nothing of size MN
    is made besides it."""
    ys, ss = [], []
    cuts, n = segments.tolist(), a[0].shape[0]
    keys = seeds.tolist()
    weights, biases, a, b = (_like(x, group) for group in (weights, biases, a, b))
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.nn.functional.linear(x, weight, bias if bias.numel() else None)
        s = x.new_zeros(x.shape[0], a[j].shape[1])
        for adapter, first, count in cuts:
            rows = slice(first, first + count)
            kept = dropped(x[rows], first, keys[j][adapter], dropouts[adapter])
            torch.mm(kept, a[j][adapter].T, out=s[rows])
            y[rows].addmm_(s[rows], b[j][adapter].T, alpha=scales[j * n + adapter])
        ys.append(y)
        ss.append(s)
    return ys, ss


def backward(
    dys: Tensors,
    x: torch.Tensor,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    ss: Tensors,
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
    need_dx: bool,
) -> tuple[torch.Tensor, Tensors, Tensors]:
    """→ dx (empty where it is not needed), dA_j, dB_j."""
    dx = x.new_empty(x.shape if need_dx else 0)
    types = [p.dtype for p in a], [p.dtype for p in b]
    weights, a, b = (_like(x, group) for group in (weights, a, b))
    das, dbs = [torch.zeros_like(p) for p in a], [torch.zeros_like(p) for p in b]
    cuts, n = segments.tolist(), a[0].shape[0]
    keys = seeds.tolist()
    for j, dy in enumerate(dys):
        if need_dx and j == 0:
            torch.mm(dy, weights[j], out=dx)
        elif need_dx:
            dx.addmm_(dy, weights[j])
        for adapter, first, count in cuts:
            rows, seed, p = slice(first, first + count), keys[j][adapter], dropouts[adapter]
            scale = scales[j * n + adapter]
            ds = (dy[rows] @ b[j][adapter]).mul_(scale)
            dbs[j][adapter].addmm_(dy[rows].T, ss[j][rows], alpha=scale)
            das[j][adapter].addmm_(ds.T, dropped(x[rows], first, seed, p))
            if not need_dx:
                continue
            if p:
                dx[rows] += dropped(ds @ a[j][adapter], first, seed, p)
            else:
                dx[rows].addmm_(ds, a[j][adapter])
    das, dbs = ([*map(torch.Tensor.to, *pair)] for pair in zip((das, dbs), types, strict=True))
    return dx, das, dbs


def _like(x: torch.Tensor, tensors: Tensors) -> Tensors:
    return [tensor.to(x.dtype) for tensor in tensors]


@torch.library.custom_op("trimpot::lora_linear", mutates_args=())
def _op(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scales: list[float],
    dropouts: list[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
    backend: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    chosen = implementation("lora_linear", resolve("lora_linear", backend, x))
    with as_given(x.device):
        return chosen.forward(x, weights, biases, a, b, scales, dropouts, seeds, segments)


@_op.register_fake
def _(x, weights, biases, a, b, scales, dropouts, seeds, segments, backend):
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return ys, [x.new_empty(x.shape[0], p.shape[1]) for p in a]


@torch.library.custom_op("trimpot::lora_linear_backward", mutates_args=())
def _backward_op(
    dys: list[torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    ss: list[torch.Tensor],
    scales: list[float],
    dropouts: list[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
    need_dx: bool,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    chosen = implementation("lora_linear", resolve("lora_linear", backend, x))
    with as_given(x.device):
        return chosen.backward(
            dys, x, weights, a, b, ss, scales, dropouts, seeds, segments, need_dx
        )


@_backward_op.register_fake
def _(dys, x, weights, a, b, ss, scales, dropouts, seeds, segments, need_dx, backend):
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, [p.new_empty(p.shape) for p in a], [p.new_empty(p.shape) for p in b]


def _setup_context(ctx, inputs, output):
    x, weights, _, a, b, scales, dropouts, seeds, segments, backend = inputs
    ys, ss = output
    # W itself, not a copy or a view: under ZeRO-3 its memory is given back after forward and
    # fetched again for backward, and the saved leaf sees what stands in it then.
    ctx.save_for_backward(x, seeds, segments, *weights, *a, *b, *ss)
    ctx.siblings, ctx.scales, ctx.dropouts, ctx.backend = len(ys), scales, dropouts, backend
    ctx.shapes = [y.shape for y in ys]
    ctx.set_materialize_grads(False)  # of S, which nobody asks for


def _autograd_backward(ctx, dys, _):
    x, seeds, segments, *rest = ctx.saved_tensors
    j = ctx.siblings
    weights, a, b, ss = (rest[i * j : (i + 1) * j] for i in range(4))
    dys = [
        x.new_zeros(shape) if dy is None else dy.to(x.dtype)
        for dy, shape in zip(dys, ctx.shapes, strict=True)
    ]
    need_dx = ctx.needs_input_grad[0]
    dx, das, dbs = _backward_op(
        dys,
        x,
        weights,
        a,
        b,
        ss,
        ctx.scales,
        ctx.dropouts,
        seeds,
        segments,
        need_dx,
        ctx.backend,
    )
    none = [None] * j
    return dx if need_dx else None, none, none, das, dbs, None, None, None, None, None


_op.register_autograd(_autograd_backward, setup_context=_setup_context)
