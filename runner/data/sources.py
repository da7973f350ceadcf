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
from trimpot.runner.reading import JSON_BYTES, check_file, parse_json, read_bounded

Row = dict[str, Any]
MAX_ROW_BYTES = 8 * 2**20
"""Of one row. A long book has 3 MiB; the csv module's own limit of 131,072 is less than one."""
EXPANSION, LEAST_BYTES = 1000, 96 * 2**20
"""A compressed file may grow so many times in memory, and to so much in any case: a few kB can
stand for terabytes, and real text under the best of compressors grows 20 times."""
BATCH_ROWS = 256
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
    try:
        if not path.exists():
            raise DataError(f"{path} is not there; wanted: {KINDS}")
        if not path.is_dir():
            check_file(path)
    except (OSError, ValueError) as error:  # a name that no file can have; a circle of links
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} can't be read: {why}; wanted: {KINDS}") from None
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
        for number in itertools.count(1):
            line = file.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_ROW_BYTES:
                raise _too_large(f"{path} line {number}")
            if line.strip():
                yield _row(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _too_large(where: str) -> DataError:
    return DataError(f"{where} has over {MAX_ROW_BYTES >> 20} MiB; split it into several rows")


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
    csv.field_size_limit(MAX_ROW_BYTES)
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
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            _check_groups(path, file.metadata)
            flat = [f.name for f in file.schema_arrow if pyarrow.types.is_string(f.type)]
        # As they are in the file, each word once: a row's are made when it is looked at.
        with path.open("rb") as opened:
            file = pyarrow.parquet.ParquetFile(opened, read_dictionary=flat)
            batches = file.iter_batches(BATCH_ROWS)
            yield from _within(path, _one_by_one(batches))
    except DataError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's fault, not the file's
        raise _no_parquet(path, error) from None
    except Exception as error:  # a file of others can break its reader in any way there is
        raise _no_parquet(path, error) from None


def _one_by_one(batches: Any) -> Iterator[Row]:
    for batch in batches:
        for number in range(batch.num_rows):
            yield batch.slice(number, 1).to_pylist()[0]


def _no_parquet(path: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return DataError(f"{path} is not valid Parquet: {reason}")


def _check_groups(path: Path, metadata: Any) -> None:
    """Whether what a Parquet file says of itself is within reason. Raises DataError."""
    most = _most_bytes(path)
    whole = 64 * metadata.num_rows
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        sizes = [group.column(i).total_uncompressed_size for i in range(group.num_columns)]
        if any(size > MAX_ROW_BYTES * max(1, group.num_rows) for size in sizes):
            raise _too_large(f"a row of {path}")
        whole += sum(sizes)
    if whole > most:
        raise _a_bomb(path, most)


def _most_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    return max(LEAST_BYTES, EXPANSION * sum(file.stat().st_size for file in files))


def _a_bomb(path: Path, most: int) -> DataError:
    return DataError(
        f"{path} expands to over {most >> 20} MiB, {EXPANSION} times its size or more, which no "
        "text does; save it as JSONL"
    )


def _within(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, as long as they take no more memory than such a file may. Raises DataError."""
    most, taken = _most_bytes(path), 0
    for number, row in enumerate(rows, 1):
        size = _size(row)
        taken += size
        if size > MAX_ROW_BYTES:
            raise _too_large(f"{path} row {number}")
        if taken > most:
            raise _a_bomb(path, most)
        yield row


def _size(row: Any) -> int:
    """Bytes that a row takes, about."""
    size, todo = 0, [row]
    while todo:
        value = todo.pop()
        size += 64
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, dict):
            todo += value.values()
            size += 200
        elif isinstance(value, list):
            todo += value
    return size


def _saved_dataset(path: Path) -> Iterator[Row]:
    import datasets

    try:
        _check_saved(path)
        saved = datasets.Dataset.load_from_disk(str(path)).with_format(None)
        yield from _within(path, _rows_of(saved))
    except DataError:
        raise
    except Exception as error:  # a file of others can break its reader in any way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"{path} can't be opened by datasets: {reason}") from None


def _rows_of(saved: Any) -> Iterator[Row]:
    for columns in saved.iter(BATCH_ROWS):
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _check_saved(path: Path) -> None:
    """Whether a saved data set is made of the files in its folder. Raises DataError, ValueError."""
    for name in ("dataset_info.json", "state.json"):
        said = parse_json(read_bounded(path / name, JSON_BYTES))
        if not isinstance(said, dict):
            raise ValueError(f"{name} holds no JSON object")
    files = said.get("_data_files")
    if not isinstance(files, list) or not files:
        raise ValueError("state.json names no files")
    for entry in files:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow"):
            raise DataError(
                f"{path}/state.json names {str(name)[:60]!r} for data; save the data set again"
            )
        check_file(path / name)
