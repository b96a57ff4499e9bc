"""Names, folders, splits, memory."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.rows import RowSource
from fastalign.data.sources import load_rows

ROWS = [{"chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


def _write(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _all(source: RowSource) -> list:
    return source.read(source.start, source.stop)


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "start", "stop"),
    [
        (None, 0, 10), ("train", 0, 10), ("train[:4]", 0, 4), ("train[4:]", 4, 10), ("train[2:5]", 2, 5),
        ("train[:90%]", 0, 9), ("train[90%:]", 9, 10), ("train[-3:]", 7, 10), ("train[:-20%]", 0, 8),
        ("train[5:99]", 5, 10), ("train[8:2]", 8, 8), ("train[:]", 0, 10),
    ],
)  # fmt: skip
def test_slices_keep_the_row_numbers_of_the_whole(tmp_path: Path, split: str | None, start: int, stop: int):
    source = load_rows(str(_write(tmp_path / "rows.jsonl")), split=split)
    assert (source.start, source.stop) == (start, stop)
    assert _all(source) == ROWS[start:stop]


@given(st.integers(0, 100), st.sampled_from([1, 7, 10, 33]))
def test_complementary_percentages_share_the_rows(percent: int, total: int):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"chosen": [str(i) for i in range(total)]}))
    left = load_rows(splits, split=f"train[:{percent}%]")
    right = load_rows(splits, split=f"train[{percent}%:]")
    assert (left.start, left.stop, right.stop) == (0, right.start, total)


@pytest.mark.parametrize("percent", [6, 33, 50, 67, 94])
def test_percentages_agree_with_datasets(tmp_path: Path, percent: int):
    _write(tmp_path / "data" / "train-00000-of-00001.jsonl")
    split = f"train[{percent}%:]"
    theirs = datasets.load_dataset(str(tmp_path), split=split, cache_dir=str(tmp_path / "cache"))
    assert [row["chosen"] for row in _all(load_rows(str(_write(tmp_path / "rows.jsonl")), split=split))] == theirs[
        "chosen"
    ][:]


@pytest.mark.parametrize("split", ["train[1:2", "train[a:b]", "train+test", "train[1]", "", "train[:5][:2]"])
def test_a_split_that_is_not_understood(tmp_path: Path, split: str):
    with pytest.raises(ValueError, match="not understood"):
        load_rows(str(_write(tmp_path / "rows.jsonl")), split=split)


def test_a_file_has_one_split(tmp_path: Path):
    with pytest.raises(ValueError, match="one file: its split is 'train'"):
        load_rows(str(_write(tmp_path / "rows.jsonl")), split="test")


@pytest.mark.parametrize(("max_samples", "expected"), [(3, 3), (99, 6), (None, 6)])
def test_max_samples_counts_from_the_start_of_the_slice(tmp_path: Path, max_samples: int | None, expected: int):
    source = load_rows(str(_write(tmp_path / "rows.jsonl")), split="train[4:]", max_samples=max_samples)
    assert (source.start, len(source)) == (4, expected)


def test_max_samples_must_be_positive():
    with pytest.raises(ValueError, match="max_samples must be at least 1"):
        load_rows(ROWS, max_samples=0)


# Folders and names ----------------------------------------------------------------------------------------------------


def test_a_folder_with_a_file_per_split(tmp_path: Path):
    _write(tmp_path / "train.jsonl")
    _write(tmp_path / "test.jsonl", ROWS[:2])
    assert _all(load_rows(tmp_path)) == ROWS
    assert _all(load_rows(tmp_path, split="test[1:]")) == ROWS[1:2]
    _write(tmp_path / "train.json")
    with pytest.raises(ValueError, match=r"several files for the split 'train': train.jsonl, train.json"):
        load_rows(tmp_path)


def test_folders_written_by_save_to_disk(tmp_path: Path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select(range(3))).save_to_disk(tmp_path / "two")
    assert _all(load_rows(tmp_path / "one")) == ROWS
    assert _all(load_rows(str(tmp_path / "two"), split="test")) == ROWS[:3]
    with pytest.raises(ValueError, match="has no split 'validation'; it has 'train', 'test'"):
        load_rows(tmp_path / "two", split="validation")
    (tmp_path / "one" / "state.json").write_text("{}")
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(tmp_path / "one")


def test_other_folders_and_names_go_to_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load_rows("owner/name", config="harmless", split="test[:30%]", columns=["chosen"])
    assert asked == [("owner/name", "harmless", "test")]
    assert (source.name, source.start, source.stop) == ("owner/name", 0, 3)
    assert _all(source) == [{"chosen": f"c{i}"} for i in range(3)]


def test_a_data_set_that_is_nowhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load split 'train' of the data set 'nobody/nothing'"):
        load_rows("nobody/nothing")
    with pytest.raises(ValueError, match="No such file"):
        load_rows("nowhere/rows.jsonl")


def test_only_hub_data_sets_have_configurations(tmp_path: Path):
    for dataset in (ROWS, _write(tmp_path / "rows.jsonl")):
        with pytest.raises(ValueError, match="only hub data sets have configurations"):
            load_rows(dataset, config="harmless")


# In memory ------------------------------------------------------------------------------------------------------------


def test_lists_and_datasets_in_memory():
    dataset = datasets.Dataset.from_list([{**row, "extra": 1} for row in ROWS])
    assert _all(load_rows(ROWS)) == _all(load_rows(tuple(ROWS))) == ROWS
    assert _all(load_rows(dataset, columns=["chosen", "rejected"])) == ROWS
    (formatted,) = _all(load_rows(dataset.with_format("numpy"), max_samples=1))
    assert (formatted, type(formatted["chosen"])) == ({**ROWS[0], "extra": 1}, str)
    assert _all(load_rows(datasets.DatasetDict(test=dataset), split="test[9:]")) == [{**ROWS[9], "extra": 1}]
    assert _all(load_rows(dataset, columns=["absent"])) == [{}] * 10


def test_a_data_set_in_memory_takes_no_split():
    with pytest.raises(ValueError, match="split 'train' was given with a list"):
        load_rows(ROWS, split="train")


def test_streams_need_max_samples_and_are_not_read_further():
    read = []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield {"chosen": f"c{i}", "rejected": f"r{i}"}

    stream = datasets.IterableDataset.from_generator(endless)
    with pytest.raises(ValueError, match="IterableDataset was given without max_samples"):
        load_rows(stream)
    splits = datasets.IterableDatasetDict(train=stream)
    with pytest.raises(ValueError, match="streamed data set cannot be sliced"):
        load_rows(splits, split="train[:3]", max_samples=3)
    assert _all(load_rows(splits, max_samples=3)) == ROWS[:3]
    assert len(read) < 100


@pytest.mark.parametrize("dataset", [5, None, {"chosen": []}, iter(ROWS)])
def test_other_objects_are_refused_by_type(dataset: object):
    with pytest.raises(ValueError, match=f"cannot read rows from a {type(dataset).__name__}"):
        load_rows(dataset)
