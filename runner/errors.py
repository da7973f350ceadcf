"""Errors that a person sees: what is, what was wanted, what to do.

They pickle (they cross Ray), and each carries the exit code its command ends with.
"""

from __future__ import annotations


class TrimpotError(Exception):
    """The run failed for a reason that is worth one line. Exit code 1."""

    exit_code = 1


class UserError(TrimpotError):
    """The user can mend this: a config, a path, a data file. Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """The run.yaml, or an override of it, does not say a valid run."""


class DataError(UserError):
    """The data can't be read, or nothing in it can be trained on."""


class ModelError(UserError):
    """The model is not there, or is not what the task needs."""


class PlanError(UserError):
    """No arrangement of workers and batches does what was asked."""


class CheckpointError(UserError):
    """A checkpoint is damaged, foreign, or of another run."""


class StorageError(UserError):
    """The run directory can't be written."""


class WorkerStorageError(StorageError):
    """A running worker met an I/O error in the run directory: it may pass."""


class StoreError(StorageError):
    """The object store of checkpoint.copy_to refuses, or does not answer."""

    def __init__(self, text: str, lasting: bool = False):
        """`lasting`: trying again is of no use."""
        super().__init__(text, lasting)
        self.lasting = lasting

    def __str__(self) -> str:
        return str(self.args[0])


class ClusterError(UserError):
    """The Ray cluster does not answer, or has too little to offer."""


class TrainError(TrimpotError):
    """Training itself failed: a loss that is not finite, a worker that died."""


class WorkerError(TrainError):
    """A worker ended by something that is no error of ours; Ray's exception is its cause."""


class CorruptionError(TrimpotError):
    """Weights changed that nothing trained, or workers that must hold the same ones do not.

    `ranks`: who is suspect; the run is as good as its newest checkpoint.
    """

    def __init__(self, text: str, ranks: tuple[int, ...]):
        super().__init__(text)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[CorruptionError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class HangError(TrainError):
    """The workers stood still and were ended. `rank`: whom the others waited for, if that is
    known."""

    def __init__(self, text: str, rank: int | None = None):
        super().__init__(text)
        self.rank = rank


class SaveError(TrimpotError):
    """What was trained could not be saved at the end, or where the run was told to stop."""


class ExportError(TrimpotError):
    """What would be written does not compute what was trained."""
