"""Ray Train, told how its workers find each other: the variables torchrun would set, no torch.

Ray's own TorchConfig imports torch and joins the process group before the worker's code runs;
there DeepSpeed could not be told first what not to compile.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trimpot.kernels.heap import keep_freed_memory
from trimpot.runner.types import NODE

UNNEEDED = {
    "DatasetsCallback",  # we feed no ray.data
    # Frees the placement group of a controller that died. One whose driver died goes with its job,
    # else `Rooms.release` frees it.
    "PlacementGroupCleanerCallback",
}
NOTICE = threading.Event()
"""Set in a worker that was sent SIGTERM: its node will go."""


class Trainer(DataParallelTrainer):
    """DataParallelTrainer with only the actors that a run of ours needs: each that Ray Train
    starts beside the workers costs 1.4 CPU-seconds before the first step.

    `_create_default_callbacks` is Ray's own business: where a version has it no more, or names
    its callbacks otherwise, nothing is left out and the start is slower.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if type(c).__name__ not in UNNEEDED]


@dataclass
class RanksConfig(BackendConfig):
    """`environment`: further variables of every worker."""

    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type[Backend]:
        return RanksBackend


class RanksBackend(Backend):
    share_cuda_visible_devices = True

    def on_training_start(self, worker_group: Any, backend_config: RanksConfig) -> None:
        address, port = worker_group.execute_single(0, _rendezvous)
        worker_group.execute(_set_up_process, address, port, backend_config.environment)


def _rendezvous() -> tuple[str, int]:
    """(address, free port) of this worker, on the interface the cluster talks over."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]


def _set_up_process(address: str, port: int, environment: dict[str, str]) -> None:
    import ray.train

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        NODE: ray.get_runtime_context().get_node_id(),
        **environment,
    }
    if environment.get("DS_ACCELERATOR") == "cpu":
        keep_freed_memory()
    _take_notice()
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_of(_own_address())):
        # Without it gloo takes the address its host name resolves to, often 127.0.1.1.
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _take_notice() -> None:
    """Have SIGTERM finish and save the step, as a spot node's few seconds allow; a second one does
    what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return  # then the signal ends the process at once, as it does without us
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, _: object) -> None:
        NOTICE.set()
        signal.signal(number, before)

    signal.signal(signal.SIGTERM, handle)


def _own_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            return name
    return None
