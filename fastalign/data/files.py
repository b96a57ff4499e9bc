"""Rows of one file: JSON lines, a JSON array, CSV or TSV (each also gzipped), Parquet.

`datasets` has readers too, but they do not say which line is broken and cannot hold a row of the wrong type, and a bad
row has to be reported with its number and its reason.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet

from fastalign.data.rows import RowSource, Unreadable


def read_file(path: Path, columns: Sequence[str] | None = None) -> RowSource:
    """Opens a file by its suffix, one of FILE_SUFFIXES. ValueError: another suffix, or a file that cannot be read.

    columns: keep only these, where present, of a columnar file; the other formats have to be parsed whole anyway.
    """
    name = str(path)
    try:
        if name.endswith(".parquet"):
            return _read_parquet(name, columns)
        for suffix, reader in _READERS.items():
            if name.endswith((suffix, suffix + ".gz")):
                with cast(IO[bytes], gzip.open(path) if name.endswith(".gz") else path.open("rb")) as stream:
                    return reader(stream, name)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    raise ValueError(f"{name} is not of a known type; accepted are {', '.join(FILE_SUFFIXES)}")


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} cannot be read beyond line {number}: {error}") from error


def _read_json_lines(stream: IO[bytes], name: str) -> RowSource:
    # Parsed when read: the bytes take a fraction of the objects' memory.
    lines = [(number, record) for number, line in _lines(stream, name) if (record := line.rstrip())]
    return RowSource(name, lambda i, j: [_parse_line(*line) for line in lines[i:j]], 0, len(lines))


def _parse_line(number: int, line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"line {number}: not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Unreadable(f"line {number}: broken JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return Unreadable(f"line {number}: {error}")


def parse_json(text: str) -> Any:
    """`json.loads` for texts from anywhere.

    ValueError: broken JSON, nesting that the parser cannot follow, a number of thousands of digits, or a key that an
    object has twice (json.loads takes the last of them without a word).
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object of the JSON has a key twice")
    return found


def _read_json(stream: IO[bytes], name: str) -> RowSource:
    """A .json file is one array of rows or, as many are, JSON lines under another name."""
    start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    if not start.startswith(b"["):
        return _read_json_lines(stream, name)
    try:
        return RowSource.of(parse_json(stream.read().decode("utf-8-sig")), name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _read_csv(stream: IO[bytes], name: str, delimiter: str = ",") -> RowSource:
    def decoded() -> Iterator[str]:
        for number, line in _lines(stream, name):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8 at line {number}, byte {error.start + 1}") from error

    rows: list[Any] = []
    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # a transcript may be longer than the default of 128 KiB
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{name} has a column twice in its header")
        for values in reader:
            if len(values) == len(header):
                rows.append(dict(zip(header, values, strict=True)))
            elif values:
                rows.append(Unreadable(f"line {reader.line_num}: {len(values)} fields, the header has {len(header)}"))
    except csv.Error as error:  # quoting is lost from here on, so this is not one bad row
        raise ValueError(f"{name} is broken CSV at line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return RowSource.of(rows, name)


def _read_parquet(name: str, columns: Sequence[str] | None) -> RowSource:
    with pyarrow.parquet.ParquetFile(name) as file:
        names = [column for column in file.schema_arrow.names if columns is None or column in columns]
        table = file.read(columns=names)
    return RowSource(name, lambda i, j: _table_rows(table.slice(i, j - i)), 0, table.num_rows)


def _table_rows(table: pyarrow.Table) -> list[Any]:
    """Rows whose values Python cannot hold (text that is not UTF-8, a date of the year 300000) are `Unreadable`."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError) as error:
        if table.num_rows == 1:
            return [Unreadable(f"a value that cannot be read: {error}")]
    half = table.num_rows // 2
    return _table_rows(table.slice(0, half)) + _table_rows(table.slice(half))


_READERS: dict[str, Callable[[IO[bytes], str], RowSource]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda stream, name: _read_csv(stream, name, "\t"),
}
FILE_SUFFIXES = (*_READERS, *(suffix + ".gz" for suffix in _READERS), ".parquet")
