"""The loop from any source of rows to a tokenised data set, with an account of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import datasets
import pyarrow
import pyarrow.compute
from datasets.utils import tqdm

from fastalign.data.report import BadRow, BadRowsError, DataReport, RowError
from fastalign.data.rows import RowSource
from fastalign.data.sources import load_rows

ON_BAD_ROW = ("error", "skip")
"""What a bad row does: raise BadRowsError once all rows are read, or be left out and reported."""

IDS = pyarrow.list_(pyarrow.int32())
MASK = pyarrow.list_(pyarrow.bool_())  # one bit a token

_BATCH_ROWS = 512
_MOST_VALUES = 2**31 - 1


class Parsed(Protocol):
    """What a row was understood as; `format` says how, for the report."""

    format: str


Item = TypeVar("Item", bound=Parsed)
Outcome = tuple[Any, ...] | RowError | str
"""Of one row: the values of its columns (without `row`), why it is bad, or why it is dropped: a key of `dropped`."""


class PreparedData(NamedTuple):
    """`dataset`: tokenised columns and `row` (number in the source); `report`: what became of every row."""

    dataset: datasets.Dataset
    report: DataReport


def open_rows(
    dataset: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    columns: Sequence[str] | None = None,
) -> RowSource:
    """`load_rows`, or a `RowSource` as it is. ValueError: options of load_rows beside a RowSource."""
    if not isinstance(dataset, RowSource):
        return load_rows(dataset, split=split, config=config, max_samples=max_samples, columns=columns)
    if (split, config, max_samples) != (None, None, None):
        raise ValueError("split, config and max_samples belong to load_rows when a RowSource is given")
    return dataset


def prepare_rows(
    source: RowSource,
    columns: Sequence[tuple[str, pyarrow.DataType]],
    *,
    parse: Callable[[Any], Item],
    encode: Callable[[list[Item], DataReport], list[Outcome]],
    on_bad_row: str,
) -> PreparedData:
    """Reads all rows, in batches, and makes a data set of `columns` and row.

    parse     from a row to an item, which has a `format`; raises RowError for a bad row
    encode    from items to one Outcome each; it counts truncations and the like in the report, of kept rows alone
    on_bad_row      "error": BadRowsError if any row is bad, after reading all; "skip": leave them out

    ValueError: an unknown on_bad_row, or no row left.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row {on_bad_row!r} is unknown; accepted are {', '.join(map(repr, ON_BAD_ROW))}")
    schema = pyarrow.schema([*columns, ("row", pyarrow.int64())])
    report = DataReport(source=source.name)
    tables = []
    with tqdm(total=len(source), desc="Tokenizing", unit=" rows", delay=2, disable=None) as progress:
        for first, rows in source.batches(_BATCH_ROWS):
            tables.append(_batch(rows, first, schema, parse, encode, report))
            report.read += len(rows)
            progress.update(len(rows))
    report.bad.sort()
    if report.bad and on_bad_row == "error":
        raise BadRowsError(report)
    if not report.kept:
        raise ValueError(f"no row is left to train on: {report if report.read else f'{source.name} has no rows'}")
    table = pyarrow.concat_tables(tables)
    return PreparedData(datasets.Dataset(table, fingerprint=fingerprint(table)), report)


def _batch(
    rows: list[Any],
    first: int,
    schema: pyarrow.Schema,
    parse: Callable[[Any], Item],
    encode: Callable[[list[Item], DataReport], list[Outcome]],
    report: DataReport,
) -> pyarrow.Table:
    items: dict[int, Item] = {}
    for number, row in enumerate(rows, first):
        try:
            items[number] = parse(row)
        except RowError as error:
            report.bad.append(BadRow(number, error.reason, error.detail))
    kept = []
    for (number, item), outcome in zip(items.items(), encode(list(items.values()), report), strict=True):
        if isinstance(outcome, RowError):
            report.bad.append(BadRow(number, outcome.reason, outcome.detail))
        elif isinstance(outcome, str):
            report.dropped[outcome] += 1
        else:
            report.formats[item.format] += 1
            kept.append((*outcome, number))
    report.kept += len(kept)
    columns: Sequence[Sequence[Any]] = list(zip(*kept, strict=True)) or [()] * len(schema)
    arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def check_countable(table: pyarrow.Table, *names: str) -> None:
    """Raise ValueError where the lists of some columns hold more values than a conversion of them can have: Arrow joins
    what it takes from several chunks, and counts that in 32 bits."""
    for name in names:
        values = table.column(name)
        while pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
            count = sum(int(chunk.offsets[-1].as_py()) - int(chunk.offsets[0].as_py()) for chunk in values.chunks)
            if count > _MOST_VALUES:
                raise ValueError(
                    f"{name} holds {count} values, {_MOST_VALUES} are accepted where data are converted from one form "
                    "to another: convert them in parts, or give rows of the form that is needed"
                )
            values = pyarrow.compute.list_flatten(values)


def fingerprint(table: pyarrow.Table) -> str:
    """Of the contents, in place; the one `datasets` makes by itself needs four times the table's memory."""
    digest = hashlib.blake2b(digest_size=8)
    for column in table.columns:
        for buffer in (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None):
            digest.update(buffer)
    return digest.hexdigest()
