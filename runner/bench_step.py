"""`trimpot bench step`: one training step of ours against transformers + PEFT, in paired rounds.

Before anything is timed, each side's gradients of the same batch are taken and held against
those of transformers + PEFT in float32: how close arithmetic is belongs beside how fast.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimpot.kernels.bench.environment import environment
from trimpot.kernels.bench.stats import paired_ratio, spread
from trimpot.kernels.dispatch import arithmetics
from trimpot.runner import hub
from trimpot.runner.bench_work import step_work
from trimpot.runner.bench_workloads import Workload, find_workload, write_model
from trimpot.runner.errors import ConfigError, TrainError

REFERENCE, LOW = "fp32", "bf16"
PEERS = ("fp32", "bf16", "fp32-documents")
COMPILED = "fp32-compiled"
"""Asked for by name only: it compiles for minutes before the first round."""

FAR_BEHIND = 8
"""A side which takes that many times as long as the fastest is not the peer to beat: bf16 takes 20
on a CPU without instructions for it, minutes a step at S. It is timed once, as the rounds begin."""

Say = Callable[[str], None]


def default_variants() -> tuple[str, ...]:
    """What is fastest here among what errs by at most half of bfloat16's error.

    One: all sides are in memory at once, 16 GiB at S.
    """
    return ("bf16x3" if "bf16x3" in arithmetics() else "int16",)


@dataclass
class Process:
    """A side that runs; see bench_sides."""

    name: str
    inner: subprocess.Popen[str]
    log: Path

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Raises TrainError where the side has died."""
        assert self.inner.stdin is not None
        try:
            self.inner.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.inner.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: what it said last is in the log, which answer() reads
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.inner.stdout is not None
        if line := self.inner.stdout.readline():
            return json.loads(line)
        self.inner.wait()
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TrainError(f"bench step, {self.name}: {said[-1] if said else 'ended silently'}")

    def stop(self) -> None:
        if self.inner.stdin is not None:
            self.inner.stdin.close()
        self.inner.wait()
        if self.inner.stdout is not None:
            self.inner.stdout.close()


def bench_step(
    names: Sequence[str],
    variants: Sequence[str],
    peers: Sequence[str],
    tokens: int | None,
    threads: int,
    repeats: int,
    say: Say,
) -> dict[str, Any]:
    """→ {"rows": one per workload and peer, of the first variant; "other_variants": the same of
    the others; "shares": per workload, with the least work of each op and the roofline measured
    beside it; "environment"}. Raises ConfigError, KernelError, TrainError."""
    workloads = [find_workload(name, tokens) for name in names]
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "the peer of bench step is PEFT, which is missing; pip install trimpot[bench]"
        )
    if unknown := [peer for peer in peers if peer not in (*PEERS, COMPILED)]:
        known = ", ".join((*PEERS, COMPILED))
        raise ConfigError(f"--peer {unknown[0]} is not known; there are {known}")
    result: dict[str, Any] = {"rows": [], "other_variants": [], "shares": []}
    result["environment"] = {**environment("cpu"), "threads": threads}
    with tempfile.TemporaryDirectory(prefix="trimpot-step-") as scratch:
        for workload in workloads:
            folder = _model_folder(workload, Path(scratch))
            bench = _Bench(workload, folder, Path(scratch), threads, say)
            found = bench.run(variants, peers, repeats)
            result["rows"] += [row for row in found["rows"] if row["wanted"] == variants[0]]
            result["other_variants"] += [
                row for row in found["rows"] if row["wanted"] != variants[0]
            ]
            result["shares"].append(found["shares"])
    return result


def _model_folder(workload: Workload, scratch: Path) -> Path:
    if isinstance(workload.model, Path):
        return workload.model
    folder = scratch / workload.model.name
    if not folder.is_dir():
        write_model(workload.model, folder)
    return folder


@dataclass
class _Bench:
    workload: Workload
    folder: Path
    scratch: Path
    threads: int
    say: Say

    def run(self, variants: Sequence[str], peers: Sequence[str], repeats: int) -> dict[str, Any]:
        ours = [f"ours:{variant}" for variant in variants]
        others = [p for p in peers if self.workload.packed or not p.endswith("-documents")]
        needed = list(dict.fromkeys([*ours, *others, REFERENCE, LOW]))
        sides = {name: self._start(name) for name in needed}
        try:
            for side in sides.values():
                side.answer()
            errors, about = self._gradients(sides)
            for name in [name for name in sides if name not in (*ours, *others)]:
                sides.pop(name).stop()
            steps = self._rounds(sides, repeats)
            shares = sides[ours[0]].ask("shares")
            roofline = sides[ours[0]].ask("roofline")
        finally:
            for side in sides.values():
                side.stop()
        rows = [self._row(mine, peer, steps, errors, about) for mine in ours for peer in others]
        facts = hub.model_facts(str(self.folder), None)
        work = step_work(facts, self.workload.documents, self.workload.method)
        return {
            "rows": rows,
            "shares": {
                "workload": self.workload.name,
                "variant": about[ours[0]].get("variant", variants[0]),
                "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
                "seconds": spread([step["seconds"] for step in steps[ours[0]]]).p50,
                "work": {op: {"flops": w.flops, "bytes": w.bytes} for op, w in work.items()},
                "roofline": roofline,
            },
        }

    def _start(self, name: str) -> Process:
        spec = {
            "side": name,
            "folder": str(self.folder),
            "documents": self.workload.documents,
            "method": self.workload.method,
            "threads": self.threads,
        }
        log = self.scratch / f"{name.replace(':', '-')}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as file:
            inner = subprocess.Popen(
                [sys.executable, "-m", "trimpot.runner.bench_sides", json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                env=environment, text=True,
            )  # fmt: skip
        return Process(name, inner, log)

    def _gradients(
        self, sides: dict[str, Process]
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """({side: ‖g − reference‖ / ‖reference‖ over all it trains}, {side: what it says})."""
        about: dict[str, dict[str, Any]] = {}
        paths: dict[str, Path] = {}
        for name, side in sides.items():
            self.say(f"{self.workload.name}: gradients of {name}")
            paths[name] = self.scratch / f"{name.replace(':', '-')}.npz"
            about[name] = side.ask("gradients", path=str(paths[name]))
        reference = dict(np.load(paths[REFERENCE]))
        errors = {
            name: relative_error(dict(np.load(path)), reference) for name, path in paths.items()
        }
        return errors, about

    def _rounds(self, sides: dict[str, Process], repeats: int) -> dict[str, list[dict[str, Any]]]:
        """Each round asks every side for a step, in turning order; a first round warms up, and is
        the only one for a side far behind."""
        first = {name: side.ask("step") for name, side in sides.items()}
        fastest = min(step["seconds"] for step in first.values())
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for name, step in first.items():
            if step["seconds"] > FAR_BEHIND * fastest:
                slower = step["seconds"] / fastest
                self.say(f"{self.workload.name}: {name} is {slower:.0f} times slower: timed once")
                steps[name].append(step)
        names = [name for name in sides if not steps[name]]
        for number in range(1, repeats + 1):
            self.say(f"{self.workload.name}: round {number} of {repeats}")
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                steps[name].append(sides[name].ask("step"))
        return steps

    def _row(
        self,
        mine: str,
        peer: str,
        steps: dict[str, list[dict[str, Any]]],
        errors: dict[str, float],
        about: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        ours_s = [step["seconds"] for step in steps[mine]]
        peer_s = [step["seconds"] for step in steps[peer]]
        ours_cpu = [step["cpu_seconds"] for step in steps[mine]]
        peer_cpu = [step["cpu_seconds"] for step in steps[peer]]
        middle = spread(ours_s).p50
        pairs = ours_s if len(peer_s) == len(ours_s) else [middle] * len(peer_s)
        paired = paired_ratio(pairs, peer_s)
        ours_bytes = max(step["peak_bytes"] for step in steps[mine])
        peer_bytes = max(step["peak_bytes"] for step in steps[peer])
        tokens = self.workload.tokens
        return {
            "workload": self.workload.name,
            "peer": title(peer, self.workload),
            "variant": about[mine].get("variant", mine.removeprefix("ours:")),
            "wanted": mine.removeprefix("ours:"),
            "threads": self.threads,
            "ratio": round(spread(peer_s).p50 / middle, 4),
            "ratio_low": round(paired.p20, 4),
            "ratio_high": round(paired.p80, 4),
            "cpu_ratio": round(spread(peer_cpu).p50 / spread(ours_cpu).p50, 4),
            "memory_ratio": round(ours_bytes / peer_bytes, 4),
            "gradient_error": errors[mine],
            "bf16_gradient_error": errors[LOW],
            "tokens_per_second": round(tokens / middle, 2),
            "peer_tokens_per_second": round(tokens / spread(peer_s).p50, 2),
            "peak_bytes": ours_bytes,
            "peer_peak_bytes": peer_bytes,
            "loss": about[mine]["loss"],
            "peer_loss": about[peer]["loss"],
            "repeats": min(len(ours_s), len(peer_s)),
            "kernels": about[mine].get("kernels", {}),
        }


def title(peer: str, workload: Workload) -> str:
    dtype, _, way = peer.partition("-")
    library = "transformers" if workload.method == "full" else "transformers + PEFT"
    parts = [library, f"{dtype} sdpa"]
    if way == "compiled":
        parts.append("torch.compile")
    if workload.packed:
        parts.append("one document per micro-batch" if way == "documents" else "dense mask")
    return ", ".join(parts)


def relative_error(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """‖found − reference‖ / ‖reference‖ over all tensors together, in float64.

    Raises TrainError where the two are not of the same tensors: they would not be comparable.
    """
    if found.keys() != reference.keys():
        odd = sorted(found.keys() ^ reference.keys())[0]
        raise TrainError(f"bench step: only one of two sides has a gradient for {odd}")
    pairs = [(found[n].astype(np.float64), reference[n].astype(np.float64)) for n in reference]
    off = sum(float(np.square(a - b).sum()) for a, b in pairs)
    whole = sum(float(np.square(b).sum()) for _, b in pairs)
    return float(np.sqrt(off / whole)) if whole else float("nan")
