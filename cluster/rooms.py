"""How many workers fit on a Ray cluster's nodes, and which nodes will go."""

from __future__ import annotations

import logging
import time
from typing import Any

from trimpot.runner.types import Plan

log = logging.getLogger(__name__)
ANSWER_S = 3.0
"""A node that is there starts a task of nothing in this time."""
DEAD_S = 60.0
"""A cluster's head has told by then that a node is lost (15 to 30 s with Ray's defaults)."""


class Rooms:
    """One cluster, as seen by one plan's workers."""

    def __init__(self, ray: Any, plan: Plan):
        self.ray = ray
        self.each: dict[str, float] = {"CPU": plan.config.fleet.cpus_per_worker}
        if gpus := worker_gpus(plan):
            self.each["GPU"] = gpus

    def workers(self, ours: int | None = None) -> int:
        """How many fit on nodes that are to stay, if nobody else used them.

        `ours`: so many run already; then beside them only what is free counts.
        """
        leaving = self.leaving()
        room = 0
        for node in self.ray.nodes():
            if node["Alive"] and node["NodeID"] not in leaving:
                has = node["Resources"]
                room += min(int(has.get(name, 0) // each) for name, each in self.each.items())
        if ours is not None:
            free = self.ray.available_resources()
            fit = min(int(free.get(name, 0) // each) for name, each in self.each.items())
            room = min(room, ours + fit)
        return room

    def leaving(self) -> frozenset[str]:
        """Ids of nodes that are being drained: of which their owner gave notice."""
        from ray._private.state import state

        asked = getattr(state, "get_draining_nodes", None)  # Ray's own; not in each version
        return frozenset(asked() or ()) if asked is not None else frozenset()

    def request(self, workers: int) -> None:
        """Ask the cluster's autoscaler, if it has one, for room for so many."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[self.each] * workers)

    def missing(self, workers: int, waited_s: float) -> str:
        """What the cluster lacks for so many workers, as one line."""
        has = self.ray.cluster_resources()
        short = [n for n, each in self.each.items() if has.get(n, 0) < each * workers]
        name = (short or list(self.each))[0]
        where = "" if short else " in pieces that are too small"
        return (
            f"{workers} workers want {self.each[name] * workers:g} {name}s and the cluster has "
            f"{has.get(name, 0):g}{where} after {waited_s:g} s; "
            "set fleet.workers lower, or add nodes"
        )

    def settle(self, nodes: list[str]) -> frozenset[str]:
        """Wait until each of these nodes answers or is known to be lost → the lost ones. Workers
        must not be placed on one that nobody knows yet to be gone."""
        deadline = time.monotonic() + DEAD_S
        waiting = {*nodes}
        while waiting and time.monotonic() < deadline:
            waiting = {n for n in waiting & self._alive() if not self._answers(n)}
        return frozenset({*nodes} - self._alive())

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}

    def _answers(self, node: str) -> bool:
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = self.ray.remote(_nothing).options(
            num_cpus=0, max_retries=0, scheduling_strategy=there
        )
        answer = task.remote()
        try:
            self.ray.get(answer, timeout=ANSWER_S)
        except RayError:
            self.ray.cancel(answer, force=True)
            return False
        return True


def _nothing() -> None:
    """What a node is asked to do to see whether it is there."""


def worker_gpus(plan: Plan) -> int:
    """GPUs of each worker: as the config says, else one where the cluster has any."""
    gpus = plan.config.fleet.gpus_per_worker
    if gpus != "auto":
        return gpus
    import ray

    return 1 if ray.cluster_resources().get("GPU", 0) else 0
