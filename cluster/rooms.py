"""How many workers fit on a Ray cluster's nodes, and which nodes will go."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trimpot.runner.errors import ClusterError
from trimpot.runner.types import Plan

log = logging.getLogger(__name__)
ANSWER_S = 3.0
"""A node that is there starts a task of nothing in this time."""
WORK_S = 20.0
"""How long a node may take to start a task and do it, of those that end a hang."""
DEAD_S = 60.0
"""A cluster's head has told by then that a node is lost (15 to 30 s with Ray's defaults)."""


class Rooms:
    """One cluster, as seen by one plan's workers."""

    def __init__(self, ray: Any, plan: Plan):
        self.ray = ray
        self.each: dict[str, float] = {"CPU": plan.config.fleet.cpus_per_worker}
        if gpus := worker_gpus(plan):
            self.each["GPU"] = gpus

    @contextlib.contextmanager
    def answering(self, before: str = "") -> Iterator[None]:
        """Raises ClusterError where the cluster's head has no answer to what is asked inside.
        `before`: what else is known to be wrong."""
        from ray.exceptions import RayError

        try:
            yield
        except (RayError, ConnectionError, TimeoutError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            first = f"{before}; then " if before else ""
            raise ClusterError(
                f"{first}the Ray cluster did not answer any more: {why}; "
                "start it, and the same command goes on from the newest checkpoint"
            ) from error

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
            asked = dict.fromkeys(waiting & self._alive())
            waiting = {*asked} - {*on_nodes(_nothing, asked, ANSWER_S)}
        return frozenset({*nodes} - self._alive())

    def release(self) -> None:
        """Give back what failed starts of ours hold. Ray Train loses sight of its placement group
        where a worker dies between its set-up and its first work, and the group, which lives as
        long as the driver's job, then keeps its nodes from every start that follows."""
        from ray.util.placement_group import (
            PlacementGroup,
            placement_group_table,
            remove_placement_group,
        )

        ours = self.ray.get_runtime_context().get_job_id()
        for name, group in placement_group_table().items():
            if name.endswith(ours) and group["state"] != "REMOVED":  # its id ends with its job's
                remove_placement_group(
                    PlacementGroup(self.ray.PlacementGroupID(bytes.fromhex(name)))
                )

    def address(self, node: str | None) -> str:
        """Of a node by its id, also of one that is lost; "" where it is not known."""
        found = (n["NodeManagerAddress"] for n in self.ray.nodes() if n["NodeID"] == node)
        return next(found, "")

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}


def _nothing(_: None) -> None:
    """What a node is asked to do to see whether it is there."""


def worker_gpus(plan: Plan) -> int:
    """GPUs of each worker: as the config says, else one where the cluster has any."""
    gpus = plan.config.fleet.gpus_per_worker
    if gpus != "auto":
        return gpus
    import ray

    return 1 if ray.cluster_resources().get("GPU", 0) else 0


def on_nodes(
    function: Callable[..., Any], inputs: Mapping[str, Any], within_s: float = WORK_S
) -> dict[str, Any]:
    """Call a function on nodes, each with its input → {node id: result}, without the nodes that
    do not answer in time. Takes no CPU that a worker would need."""
    if not inputs:
        return {}
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0}
    answers: dict[str, Any] = {}
    for node, value in inputs.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task: Any = ray.remote(function)
        answers[node] = task.options(scheduling_strategy=there, **options).remote(value)
    ready, late = ray.wait([*answers.values()], num_returns=len(answers), timeout=within_s)
    found: dict[str, Any] = {}
    for node, answer in answers.items():
        if answer in ready:
            with contextlib.suppress(RayError):
                found[node] = ray.get(answer)
    for answer in late:
        ray.cancel(answer, force=True)
    return found
