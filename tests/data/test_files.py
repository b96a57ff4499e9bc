"""Files of every accepted type, whole and broken."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastalign.data.files import FILE_SUFFIXES, read_file
from fastalign.data.rows import Unreadable

ROWS = [
    {"prompt": "a,b", "chosen": 'say "x"\nand y', "rejected": "z"},
    {"prompt": "ü 中", "chosen": "c", "rejected": "r"},
    {"prompt": "last", "chosen": "c" * 200_000, "rejected": "longer than csv's default field limit"},
]


def _write(path: Path, rows: list[dict]) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.name.endswith(".gz") else open)(path, "wt", encoding="utf-8", newline="") as stream:
        if name.endswith(".jsonl"):
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, stream, indent=1)
        else:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def _all(source):
    return source.read(source.start, source.stop)


@pytest.mark.parametrize("suffix", FILE_SUFFIXES)
def test_every_type_gives_the_same_rows(tmp_path: Path, suffix: str):
    source = read_file(_write(tmp_path / f"rows{suffix}", ROWS))
    assert _all(source) == ROWS
    assert source.read(1, 2) == ROWS[1:2]
    assert source.name.endswith(f"rows{suffix}")


def test_the_csv_field_limit_is_restored(tmp_path: Path):
    before = csv.field_size_limit(1234)
    try:
        read_file(_write(tmp_path / "rows.csv", ROWS))
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str):
    path = _write(tmp_path / f"rows{suffix}", ROWS[:2])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert _all(read_file(path)) == ROWS[:2]


def test_json_lines_under_the_name_json(tmp_path: Path):
    _write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.json")
    assert _all(read_file(tmp_path / "rows.json")) == ROWS


def test_broken_json_lines_are_rows_that_name_their_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\n\n{"a": \n   \n"\xff"\n' + deep + b'\n{"a": 2}')
    first, broken, not_utf8, nested, last = _all(read_file(path))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert broken.detail.startswith("line 3: broken JSON at column 6")
    assert not_utf8 == Unreadable("line 5: not UTF-8 at byte 2")
    assert nested == Unreadable("line 6: JSON nested too deep")


def test_csv_rows_with_other_than_the_header_s_fields_name_their_line(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('chosen,rejected\n"a\nb",c\n\nd\ne,f,g\nh,i\n')
    assert _all(read_file(path)) == [
        {"chosen": "a\nb", "rejected": "c"},
        Unreadable("line 5: 1 fields, the header has 2"),
        Unreadable("line 6: 3 fields, the header has 2"),
        {"chosen": "h", "rejected": "i"},
    ]


def test_parquet_reads_only_the_columns_asked_for(tmp_path: Path):
    path = _write(tmp_path / "rows.parquet", ROWS)
    assert _all(read_file(path, columns=["chosen", "absent"])) == [{"chosen": row["chosen"]} for row in ROWS]
    assert _all(read_file(path, columns=["absent"])) == [{}, {}, {}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"", "known type.*jsonl"),
        ("rows.csv", b'a,b\n1,2\n"open', "broken CSV at line 3"),
        ("rows.csv", b"a,b\n1,\xff\n", "not UTF-8 at line 2, byte 3"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', "broken JSON at line 2, column 8"),
        ("rows.json", b'["\xff"]', "not UTF-8 at byte 3"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz"])
def test_a_torn_gzip_file_names_the_last_line_it_gave(tmp_path: Path, suffix: str):
    import random

    random.seed(0)  # incompressible, so that half the bytes hold about half the lines
    rows = [{"chosen": random.randbytes(50).hex(), "rejected": str(i)} for i in range(5000)]
    path = _write(tmp_path / f"rows{suffix}", rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read beyond line [12]\d\d\d:"):
        read_file(path)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read.*No such file"):
        read_file(tmp_path / "rows.jsonl")
