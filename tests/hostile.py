"""Feeds hostile inputs to trimpot, one forked process each, and tells what each did.

    python hostile.py < jobs.json > results.json

A job is {name, folder, action, args, writes}; the process starts in `folder` and may write below
`writes` alone. What it must not do is seen by Python's audit hook, which native calls pass too
where they go through the interpreter, and by comparing the folders before and after.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLACK_BYTES = 3 << 30
"""Of address space: what a bomb takes before it is stopped, so that it only fails the test."""
WALL_S = 60
CPU_S = 4
POLL_S = 0.002
"""Between looks at a process's memory; to take 256 MiB lasts 30 times as long."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EXECUTED = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "pickle.find_class", "code.__new__", "marshal.load", "cpython.run_command",
)  # fmt: skip
REACHED = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.sendto", "urllib.Request", "ftplib.connect", "http.client.connect", "smtplib.connect",
)  # fmt: skip
CHANGED = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")


class Watch:
    """The audit hook of one process: `effects` has what it saw."""

    def __init__(self, folder: Path, writes: list[Path]):
        self.folder, self.writes = str(folder), [str(path) for path in writes]
        self.effects: list[str] = []
        self.on = True

    def allowed(self, path: Any) -> bool:
        if isinstance(path, int):  # a handle that is open already
            return True
        given = Path(os.fsdecode(path))
        full = str(given.parent.resolve() / given.name)
        if Path(full).is_symlink():
            full = os.path.realpath(full)
        return full == "/dev/null" or any(
            full == top or full.startswith(top + "/") for top in self.writes
        )

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False
        try:
            self.see(event, arguments)
        finally:
            self.on = True

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EXECUTED:
            self.effects.append(f"executed: {event} {arguments!r:.200}")
        elif event in REACHED:
            self.effects.append(f"network: {event} {arguments!r:.200}")
        elif event == "subprocess.Popen":
            command = [os.fsdecode(part) for part in arguments[1]]
            if command[:2] != [sys.executable, "-I"] or not command[2].endswith("/render.py"):
                self.effects.append(f"executed: {command}")
        elif event == "open":
            path, mode, flags = arguments
            writing = flags & WRITING if isinstance(flags, int) else set(mode or "r") & set("wax+")
            if writing and not self.allowed(path):
                self.effects.append(f"wrote: {path}")
        elif event in CHANGED:
            paths = [p for p in arguments if isinstance(p, str | bytes | os.PathLike)]
            for path in paths[1:] if event in ("os.symlink", "os.link") else paths:
                if not self.allowed(path):
                    self.effects.append(f"wrote: {event} {path}")
        elif event in ("exec", "compile", "import", "ctypes.dlopen"):
            named = arguments[0] if event != "compile" else arguments[1]
            named = getattr(named, "co_filename", named)
            if isinstance(named, str) and named.startswith(self.folder):
                self.effects.append(f"executed: {event} {named}")


class Reached(Exception):
    """All checks are passed: what follows would be Ray and its workers."""


def command(args: list[str]) -> int:
    """`trimpot …`, as the console script runs it; its workers are not started."""
    from trimpot.cluster import cli, launch, train

    def no_cluster(address: str | None, cpus: int) -> Any:
        if address is not None:
            launch.check_answers(address)
        raise Reached

    train.ray_cluster = no_cluster  # type: ignore[assignment]
    sys.argv = ["trimpot", *args]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def told(work: Callable[[], Any]) -> int:
    """As the console script tells an error."""
    from trimpot.runner.errors import TrimpotError
    from trimpot.runner.redact import redact

    try:
        work()
    except TrimpotError as error:
        sys.stderr.write(redact(f"error: {' '.join(str(error).splitlines())}\n"))
        return error.exit_code
    return 0


def worker(args: list[str]) -> int:
    """What the driver does, then a worker's model; args as of `trimpot`."""
    try:
        return command(args)
    except Reached:
        from trimpot.runner.model import build_model
        from trimpot.runner.plan.plan import plan_from_json

        text = Path("run/plan.json").read_text(encoding="utf-8")
        return told(lambda: build_model(plan_from_json(text), None))


def checkpoint(args: list[str]) -> int:
    """Take up the newest checkpoint of a folder, as export and a resumed run do."""
    from trimpot.runner.checkpoint import load_state, newest_checkpoint
    from trimpot.runner.errors import CheckpointError

    def work() -> None:
        said: list[str] = []
        found = newest_checkpoint(Path(args[0]), said.append, set_aside=True)
        if found is None:
            raise CheckpointError(said[0] if said else "there is none")
        load_state(found[0])

    return told(work)


def adapter(args: list[str]) -> int:
    from trimpot.runner.adapters.peft_io import read_adapter

    return told(lambda: read_adapter(Path(args[0])))


def gguf(args: list[str]) -> int:
    from trimpot.runner.hub import convert_gguf

    return told(lambda: convert_gguf(Path(args[0]), Path(args[1])))


def run_worker(args: list[str]) -> int:
    from trimpot.runner import worker as module

    def no_workers(*_: Any, **__: Any) -> Any:
        raise Reached

    module.engines.join_workers = no_workers  # type: ignore[assignment]
    sys.argv = ["worker", *args]
    return module.main()


def plant(args: list[str]) -> int:
    """What no input may do, for the test of this file."""
    sys.path.append(str(Path(__file__).parent / "chaos"))
    exec(args[0], {})
    return 0


ACTIONS = {
    "plant": plant,
    "trimpot": command,
    "worker": worker,
    "checkpoint": checkpoint,
    "adapter": adapter,
    "gguf": gguf,
    "run_worker": run_worker,
}


def status(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{key}:")[1].split()[0])


def anonymous(pid: int) -> int:
    """Bytes that a process and its children have for themselves now.

    File pages are left out: a fork starts without those that its parent has.
    """
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):  # it has ended
        return 0
    own = (int(resident) - int(shared)) * resource.getpagesize()
    # One that was forked and has not begun its own program still shows what its parent has.
    return own + sum(n for child in children if (n := anonymous(int(child))) < own)


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(top, name)
            state = path.lstat()
            found[str(path)] = (
                (state.st_mode, state.st_size, state.st_mtime_ns)
                if (not path.is_dir() or path.is_symlink())
                else None
            )
    return found


def child(job: dict[str, Any], out: Any, err: Any) -> dict[str, Any]:
    folder = Path(job["folder"])
    watch = Watch(folder, [Path(path) for path in job["writes"]])
    os.chdir(folder)
    os.environ["HOME"] = str(folder.parent)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), "utf-8", "replace", write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), "utf-8", "replace", write_through=True)
    limit = status("VmSize") + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    began = time.process_time()
    sys.addaudithook(watch)
    reached = False
    try:
        code = ACTIONS[job["action"]](job["args"])
    except Reached:
        code, reached = 0, True
    except BaseException:
        traceback.print_exc()
        code = -1
    watch.on = False
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "code": code,
        "reached": reached,
        "effects": watch.effects[:5],
        "seconds": time.process_time() - began + spent.ru_utime + spent.ru_stime,
    }


def feed(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fork of this process → what it did."""
    top = Path(job["folder"]).parent
    before = snapshot(top)
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.close(reader)
            signal.alarm(WALL_S)
            try:
                os.write(writer, json.dumps(child(job, out, err)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        raw, size = b"", anonymous(pid)
        largest = size
        while True:
            if select.select([reader], [], [], POLL_S)[0]:
                if not (piece := os.read(reader, 1 << 16)):
                    break
                raw += piece
            largest = max(largest, anonymous(pid))
        os.close(reader)
        _, code = os.waitpid(pid, 0)
        nothing = {"code": None, "effects": [], "reached": False, "seconds": CPU_S}
        result = json.loads(raw) if raw else nothing
        result["bytes"] = largest - size
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            result[name] = file.read().decode("utf-8", "replace")[-20000:]
    if not raw:
        result["effects"].append(f"died: wait status {code}")
    after = snapshot(top)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path, 0) != after.get(path, 0) and not any(
            path == top or path.startswith(f"{top}/") for top in job["writes"]
        ):
            result["effects"].append(f"wrote: {path}")
    return {"name": job["name"], **result}


def main() -> None:
    import datasets  # noqa: F401
    import gguf as _  # noqa: F401
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import trimpot.cluster.cli
    import trimpot.cluster.report
    import trimpot.cluster.train
    import trimpot.runner.export
    import trimpot.runner.worker  # noqa: F401
    from trimpot.cluster import init  # noqa: F401
    from trimpot.runner.recipes import prepare  # noqa: F401

    sys.stdout.write(json.dumps([feed(job) for job in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
