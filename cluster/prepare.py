"""run.yaml → a run directory that workers can start from: config, plan, compiled data, lock.

Everything that can be wrong is found here, before Ray or torch is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimpot.runner import copies
from trimpot.runner.config import Config
from trimpot.runner.data.compile import Compiled, compile_splits, load_splits
from trimpot.runner.data.cursor import steps_in
from trimpot.runner.data.fill import Fill, fill_of
from trimpot.runner.data.sources import check_source
from trimpot.runner.errors import CheckpointError, ModelError, PlanError, StorageError
from trimpot.runner.hub import Tokenizer, fetch_model, model_facts
from trimpot.runner.plan.facts import read_facts
from trimpot.runner.plan.kernels import ATTENTION
from trimpot.runner.plan.plan import make_plan, plan_to_json
from trimpot.runner.reading import (
    JSON_BYTES,
    MANIFEST_BYTES,
    check_contained,
    parse_json,
    read_bounded,
)
from trimpot.runner.store import Store
from trimpot.runner.types import Fleet, Plan, decides_numbers

RUN_PARTS = (
    ".ray",
    "checkpoints",
    "adapter",
    "tensorboard",
    "journal.jsonl",
    "plan.json",
    "report.html",
    "failure.log",
    "stop",
    "leave",
    "pulse",
)
"""What `--fresh` removes. Compiled data stay: they are of this run by the time it does."""
LEAST_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Prepared:
    plan: Plan
    notes: list[str]


def check_inputs(config: Config) -> None:
    """Whether what the config names is there. Raises DataError."""
    check_source(Path(config.data.train))
    if config.data.eval is not None:
        check_source(Path(config.data.eval))


def draft_plan(config: Config, fleet: Fleet) -> Plan:
    """The plan as far as it is known without reading the data."""
    facts = model_facts(config.model.path, config.model.revision)
    return make_plan(config, fleet, facts, run_dir=str(Path(config.output_dir).resolve()))


def compiled_fill(plan: Plan) -> Fill | None:
    """How full rows and micro-batches are, where an earlier `train` has compiled this data."""
    run = Path(plan.run_dir)
    try:
        before = parse_json(read_bounded(run / "plan.json", JSON_BYTES))["config"]
        before = Config.model_validate(before)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    config = plan.config
    same = [(c.data, c.seed, c.model.path) for c in (before, config)]
    if same[0] != same[1] or (splits := load_splits(run / "data")) is None:
        return None
    return fill_of(plan, splits[0], plan.kernels[ATTENTION]["backend"] != "off")


def prepare_run(config: Config, fleet: Fleet, fresh: bool) -> Prepared:
    """Check, tokenise, and write the run directory's plan. The caller holds the run's lock.

    Raises a UserError; then nothing is left that was not there before, but for compiled data.
    """
    plan = draft_plan(config, fleet)
    folder = fetch_model(config.model.path, config.model.revision, weights=False)
    tokenizer = Tokenizer(folder)
    check_room(plan)
    store = open_store(plan)
    run = Path(plan.run_dir)
    if not fresh:
        check_same_run(run, plan)
    train, held_out = compile_splits(config.data, config.seed, run / "data", tokenizer)
    for split in (train, held_out):
        check_vocabulary(split, folder)
    if not fresh:
        check_same_data(run, train)
        if store is not None:
            copies.check_same(copies.look(store), store.url, plan.digest, train.digest)
    plan = plan.replace(
        model_path=str(folder) if Path(config.model.path).exists() else config.model.path,
        total_steps=config.optim.max_steps or _epoch_steps(config, train),
    )
    if config.optim.warmup_steps >= (plan.total_steps or 0):
        raise PlanError(
            f"warmup_steps {config.optim.warmup_steps} leaves nothing of the run's "
            f"{plan.total_steps} steps; set fewer warm-up steps or more epochs"
        )
    more: list[str] = []
    if fresh:  # what an earlier run achieved goes only when this one is known to be sound
        clear_run(run)
        if store is not None and (count := copies.clear(store)):
            more.append(f"--fresh deleted {count} checkpoints of an earlier run in {store.url}")
    write_text(run / "plan.json", plan_to_json(plan))
    return Prepared(plan, [*_notes(config, train, held_out), *more])


def _epoch_steps(config: Config, train: Compiled) -> int:
    return steps_in(len(train), config.optim.batch_size, config.optim.epochs or 1)


def _notes(config: Config, train: Compiled, held_out: Compiled | None) -> list[str]:
    notes = list(train.notes)
    if len(train) < config.optim.batch_size:
        notes.append(
            f"{len(train)} training samples are fewer than batch_size "
            f"{config.optim.batch_size}: each step sees some of them twice"
        )
    if held_out is None:
        notes.append("nothing is held out, so no loss on unseen data will be known")
    return notes


def check_room(plan: Plan) -> None:
    """Whether the run directory can be made and written, with room for the checkpoints it keeps.

    Leaves nothing behind. Raises StorageError.
    """
    run = Path(plan.run_dir)
    made = _make_folder(run)
    try:
        check_contained(run)
        probe = run / ".writable"
        probe.write_bytes(b"trimpot")
        probe.unlink()
        free = shutil.disk_usage(run).free
    except OSError as error:
        raise _not_writable(run, error) from None
    finally:
        _remove_empty(made)
    # Weights and two moments in fp32, kept + 1 times: the old one goes after the new is durable.
    # A copy under way keeps one more.
    trained = plan.memory.optimizer // 8 if plan.memory else 0
    section = plan.config.checkpoint
    kept = section.keep + 1 + (section.copy_to is not None)
    wanted = LEAST_FREE_BYTES + trained * 12 * kept
    if free < wanted:
        raise StorageError(
            f"output_dir {run} has {free / 2**20:.0f} MiB free and the run needs about "
            f"{wanted / 2**20:.0f} MiB; free some, or choose another output_dir"
        )


def open_store(plan: Plan) -> Store | None:
    """Where checkpoints are copied to, if anywhere; tried with a small object. Raises StorageError.

    Workers ask it themselves: their nodes need the same packages and credentials.
    """
    url = plan.config.checkpoint.copy_to
    if url is None:
        return None
    store, run = Store(url), Path(plan.run_dir)
    if store.local is not None and run in (store.local, *store.local.parents):
        raise StorageError(
            f"checkpoint.copy_to {url} is in output_dir {run} itself, and would be lost with it; "
            "choose another place"
        )
    store.probe()
    return store


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents → those that were not there, innermost first."""
    missing: list[Path] = []
    try:
        missing += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _not_writable(folder, error) from None
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _not_writable(run: Path, error: OSError) -> StorageError:
    why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    return StorageError(f"output_dir {run} can't be written ({why}); choose another")


def clear_run(run: Path) -> None:
    """Remove what earlier runs left in a run directory, and nothing else."""
    for path in (*(run / name for name in RUN_PARTS), *run.glob("hang-*.txt")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same_run(run: Path, plan: Plan) -> None:
    """Raises CheckpointError where the directory holds a run with other settings."""
    path = run / "plan.json"
    if not path.is_file():
        return
    try:
        before = parse_json(read_bounded(path, JSON_BYTES))
        config = Config.model_validate(before["config"]).model_dump(mode="json")
        before = decides_numbers(config, before.get("kernels", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is damaged; start over with --fresh, or choose another output_dir"
        ) from None
    now = decides_numbers(plan.config.model_dump(mode="json"), plan.kernels)
    changed = [f"{key} was {old}, is {new}" for key, old, new in _differences(before, now)]
    if changed:
        raise CheckpointError(
            f"{run} holds a run with other settings ({'; '.join(changed[:3])}); "
            "put them back, start over with --fresh, or choose another output_dir"
        )


def check_same_data(run: Path, train: Compiled) -> None:
    """Raises CheckpointError where the newest checkpoint was trained on other data."""
    for path in sorted(run.glob("checkpoints/step-*/manifest.json"), reverse=True):
        try:
            digest = parse_json(read_bounded(path, MANIFEST_BYTES))["data_digest"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the workers will set it aside and say so
        if digest != train.digest:
            raise CheckpointError(
                f"the data changed since checkpoint {path.parent} was saved; "
                "put them back, start over with --fresh, or choose another output_dir"
            )
        return


def check_vocabulary(split: Compiled | None, folder: Path) -> None:
    """Raises ModelError where the tokenizer gives ids that the model has no embedding for."""
    vocabulary = read_facts(folder).vocab
    highest = int(split.tokens.max()) if split is not None else 0
    if 0 < vocabulary <= highest:
        raise ModelError(
            f"the tokenizer in {folder} gives token {highest}, and the model's vocab_size is "
            f"{vocabulary}; use the tokenizer that the model was trained with"
        )


def _differences(before: Any, now: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield at, before, now


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}") from None


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run directory for one driver. Raises StorageError while another holds it.

    An error that leaves nothing in the directory leaves no directory that was not there before.
    """
    made = _make_folder(run)
    check_contained(run)
    lock = FileLock(run / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"{run} is in use by another trimpot; wait for it, or choose another output_dir"
        ) from None
    except OSError as error:
        _remove_empty(made)
        raise _not_writable(run, error) from None
    try:
        yield
    except BaseException:
        _remove_empty([run / "data"])
        if [path.name for path in run.iterdir()] == [".lock"]:
            (run / ".lock").unlink()
        _remove_empty(made)
        raise
    finally:
        lock.release()
