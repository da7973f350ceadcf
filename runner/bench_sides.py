"""The sides of `trimpot bench step`, each in a process of its own: ours, and the peers.

A process is told what to do on stdin, a JSON object a line, and answers on stdout likewise. So
every side has its own memory to be measured, and none leaves its heap to another, while the
rounds still alternate between them.

Ours is the runner's model with the runner's kernels. The peer is transformers + PEFT in a plain
loop: loss.backward(), AdamW(fused=True).step(). Both start from the same weights and adapters; with
method full there are no adapters, and no PEFT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trimpot.kernels.bench.measure import peak_status, reset_peak
from trimpot.kernels.bench.roofline import measure_roofline
from trimpot.kernels.heap import keep_freed_memory
from trimpot.runner import hub
from trimpot.runner.adapters import peft_peer
from trimpot.runner.bench_ours import build_ours
from trimpot.runner.bench_workloads import Method, make_batch, trained_tokens
from trimpot.runner.tasks.causal_lm import token_loss_sum

RANK, ALPHA = 16, 32.0
LEARNING_RATE = 1e-4

Batch = dict[str, torch.Tensor]


@dataclass
class Side:
    """A model with what it trains, and what one forward and backward of it is."""

    model: nn.Module
    trained: dict[str, nn.Parameter]
    """Adapters by our names, or with method full all weights by transformers'."""
    backward: Callable[[], float]
    """Adds the gradients of the batch's mean loss; → that loss."""
    about: dict[str, Any]
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def make_side(name: str, folder: Path, documents: list[int], method: Method = "lora") -> Side:
    """`name`: "ours:int16", "ours:fp32" …, or a peer: "fp32", "bf16", "fp32-documents"."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    batch = make_batch(vocabulary, documents)
    if name.startswith("ours:"):
        keep_freed_memory()  # as the runner's workers do; the peer is a plain loop
        built = build_ours(folder, name.removeprefix("ours:"), method, RANK, ALPHA, LEARNING_RATE)
        backward = _mean_loss(built.model, batch)
        side = Side(built.model, built.trained, backward, built.about, built.optimizer)
    else:
        side = _peer(name, folder, batch, documents, method)
    if method == "lora":
        start_adapters(side.trained)
    return side


def _peer(name: str, folder: Path, batch: Batch, documents: list[int], method: Method) -> Side:
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
    model = hub.load_causal_lm(folder, dtype=dtype, attention="sdpa", deepspeed=None)
    if method == "lora":
        model = peft_peer.add_peft(model, RANK, ALPHA)
        trained = peft_peer.adapter_weights(model)
    else:
        trained = dict(model.named_parameters())
    model.train()
    if name.endswith("-compiled"):
        model.compile()
    one_by_one = name.endswith("-documents")
    backward = (
        _by_documents(model, batch, documents) if one_by_one else _as_transformers(model, batch)
    )
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, fused=True)
    return Side(model, trained, backward, {"variant": name}, optimizer)


def _mean_loss(model: nn.Module, batch: Batch) -> Callable[[], float]:
    tokens = trained_tokens(batch)

    def backward() -> float:
        loss = token_loss_sum(model, batch) / tokens
        loss.backward()
        return float(loss.detach())

    return backward


def _as_transformers(model: nn.Module, batch: Batch) -> Callable[[], float]:
    def backward() -> float:
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    return backward


def _by_documents(model: nn.Module, batch: Batch, documents: list[int]) -> Callable[[], float]:
    """One document a micro-batch, gradients accumulated: attention then needs no mask."""
    tokens = trained_tokens(batch)
    ends = np.cumsum(documents).tolist()

    def backward() -> float:
        total = 0.0
        for start, end in zip([0, *ends], ends, strict=False):
            ids = batch["input_ids"][:, start:end]
            loss = model(input_ids=ids, labels=ids).loss * ((end - start - 1) / tokens)
            loss.backward()
            total += float(loss.detach())
        return total

    return backward


def start_adapters(adapters: dict[str, nn.Parameter]) -> None:
    """The same A and B for every side, by name. B is not 0 as at the start of training: half of
    the gradients would be."""
    for name, parameter in sorted(adapters.items()):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[1] ** -0.5 if name.endswith("lora_A") else 0.02
        with torch.no_grad():
            parameter.copy_(values * scale)


def gradients(side: Side, path: Path) -> dict[str, Any]:
    """Write each trained weight's gradient of the first batch, fp32, and forget it."""
    loss = side.backward()
    found = {name: p.grad for name, p in side.trained.items()}
    arrays = {n: g.detach().float().numpy() for n, g in found.items() if g is not None}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    side.model.zero_grad(set_to_none=True)
    return {"loss": loss, **side.about}


def timed_step(side: Side) -> dict[str, Any]:
    resets = reset_peak(trim=False)  # a training loop does not give its heap back either
    wall, cpu = time.perf_counter(), time.process_time()
    loss = side.step()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": loss,
        "peak_bytes": peak_status(resets),
    }


PARTS = {
    "scaled_dot_product": "attention (torch)",
    "flash_attention": "attention (torch)",
    "mm": "GEMM (torch)",
    "addmm": "GEMM (torch)",
    "bmm": "GEMM (torch)",
    "_fused_adamw_": "AdamW (torch)",
}


OWN = re.compile(r"trimpot::(\w+)|GeneratedBackwardFor_trimpot_(\w+?)_default")
"""A custom op's own time is told under the name of the function that autograd made for it."""


def part_of(name: str) -> str:
    """The row of the shares table that an operator of the profile goes into."""
    if named := OWN.match(name):
        return (named[1] or named[2]).removesuffix("_backward")
    plain = name.removeprefix("aten::")
    for key, part in PARTS.items():
        if plain == key or (len(key) > 5 and key in plain):
            return part
    return "elementwise and copies (torch)"


def shares(side: Side) -> dict[str, Any]:
    """{part: share of one step's wall time}, by the profiler; the rest is Python's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        wall = time.perf_counter()
        side.step()
        seconds = time.perf_counter() - wall
    found: dict[str, float] = {}
    for event in profiled.events() or ():
        # What one of our ops calls of torch's is its own.
        above = [event]
        while above[-1].cpu_parent is not None:
            above.append(above[-1].cpu_parent)
        owner = next((e for e in above if OWN.match(e.name)), event)
        part = part_of(owner.name)
        found[part] = found.get(part, 0.0) + event.self_cpu_time_total / 1e6
    found["Python and dispatch"] = max(0.0, seconds - sum(found.values()))
    whole = sum(found.values())
    return {part: round(value / whole, 4) for part, value in found.items()}


def serve(spec: dict[str, Any]) -> None:
    """Build the side, then do what each line of stdin says until there is none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(spec["threads"])

    def answer(values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    side = make_side(spec["side"], Path(spec["folder"]), spec["documents"], spec["method"])
    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "gradients":
                answer(gradients(side, Path(command["path"])))
            case "step":
                answer(timed_step(side))
            case "shares":
                answer(shares(side))
            case "roofline":
                answer(measure_roofline("cpu", [torch.float32]).told())


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
