"""The loop over rows, without tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow
import pytest

import fastalign.data.preparation as preparation
from fastalign.data.preparation import open_rows, prepare_rows
from fastalign.data.report import BadRowsError, DataReport, Reason, RowError
from fastalign.data.rows import RowSource


@dataclass
class Number:
    value: int
    format: str


def _parse(row: int) -> Number:
    if row < 0:
        raise RowError(Reason.WRONG_TYPE, "negative")
    return Number(row, "even" if row % 2 == 0 else "odd")


def _encode(items: list[Number], report: DataReport) -> list:
    outcomes: list = []
    for item in items:
        if item.value == 7:
            outcomes.append(RowError(Reason.BOUNDARY, "seven"))
        elif item.value > 100:
            outcomes.append("large")
        else:
            outcomes.append((item.value, [item.value] * 2))
    return outcomes


def _prepare(rows: list[int], on_bad_row: str = "skip"):
    columns = [("value", pyarrow.int64()), ("twice", pyarrow.list_(pyarrow.int32()))]
    return prepare_rows(RowSource.of(rows, "numbers"), columns, parse=_parse, encode=_encode, on_bad_row=on_bad_row)


@pytest.mark.parametrize("size", [1, 3, 512])
def test_every_row_is_kept_dropped_or_bad(monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.setattr(preparation, "_BATCH_ROWS", size)
    dataset, report = _prepare([4, -1, 7, 101, 5, 200, 6])
    assert dataset.to_list() == [{"value": v, "twice": [v, v], "row": row} for v, row in ((4, 0), (5, 4), (6, 6))]
    assert [(bad.row, bad.reason) for bad in report.bad] == [(1, Reason.WRONG_TYPE), (2, Reason.BOUNDARY)]
    assert (report.read, report.kept, report.dropped) == (7, 3, {"large": 2})
    assert report.formats == {"even": 2, "odd": 1}


def test_the_fingerprint_is_of_the_contents():
    assert _prepare([1, 2])[0]._fingerprint == _prepare([1, 2])[0]._fingerprint != _prepare([1, 3])[0]._fingerprint


def test_refusals():
    with pytest.raises(BadRowsError, match="2 of 3 rows of numbers"):
        _prepare([1, 7, -1], on_bad_row="error")
    with pytest.raises(ValueError, match="no row is left to train on: numbers: 0 of 2"):
        _prepare([7, 200])
    with pytest.raises(ValueError, match="on_bad_row 'ignore' is unknown"):
        _prepare([1], on_bad_row="ignore")
    with pytest.raises(ValueError, match="belong to load_rows"):
        open_rows(RowSource.of([1], "numbers"), split="train")


def test_more_values_than_a_conversion_can_have_are_counted_and_named():
    """2^31 zeros that are never written take no memory."""
    values = pyarrow.array(np.zeros(2**29, np.int32))
    part = pyarrow.ListArray.from_arrays(pyarrow.array([0, 5, 2**29], pyarrow.int32()), values)
    preparation.check_countable(pyarrow.table({"small": pyarrow.chunked_array([part] * 3)}), "small")
    with pytest.raises(ValueError, match="large holds 2147483648 values, 2147483647 are accepted where"):
        preparation.check_countable(pyarrow.table({"large": pyarrow.chunked_array([part] * 4)}), "large")
    outer = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), part)
    with pytest.raises(ValueError, match="nested holds 2147483648 values"):
        preparation.check_countable(pyarrow.table({"nested": pyarrow.chunked_array([outer] * 4)}), "nested")
    preparation.check_countable(pyarrow.table({"none": pyarrow.chunked_array([outer])[:0]}), "none")
