"""Ray: start or join a cluster, run a plan's workers on it, watch them, stop them."""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpot.cluster.rooms import on_nodes, worker_gpus
from trimpot.cluster.verdict import explain
from trimpot.cluster.watch import Watch
from trimpot.runner.errors import ClusterError, StorageError
from trimpot.runner.plan.plan import plan_to_json
from trimpot.runner.pulse import FOLDER
from trimpot.runner.telemetry import OFF, telemetry_off
from trimpot.runner.types import Event, Plan

log = logging.getLogger(__name__)
MANY_WORKERS = 64
ANSWER_WITHIN_S = 5.0
"""How long a cluster's address may take to accept a connection."""


def secure_environment() -> dict[str, str]:
    """Variables that every Ray process of ours starts with: token authentication on, telemetry
    off. Makes the user's token where there is none (0600, as Ray itself would)."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if "RAY_AUTH_TOKEN" not in os.environ and not token.is_file():
        token.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):  # another trimpot was first
            handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        # Ray makes workers nice (15): on full cores its own daemons then cut into every step
        # (2 workers on 2 cores, step time over torchrun's: 1.07 nice, 1.03 not).
        "RAY_worker_niceness": "0",
    }


@contextlib.contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray, joined at `address` or started in this process; shut down afterwards.

    Raises ClusterError where the address does not answer or refuses.
    """
    telemetry_off()
    ours = secure_environment()
    open_to_all = address is not None and not takes_only_tokens(address, ours)
    if open_to_all:
        ours["RAY_AUTH_MODE"] = "disabled"  # its workers would not send the token we would want
    os.environ |= ours
    import ray

    # Ray Train's import, 0.7 s, beside ray.init, which mostly waits for its processes.
    threading.Thread(target=importlib.import_module, args=["trimpot.cluster.ranks"]).start()
    with _one_line_errors(address):
        if address is not None:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # "local": a cluster killed earlier leaves a file that would send us to its ghost.
            context = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=128 * 2**20,
            )
    try:
        if open_to_all:
            check_dashboard(address, context.dashboard_url)
            log.warning(
                "the Ray cluster at %s takes work from whoever reaches it; "
                "start it with RAY_AUTH_MODE=token on every node",
                address,
            )
        yield ray
    finally:
        ray.shutdown()


def check_dashboard(address: str | None, url: str | None) -> None:
    """Whether the dashboard of a cluster without tokens, and with it its job API, is for its own
    machine alone. `url`: host:port, or nothing where there is none. Raises ClusterError.

    The job API runs any shell command that it is sent (CVE-2023-48022).
    """
    host = (url or "").removeprefix("http://").rpartition(":")[0].strip("[]")
    if host and not is_loopback(host):
        raise ClusterError(
            f"the Ray cluster at {address} runs whatever is sent to its dashboard at {url}, by "
            "whoever reaches that; start it with RAY_AUTH_MODE=token and one token file on every "
            "node, or its dashboard with --dashboard-host=127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's, for itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _one_line_errors(address: str | None) -> Iterator[None]:
    import ray.exceptions

    where = f"the Ray cluster at {address}" if address else "Ray on this machine"
    try:
        yield
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"{where} can't be used: {why}") from error
    except ray.exceptions.RayError as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"{where} can't be used: {why}; check RAY_AUTH_TOKEN_PATH") from error


def takes_only_tokens(address: str, environment: dict[str, str]) -> bool:
    """Whether the cluster at an address wants a token; and it takes ours, or ClusterError.

    Asked by one request to its GCS, with and without the token: ray.init would retry for 20 s
    and then end in a page of text. `auto` and `local` are left to Ray.
    """
    if address in ("auto", "local"):
        return True
    check_answers(address)
    if os.environ.get("RAY_USE_TLS") == "1":  # Ray has the certificates; we would have to read them
        return True
    import grpc

    def ask(token: str | None) -> Any:
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        # As Ray does it: a cluster's own addresses are not for a proxy.
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            try:
                call(b"", timeout=ANSWER_WITHIN_S, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()  # pyright: ignore[reportAttributeAccessIssue]
        return grpc.StatusCode.OK

    answer = ask(None)
    if answer == grpc.StatusCode.OK:
        return False
    if answer != grpc.StatusCode.UNAUTHENTICATED:
        raise ClusterError(
            f"what answers at {address} is no Ray head ({answer.name.lower()}); "
            "give the host:port that `ray start --head` printed, 6379 by default"
        )
    path = Path(environment["RAY_AUTH_TOKEN_PATH"])
    token = os.environ.get("RAY_AUTH_TOKEN") or path.read_text(encoding="utf-8").strip()
    if ask(token) == grpc.StatusCode.UNAUTHENTICATED:
        raise ClusterError(
            f"the Ray cluster at {address} does not take the token of {path}; "
            "set RAY_AUTH_TOKEN_PATH to a copy of its nodes' token file"
        )
    return True


def check_answers(address: str) -> None:
    """Whether something listens at a cluster's address. Raises ClusterError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536 or "/" in address:
        raise ClusterError(
            f"{address!r} is no Ray address; host:port of the head is wanted, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); "
            "check the address, or leave it out to start Ray on this machine"
        ) from None


@dataclass
class Outcome:
    """How a run ended: `complete` False means that it was told to stop."""

    step: int
    complete: bool


def run_plan(
    plan: Plan,
    watch: Callable[[Callable[[], bool]], None],
    tell: Callable[[Event], None],
) -> Outcome:
    """Start the plan's workers under Ray Train once, and wait until they end.

    `watch(ended)` runs in the calling thread meanwhile and returns once `ended()` is true.
    `tell` writes an event into the journal, from a thread of its own.
    Raises the worker's own TrimpotError, HangError if they stood still, or a WorkerError whose
    cause is Ray's exception.
    """
    # A worker that died is noticed by the controller's next look; its default is 2 s.
    if plan.world_size <= MANY_WORKERS:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # elastic.Overseer is ours
    result: list[Any] = []
    run = Path(plan.run_dir)
    with _pulses(run) as folder, Watch(folder, run, plan.world_size, tell, on_nodes) as watcher:
        thread = threading.Thread(target=lambda: result.append(_fit(plan, folder)), daemon=True)
        thread.start()
        watch(lambda: not thread.is_alive())
        thread.join()
    if isinstance(result[0], BaseException):
        raise watcher.error or explain(result[0]) from result[0]
    values = result[0].return_value
    return Outcome(step=values["step"], complete=values["complete"])


@contextlib.contextmanager
def _pulses(run: Path) -> Iterator[Path]:
    """A folder for the pulses of one start; a worker left over from another one has no part in
    it."""
    every = run / "pulse"
    shutil.rmtree(every, ignore_errors=True)
    folder = every / secrets.token_hex(4)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror}; make room there") from None
    try:
        yield folder
    finally:
        shutil.rmtree(every, ignore_errors=True)


def _fit(plan: Plan, pulses: Path) -> Any:
    """Ray Train's Result, or the exception it raised."""
    import ray.train

    from trimpot.cluster.ranks import RanksConfig, Trainer

    fleet = plan.config.fleet
    gpus = worker_gpus(plan)
    passed = ("HF_HUB_OFFLINE", "HF_HOME", *OFF)
    environment = {k: v for k, v in os.environ.items() if k in passed}
    if fleet.network_interface:
        for library in ("GLOO", "NCCL"):
            environment[f"{library}_SOCKET_IFNAME"] = fleet.network_interface
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    environment["OMP_WAIT_POLICY"] = "passive"
    environment[FOLDER] = str(pulses)
    trainer = Trainer(
        _worker,
        train_loop_config={"plan": plan_to_json(plan), "handed": time.time()},
        backend_config=RanksConfig(environment=environment),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.world_size,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": fleet.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(Path(plan.run_dir) / ".ray"),
            callbacks=[],
            # Who starts again, and with how many workers, is policy.py's to say.
            failure_config=ray.train.FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    try:
        return trainer.fit()
    except BaseException as error:
        return error


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    started = time.time()
    from trimpot.cluster.ranks import NOTICE
    from trimpot.runner.worker import run_worker

    return run_worker(config["plan"], started, config["handed"], NOTICE.is_set)
