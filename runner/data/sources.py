"""Rows from JSONL, JSON, Parquet, CSV or a folder saved by `datasets`."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimpot.runner.errors import DataError

Row = dict[str, Any]
MAX_FIELD = 2**31 - 1
"""Characters of one CSV field; the csv module's own limit of 131,072 is less than a book."""
KINDS = ".jsonl, .json, .parquet, .csv, or a folder saved by datasets' save_to_disk"


def read_rows(path: Path, most: int | None = None) -> list[Row]:
    """The rows of a source, or the first `most`, in its own order.

    Raises DataError naming file and line.
    """
    try:
        rows = list(itertools.islice(_reader(path), most))
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path} has no rows; at least one is wanted")
    return rows


def check_source(path: Path) -> None:
    """Whether there is something at `path` that read_rows could read; cheap."""
    if not path.exists():
        raise DataError(f"{path} is not there; wanted: {KINDS}")
    _reader(path)


def source_digest(path: Path) -> str:
    """SHA-256 over the content of a file, or over names and contents of a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() if file != path else b"")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _reader(path: Path) -> Iterator[Row]:
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            what = (
                "a DatasetDict; give one of its splits"
                if (path / "dataset_dict.json").is_file()
                else "a folder without dataset_info.json"
            )
            raise DataError(f"{path} is {what}; wanted: {KINDS}")
        return _saved_dataset(path)
    readers = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
        ".csv": _csv,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} ends in {path.suffix or 'no suffix'!s}; wanted: {KINDS}")
    return readers[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _json(path: Path) -> Iterator[Row]:
    value = _parse(path.read_bytes(), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; a list of objects is wanted")
    for number, item in enumerate(value, 1):
        yield _row(item, f"{path} item {number}")


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; a flat object is wanted") from None
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a JSON {type(value).__name__}; an object is wanted")
    return value


def _csv(path: Path) -> Iterator[Row]:
    # utf-8-sig: spreadsheets write a byte order mark, which would join the first column's name.
    csv.field_size_limit(MAX_FIELD)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path} line {reader.line_num} has not the {len(reader.fieldnames or ())} "
                        "fields of the header; quote fields that hold commas"
                    )
                yield dict(row)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not valid CSV: {error}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8; save the file as UTF-8") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not valid Parquet: {reason}") from None
    yield from table.to_pylist()


def _saved_dataset(path: Path) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.Dataset.load_from_disk(str(path)).to_list()
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} can't be opened by datasets: {reason}") from None
