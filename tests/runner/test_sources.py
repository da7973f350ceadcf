"""The same rows from every kind of file, as written by somebody else's writers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trimpot.runner.data.sources import check_source, read_rows, source_digest
from trimpot.runner.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "What, then?", "completion": 'He said "so".\nTwice.'},
    {"prompt": "Ünïcödé 中 🙂", "completion": "a\u2028b\u0085c"},  # line ends that JSON has not
    {"prompt": "", "completion": " spaces "},
]


def write_jsonl(path: Path, rows: list[Any], **options: Any) -> Path:
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.mark.parametrize(
    "kind", ["escaped.jsonl", "plain.JSONL", "x.ndjson", "x.json", "x.csv", "x.parquet"]
)
def test_the_same_rows_from_every_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            write_jsonl(path, ROWS, ensure_ascii=kind == "escaped.jsonl")
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1))
        case ".csv":
            write_csv(path, ROWS)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    check_source(path)
    assert read_rows(path) == ROWS
    assert read_rows(path, 2) == ROWS[:2]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    talk = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": [], "n": 2}]
    datasets.Dataset.from_list(talk).save_to_disk(tmp_path / "saved")
    check_source(tmp_path / "saved")
    assert read_rows(tmp_path / "saved") == talk


def test_files_as_spreadsheets_and_windows_write_them(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "bom.csv", ROWS, encoding="utf-8-sig")
    assert read_rows(path) == ROWS
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert read_rows(tmp_path / "crlf.jsonl") == ROWS


def test_a_book_in_one_field(tmp_path: Path) -> None:
    """The csv module by itself stops at 131,072 characters."""
    rows = [{"text": "word " * 60_000}]
    assert read_rows(write_csv(tmp_path / "x.csv", rows)) == rows


def test_reading_the_first_rows_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken')
    assert read_rows(path, 2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"x\.jsonl line 3 is not valid JSON"):
        read_rows(path)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": "\\u2028"}\n\n[1]\n')
    with pytest.raises(DataError, match="line 4 is a JSON list"):
        read_rows(path)


def test_a_file_that_may_not_be_read_is_the_disks_fault(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.csv", "x.parquet", "x.json"):
        with pytest.raises(DataError, match=rf"{name} can't be read: No such file"):
            read_rows(tmp_path / name)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(a, ROWS)
    b.write_bytes(a.read_bytes())
    assert source_digest(a) == source_digest(b)
    with b.open("ab") as file:
        file.write(b"\n")
    assert source_digest(a) != source_digest(b)


def test_digest_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> str:
        (tmp_path / name / "sub").mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / "sub" / file).write_text(content)
        return source_digest(tmp_path / name)

    same = folder("1", a="x", b="y")
    assert folder("2", b="y", a="x") == same
    assert (
        len({same, folder("3", a="y", b="x"), folder("4", a="x"), folder("5", a="x", c="y")}) == 4
    )
