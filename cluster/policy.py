"""What happens next when a run breaks, or its cluster grows or shrinks.

Pure: facts in, a decision out; no clock, no Ray. `trimpot train` and `trimpot simulate` ask the
same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "preempted",
    "crash",
    "node lost",
    "no room",
    "hang",
    "corruption",
    "out of memory",
    "exception",
    "storage",
    "mistake",
]
"""Verdict on a failure.

- preempted: a node was taken away, or is about to be, and said so.
- crash: a worker's process ended without an exception of its own (killed, segmentation fault).
- node lost: a node went without notice, with the workers on it.
- no room: the cluster could not start the workers in time.
- hang: no worker made progress. corruption: workers that must hold equal weights did not.
- out of memory: of the GPU or the host. exception: raised in a worker, of no kind known here.
- storage: the run's folder could not be written or read.
- mistake: what the user must mend, or a loss that cannot be trained further: never retried.
"""

FINAL: frozenset[Kind] = frozenset({"mistake"})
UNCOUNTED: frozenset[Kind] = frozenset({"preempted"})
REPRODUCIBLE: frozenset[Kind] = frozenset({"exception", "out of memory"})
"""The same at the same step is no accident: sample k is the same on every start."""
LONGEST_WAIT_S = 60.0
SETTLE_S = 30.0
"""New room must have stood this long before a run grows into it: nodes come in groups. The
default of fleet.grow_after_s."""
STEADY_HOURS = 24.0
"""Expected between failures, before any was met."""
PREEMPTIBLE_HOURS = 4.0
"""The same where nodes may go at any time. Goodput, simulated without notice at 0.7, 3 and 10 hours
between preemptions and stalls of 2 s: 0.932, 0.974 and 0.987; with 24: 0.922, 0.972 and 0.988."""
GROWTH_PAYS = 2.0
"""A restart must win back this many times what it costs."""

ADVICE: dict[Kind, str] = {
    "preempted": "nothing to do; a node was taken back by its owner",
    "crash": "if it comes back: the node's dmesg says whether the kernel killed it for memory",
    "node lost": "if it comes back: look at the node, or set fleet.preemptible",
    "no room": "add nodes, lower fleet.workers, or raise fleet.start_timeout_s",
    "hang": "look at the stacks that were dumped, and at the network between the nodes",
    "corruption": "take the node of the named rank out of the cluster: its memory is not to trust",
    "out of memory": "lower optim.micro_batch_size or data.max_length, or set "
    "model.activation_checkpointing",
    "exception": "it is raised by code: see failure.log",
    "storage": "make room on output_dir's storage, and check that every node mounts it",
    "mistake": "mend what it names, and start again",
}


@dataclass(frozen=True)
class Limits:
    """What a run allows. Workers come in groups of `sequence_parallel_size`, which compute one
    micro-batch together."""

    min_workers: int
    max_workers: int
    micro_batches: int
    """Of one optimizer step."""
    sequence_parallel_size: int = 1
    max_failures: int = 3
    """Counted failures in a row, without a newer checkpoint between them, that end the run."""
    preemptible: bool = False
    """Nodes may go at any time: losing one is no failure."""

    @property
    def elastic(self) -> bool:
        return self.min_workers < self.max_workers

    def rounds(self, workers: int) -> int:
        """Micro-batches that each group computes, one after the other, in a step."""
        lanes = max(1, workers // self.sequence_parallel_size)
        return -(-self.micro_batches // lanes)


@dataclass(frozen=True)
class Failure:
    kind: Kind
    text: str
    """One line: what happened, and to whom."""
    step: int
    """The newest step that was done."""
    saved: int
    """The newest step that a durable checkpoint holds."""
    rank: int | None = None
    node: str | None = None


@dataclass(frozen=True)
class Decision:
    restart: bool
    wait_s: float
    """Before the restart."""
    why: str


def decide(failure: Failure, history: Sequence[Failure], limits: Limits) -> Decision:
    """Whether to start again after `failure`. `history`: the failures before it, oldest first."""
    if failure.kind in FINAL:
        return Decision(False, 0.0, "starting again would not help")
    if failure.kind in REPRODUCIBLE and any(_same(failure, before) for before in history):
        return Decision(
            False, 0.0, f"the same error twice after step {failure.step} is no accident"
        )
    stuck = 0  # failures since the newest checkpoint was made, this one included
    counted = int(_counts(failure, limits))
    for before in reversed(history):
        if before.saved < failure.saved:
            break
        stuck += 1
        counted += int(_counts(before, limits))
    if counted > limits.max_failures:
        return Decision(
            False, 0.0, f"{counted} failures without a new checkpoint; {limits.max_failures} are "
            "allowed (fleet.max_failures)",
        )  # fmt: skip
    wait_s = 0.0 if not stuck else min(LONGEST_WAIT_S, 2.0 ** (stuck - 1))
    spared = "" if _counts(failure, limits) else ", not counted"
    return Decision(True, wait_s, f"starting again from step {failure.saved}{spared}")


def _counts(failure: Failure, limits: Limits) -> bool:
    taken = limits.preemptible and failure.kind == "node lost"
    return failure.kind not in UNCOUNTED and not taken


def _same(one: Failure, other: Failure) -> bool:
    return (one.kind, one.step, one.text) == (other.kind, other.step, other.text)


def choose_workers(room: int, limits: Limits) -> int | None:
    """How many workers to start where `room` fit: the fewest that need no more rounds a step than
    all of them would; None where that is less than the run allows."""
    each = limits.sequence_parallel_size
    lanes = min(room, limits.max_workers) // each
    least = -(-limits.min_workers // each)
    if lanes < max(1, least):
        return None
    lanes = min(lanes, max(limits.micro_batches, least))
    return max(least, -(-limits.micro_batches // limits.rounds(lanes * each))) * each


def worth_growing(
    workers: int, room: int, limits: Limits, left_s: float, restart_s: float
) -> int | None:
    """How many workers to go on with where `room` fit and `workers` run; None to stay.

    `left_s`: what is left of the run at its present speed. `restart_s`: what saving, leaving and
    starting again cost. Steps are taken to last in proportion to their rounds.
    """
    better = choose_workers(room, limits)
    if better is None or better <= workers:
        return None
    won_s = left_s * (1 - limits.rounds(better) / limits.rounds(workers))
    return better if won_s > GROWTH_PAYS * restart_s else None


def expected_hours_between_failures(prior_hours: float, hours: float, failures: int) -> float:
    """Mean time between failures as a run has met it, leaning on `prior_hours` while it is young.

    The mean of a gamma posterior whose prior counts as one failure in `prior_hours`.
    """
    return (prior_hours + hours) / (1 + failures)


def prior_hours(said: float | None, preemptible: bool) -> float:
    """Mean time between failures to expect of a run that has met none. `said`: by its config."""
    if said is not None:
        return said
    return PREEMPTIBLE_HOURS if preemptible else STEADY_HOURS
