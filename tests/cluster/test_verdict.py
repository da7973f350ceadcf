"""What Ray's exceptions are taken for: its own classes, as they arrive through pickle."""

from __future__ import annotations

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError
from ray.train.v2.api.preemption import PreemptionInfo

from trimpot.cluster.verdict import explain, verdict
from trimpot.runner.errors import (
    ClusterError,
    CorruptionError,
    SaveError,
    TrainError,
    TrimpotError,
    WorkerError,
    WorkerStorageError,
)

KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: … (1) the process was killed by the OOM killer due to high memory usage …"
)
NODE = "The actor died because its node has died. Node Id: 12ab"
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:3")


def dead(text: str, preempted: bool = False) -> Exception:
    died = RayActorError(error_msg=text, preempted=preempted)
    return WorkerHealthCheckFailedError("A worker health check failed.", died)


def judged(error: Exception, **facts):
    """(error that is raised, verdict) of Ray Train's `error`."""
    known = {
        "step": 7,
        "saved": 4,
        "nodes": ["a", "b"],
        "leaving": frozenset(),
        "lost": frozenset(),
    }
    arrived = cloudpickle.loads(cloudpickle.dumps(error))  # as Ray sends it
    raised = explain(arrived)
    raised.__cause__ = arrived
    return raised, verdict(raised, **(known | facts))


def group(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("…", {int(rank[1:]): error for rank, error in failures.items()})


def test_a_killed_worker_is_a_crash_of_its_own_rank():
    raised, failure = judged(group(r0=CLOSED, r1=dead(KILLED)))
    assert (failure.kind, failure.rank, failure.node) == ("crash", 1, "b")
    assert isinstance(raised, WorkerError)
    assert "worker 1 died without a word" in failure.text
    assert (failure.step, failure.saved) == (7, 4)


def test_a_worker_that_got_sigterm_says_so():
    text = (
        "Worker exit detail: Worker exits unexpectedly by a signal. The process receives a SIGTERM."
    )
    assert "of SIGTERM" in judged(group(r0=dead(text)))[1].text


def test_a_node_that_died_is_lost():
    _, failure = judged(group(r0=CLOSED, r1=dead(NODE)))
    assert (failure.kind, failure.rank) == ("node lost", 1)
    # Noticed by the head only after the worker was.
    _, failure = judged(group(r0=dead(KILLED), r1=CLOSED), lost=frozenset({"b"}))
    assert (failure.kind, failure.rank, failure.node) == ("node lost", 1, "b")


@pytest.mark.parametrize(
    "error",
    [
        group(r0=dead(NODE, preempted=True)),
        PreemptionError(PreemptionInfo(None, {"b": [1]})),
    ],
    ids=["actor", "controller"],
)
def test_what_ray_calls_preempted_is(error):
    assert judged(error)[1].kind == "preempted"


def test_a_crash_on_a_node_with_notice_is_a_preemption():
    assert judged(group(r1=dead(KILLED)), leaving=frozenset({"b"}))[1].kind == "preempted"
    assert judged(group(r1=dead(KILLED)), leaving=frozenset({"z"}))[1].kind == "crash"


def test_an_exception_is_named_with_its_rank():
    raised, failure = judged(group(r0=CLOSED, r1=ValueError("no such row")))
    assert (failure.kind, failure.rank) == ("exception", 1)
    assert str(raised) == "worker 1 failed: ValueError: no such row"


def test_the_others_end_of_a_collective_alone_is_a_crash():
    assert judged(group(r0=CLOSED))[1].kind == "crash"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("out of memory: 3 GiB wanted"),
        OutOfMemoryError("Task was killed due to the node running low on memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
    ids=["python", "ray", "torch"],
)
def test_out_of_memory_is_known(error):
    assert judged(group(r0=CLOSED, r1=error))[1].kind == "out of memory"


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        (TrainError("the loss of step 3 is nan"), "mistake"),
        (SaveError("no space left"), "mistake"),
        (WorkerStorageError("/run: input/output error"), "storage"),
        (CorruptionError("the trained weights of worker 1 differ", (1,)), "corruption"),
    ],
)
def test_our_own_error_is_raised_as_it_is(own: TrimpotError, kind):
    raised, failure = judged(group(r0=CLOSED, r1=own))
    assert (type(raised), str(raised)) == (type(own), str(own))
    assert failure.kind == kind
    assert failure.node == ("b" if kind == "corruption" else None)


def test_workers_that_could_not_start_in_time():
    error = ControllerError(WorkerGroupStartupTimeoutError(4))
    raised, failure = judged(error)
    assert failure.kind == "no room"
    assert "did not start the workers in time" in str(raised)


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(error_msg=KILLED),
        WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize."),
    ],
)
def test_a_worker_killed_in_its_start_is_a_crash(error):
    raised, failure = judged(ControllerError(error))
    assert failure.kind == "crash"
    assert str(raised).startswith("a worker that started died")


def test_an_error_of_the_controller_is_its_own():
    raised, failure = judged(ControllerError(ValueError("no such strategy")))
    assert failure.kind == "exception"
    assert str(raised) == "Ray Train failed: ValueError: no such strategy"


def test_a_controller_that_died_is_named():
    raised, failure = judged(RayActorError(error_msg=KILLED))
    assert (failure.kind, failure.rank) == ("crash", None)
    assert str(raised).startswith("Ray Train died")


def test_a_node_without_trimpot_is_named():
    raised, failure = judged(group(r0=ModuleNotFoundError("No module named 'trimpot'")))
    assert isinstance(raised, ClusterError)
    assert "install trimpot there" in str(raised)
    assert failure.kind == "mistake"


def test_an_exception_of_a_ray_task_is_looked_into():
    trace = "Traceback …\nValueError: no such row"
    error = RayTaskError("train", trace, ValueError("no such row")).as_instanceof_cause()
    assert str(judged(group(r0=error))[0]) == "worker 0 failed: ValueError: no such row"


def test_an_actor_that_died_on_its_own():
    assert judged(group(r0=ActorDiedError()))[1].kind == "crash"
