"""lora_linear in C++: the base product and the low-rank update in one pass over the result.

Four arithmetics of the base product: int16 in block fixed point, bf16x3 on AMX tiles, fp32 in
tiles of our own, and torch's (`torch`). Adapters are fp32 in all of them, but for the products
that share an operand with the base in int16 or bf16x3. `rates.choose` says which is taken.

Signatures as in ops/lora_linear.py. M tokens, K = d_in, N = d_out, R = rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimpot.kernels.cpp import gemm, rates, tensors
from trimpot.kernels.cpp.gemm import Update
from trimpot.kernels.ops import lora_linear as definition

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class LoraLinear:
    """`arithmetic`: fp32 | int16 | bf16x3, or auto for the fastest that low precision permits."""

    arithmetic: str = "auto"

    def forward(
        self,
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
        """→ ys [M, N_j] in x's dtype, ss [M, R] likewise."""
        kind, group = self._take(x, weights)
        if kind == "torch":
            return definition.forward(x, weights, biases, a, b, scales, dropouts, seeds, segments)
        call = _Call(kind, x, weights, a, b, scales, dropouts, seeds, segments, group)
        ss = call.shrink()
        ys: Tensors = []
        for j, bias in enumerate(biases):
            y = tensors.empty((x.shape[0], weights[j].shape[0]))
            call.base(j, y, gemm.single(bias[None])[0] if bias.numel() else None, ss[j])
            ys.append(y.to(x.dtype))
        return ys, [s.to(x.dtype) for s in ss]

    def backward(
        self,
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
        """→ dx [M, K] or empty, dA_j [n, R, K], dB_j [n, N_j, R]."""
        kind, group = self._take(x, weights)
        if kind == "torch":
            return definition.backward(
                dys, x, weights, a, b, ss, scales, dropouts, seeds, segments, need_dx
            )
        call = _Call(kind, x, weights, a, b, scales, dropouts, seeds, segments, group)
        dx = tensors.empty(x.shape if need_dx else (0,))
        das, dbs = call.gradients([gemm.readable(dy) for dy in dys], ss, dx if need_dx else None)
        das = [d.to(p.dtype) for d, p in zip(das, a, strict=True)]
        dbs = [d.to(p.dtype) for d, p in zip(dbs, b, strict=True)]
        return dx.to(x.dtype), das, dbs

    def _take(self, x: torch.Tensor, weights: Tensors) -> tuple[str, Any]:
        tensors.check("lora_linear", x)
        outputs = sum(weight.shape[0] for weight in weights)
        kind = rates.choose(self.arithmetic, x.dtype, x.shape[1], outputs)
        form = rates.PACKED.get(kind)
        if form is None:
            return kind, None
        group = gemm.packed(weights, form.pack_weights)
        return (kind, group) if group is not None else ("fp32", None)


class _Call:
    """One call's operands. `group`: the weights, packed for this kind of arithmetic; None in
    fp32.

    Low-rank products are ours too: MKL's bits follow the number of threads and where x lies (seen
    on AMD at 10 rows). It is faster: 0.50 ms to our 0.83 for 2,048 x 576 by rank 16.
    """

    def __init__(
        self,
        kind: str,
        x: torch.Tensor,
        weights: Tensors,
        a: Tensors,
        b: Tensors,
        scales: Sequence[float],
        dropouts: Sequence[float],
        seeds: torch.Tensor,
        segments: torch.Tensor,
        group: Any,
    ):
        self.form: Any = rates.PACKED.get(kind)
        self.x = gemm.readable(x) if group else gemm.single(x)
        self.weights = [gemm.readable(weight) for weight in weights]
        self.a = [p.detach().float().contiguous() for p in a]
        self.b = [p.detach().float().contiguous() for p in b]
        self.adapters = a[0].shape[0]
        self.scales, self.dropouts = scales, dropouts
        self.seeds = seeds.tolist()
        self.segments: list[list[int]] = segments.tolist()
        self.group = group
        # One adapter for all rows: its update is part of the base product's tiles.
        self.whole = self.segments == [[0, 0, x.shape[0]]]
        self.fused = self.whole and not dropouts[0]
        self.rank = a[0].shape[1]

    @functools.cached_property
    def x_fp32(self) -> torch.Tensor:
        return gemm.single(self.x)

    @functools.cached_property
    def rows(self) -> Any:
        return self.form.quantise_input(self.x, self.group)

    def scale(self, j: int, adapter: int) -> float:
        return self.scales[j * self.adapters + adapter]

    def dropped(self, j: int, adapter: int, first: int, count: int) -> torch.Tensor:
        """D_j · x for a segment's rows."""
        rows, p = self.x_fp32[first : first + count], self.dropouts[adapter]
        return gemm.dropped(rows, first, self.seeds[j][adapter], p) if p else rows

    def shrink(self) -> Tensors:
        """S_j = (D_j · x) A_jᵀ."""
        siblings, tokens = len(self.a), self.x.shape[0]
        if self.fused and self.group and self.group.even:
            joint = torch.empty(tokens, siblings * self.rank)
            self.form.skinny(self.rows, torch.cat([a[0] for a in self.a]), self.group, joint)
            return [part.clone() for part in joint.split(self.rank, 1)]  # see `gradients`
        ss = [torch.zeros(tokens, self.rank) for _ in self.a]
        for adapter, first, count in self.segments:
            for j, a in enumerate(self.a):
                x = self.dropped(j, adapter, first, count)
                gemm.forward_fp32(x, a[adapter], ss[j][first : first + count], None, None)
        return ss

    def base(self, j: int, y: torch.Tensor, bias: torch.Tensor | None, s: torch.Tensor) -> None:
        """y = x W_jᵀ + bias + scale S_j B_jᵀ."""
        update = Update(s, gemm.panels(self.b[j][0], self.scale(j, 0))) if self.whole else None
        if self.group:
            self.form.forward(self.rows, self.group.packs[j], y, bias, update)
        else:
            gemm.forward_fp32(self.x, self.weights[j], y, bias, update)
        if self.whole:
            return
        for adapter, first, count in self.segments:
            rows = slice(first, first + count)
            b_RN = self.b[j][adapter].T * self.scale(j, adapter)
            gemm.gradient_fp32(s[rows], b_RN.contiguous(), y[rows], True, None)

    def gradients(
        self, dys: Tensors, ss: Tensors, dx: torch.Tensor | None
    ) -> tuple[Tensors, Tensors]:
        joint = torch.zeros(self.x.shape[0], len(dys) * self.rank)
        dss = joint.split(self.rank, 1)
        dbs: Tensors = []
        for j, dy in enumerate(dys):
            quantised = None
            if self.group:
                quantised = self.form.quantise_gradient(dy, self.group.packs[j])
            dy = gemm.single(dy)
            self._shrink_gradient(j, dy, quantised, dss[j])
            dbs.append(self._outer_b(j, dy, gemm.single(ss[j])))
            if dx is not None:
                self._input_gradient(j, dy, quantised, dss[j], dx)
        if self.fused:
            both = gemm.outer(joint, self.x_fp32)
            # Copies: outputs of an op may not share memory.
            return [part.clone()[None] for part in both.split(self.rank)], dbs
        return [self._outer_a(j, dss[j]) for j in range(len(dys))], dbs

    def _shrink_gradient(self, j: int, dy: torch.Tensor, quantised: Any, ds: torch.Tensor) -> None:
        """dS_j = scale dY_j B_j."""
        pack = self.group.packs[j] if self.group else None
        if self.whole and pack and pack.even and quantised:
            self.form.skinny_gradient(quantised, self.b[j][0], pack, self.scale(j, 0), ds)
            return
        for adapter, first, count in self.segments:
            rows = slice(first, first + count)
            gemm.gradient_fp32(dy[rows], self.b[j][adapter], ds[rows], False, None)
            ds[rows] *= self.scale(j, adapter)

    def _outer_b(self, j: int, dy: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """dB_j = scale dY_jᵀ S_j."""
        out = torch.zeros(self.b[j].shape)
        for adapter, first, count in self.segments:
            rows, scale = slice(first, first + count), self.scale(j, adapter)
            out[adapter] += gemm.outer(s[rows], dy[rows], scale).T
        return out

    def _outer_a(self, j: int, ds: torch.Tensor) -> torch.Tensor:
        """dA_j = dS_jᵀ (D_j · x)."""
        out = torch.zeros(self.a[j].shape)
        for adapter, first, count in self.segments:
            x = self.dropped(j, adapter, first, count)
            out[adapter] += gemm.outer(ds[first : first + count], x)
        return out

    def _input_gradient(
        self,
        j: int,
        dy: torch.Tensor,
        quantised: Any,
        ds: torch.Tensor,
        dx: torch.Tensor,
    ) -> None:
        """dx (+)= dY_j W_j + D_j · (dS_j A_j)."""
        update = Update(ds, self.a[j][0]) if self.fused else None
        if self.group and quantised:
            self.form.gradient(quantised, self.group.packs[j], dx, j > 0, update)
        else:
            gemm.gradient_fp32(dy, self.weights[j], dx, j > 0, update)
        if self.fused:
            return
        for adapter, first, count in self.segments:
            rows, p = slice(first, first + count), self.dropouts[adapter]
            if not p:
                gemm.gradient_fp32(ds[rows], self.a[j][adapter], dx[rows], True, None)
                continue
            part = tensors.empty((count, dx.shape[1]))
            gemm.gradient_fp32(ds[rows], self.a[j][adapter], part, False, None)
            dx[rows] += gemm.dropped(part, first, self.seeds[j][adapter], p)


variant = LoraLinear
"""`variant("int16")`: the same functions with that arithmetic."""
_default = LoraLinear()
forward, backward = _default.forward, _default.backward
