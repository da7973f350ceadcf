"""What machines a run may use: what the config says, else what is there."""

from __future__ import annotations

from typing import Any

import psutil

from trimpot.runner.config import Config
from trimpot.runner.errors import PlanError
from trimpot.runner.types import Fleet

GB = 10**9
GPU_MEMORY_BYTES = {
    "T4": 16 * GB,
    "L4": 24 * GB,
    "A10G": 24 * GB,
    "A100-40GB": 40 * GB,
    "A100-80GB": 80 * GB,
    "L40S": 48 * GB,
    "H100-80GB": 80 * GB,
    "H200": 141 * GB,
    "B200": 180 * GB,
    "MI300X": 192 * GB,
}
"""Vendors' data sheets; `fleet.memory_per_worker` states any other."""


def local_fleet(config: Config) -> Fleet:
    """This machine, under what the config says of it."""
    if config.fleet.gpus_per_worker == 0 or config.fleet.gpu is not None:
        return _fleet(config, gpus=0, cpus=psutil.cpu_count() or 1, memory=_host_memory())
    from trimpot.cluster.doctor import find_gpus

    gpus, _ = find_gpus()
    memory = min((g["memory_bytes"] for g in gpus if g.get("memory_bytes")), default=0)
    return _fleet(config, len(gpus), psutil.cpu_count() or 1, memory or _host_memory())


def cluster_fleet(config: Config, ray: Any) -> Fleet:
    """A Ray cluster, under what the config says of it."""
    has = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = int(has.get("GPU", 0))
    # Ray tells a node's free memory, not a GPU's.
    memory = 0 if gpus else int(has.get("memory", 0) / max(1, len(nodes)))
    fleet = _fleet(config, gpus // max(1, len(nodes)), int(has.get("CPU", 1)), memory)
    return fleet


def _gpu_memory(gpu: str) -> int:
    if gpu not in GPU_MEMORY_BYTES:
        raise PlanError(
            f"fleet.gpu {gpu} has a memory that is not known here; set fleet.memory_per_worker "
            f"(bytes), or name one of {', '.join(GPU_MEMORY_BYTES)}"
        )
    return GPU_MEMORY_BYTES[gpu]


def _host_memory() -> int:
    return psutil.virtual_memory().available


def _fleet(config: Config, gpus: int, cpus: int, memory: int) -> Fleet:
    said = config.fleet
    workers = said.most_workers or said.sequence_parallel_size
    per_node = max(1, -(-workers // said.nodes))
    if said.gpu is not None:
        gpus = max(gpus, per_node)
        memory = said.memory_per_worker or _gpu_memory(said.gpu)
    elif not gpus:
        memory //= per_node  # workers without GPUs share the host
    return Fleet(
        nodes=said.nodes,
        gpus_per_node=gpus,
        cpus_per_node=cpus,
        gpu=said.gpu,
        memory_bytes=said.memory_per_worker or memory,
        price_per_hour=said.price_per_hour,
        preemptible=said.preemptible,
    )
