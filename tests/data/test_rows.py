"""Reading by position."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastalign.data.rows import RowSource


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_cover_every_row_once_and_number_it(size: int):
    source = replace(RowSource.of([{"a": i} for i in range(10)], "ten"), start=2, stop=9)
    batches = list(source.batches(size))
    assert len(source) == 7
    assert all(1 <= len(rows) <= size for _, rows in batches)
    assert [(first + i, row["a"]) for first, rows in batches for i, row in enumerate(rows)] == [
        (i, i) for i in range(2, 9)
    ]


def test_an_empty_source_has_no_batches():
    assert list(RowSource.of([], "none").batches(4)) == []
