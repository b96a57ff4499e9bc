"""Opens a data set by name (file, folder, hub) or in memory, with split selection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from fastalign.data.files import FILE_SUFFIXES, read_file
from fastalign.data.rows import RowSource

DEFAULT_SPLIT = "train"
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def load_rows(
    dataset: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    columns: Sequence[str] | None = None,
) -> RowSource:
    """Opens a data set for reading by row.

    dataset       a file (.jsonl, .json, .csv, .tsv, each also with .gz; .parquet), a folder from `save_to_disk`, a
                  folder with one file per split (`train.jsonl`, ...), anything else `datasets.load_dataset` takes (hub
                  names), or in memory: datasets.Dataset, DatasetDict, a list of dicts. A streamed
                  datasets.IterableDataset is read up to `max_samples`, and refused without it: it may have no end,
                  and every row is checked before training begins.
    split         name of the split with an optional slice, as in `datasets`: "train", "test[:100]", "train[90%:]".
                  "train" if None; a single file has that split alone; a data set in memory takes no split.
    config        configuration ("subset") of a hub data set.
    max_samples   read this many rows at most, counted before any is found bad.
    columns       keep only these, where present: the others of a columnar source are never decoded.

    A broken record inside a readable file becomes an `Unreadable` row. ValueError: no such data set or split, an
    unknown type of file, a file that cannot be read at all (with the line it broke at, where lines exist).
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1 or None, got {max_samples}")
    if isinstance(dataset, str | Path):
        source = _open_named(str(dataset), split, config, columns)
    elif config is not None:
        raise ValueError(
            f"config {config!r} was given with a data set in memory; only hub data sets have configurations"
        )
    elif isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        name, bounds = _parse_split(split)
        if bounds and isinstance(dataset, datasets.IterableDatasetDict):
            raise ValueError(f"split {split!r}: a streamed data set cannot be sliced; use max_samples")
        source = _from_memory(_pick_split(dataset, name, "the DatasetDict"), max_samples, columns)
        source = _slice(source, bounds)
    elif split is not None:
        raise ValueError(f"split {split!r} was given with a {type(dataset).__name__}, which has none; select its rows")
    else:
        source = _from_memory(dataset, max_samples, columns)
    if max_samples is not None:
        source = replace(source, stop=min(source.stop, source.start + max_samples))
    return source


# In memory ------------------------------------------------------------------------------------------------------------


def _from_memory(dataset: Any, max_samples: int | None, columns: Sequence[str] | None) -> RowSource:
    if isinstance(dataset, datasets.Dataset):
        return _from_dataset(dataset, "Dataset", columns)
    if isinstance(dataset, datasets.IterableDataset):
        if max_samples is None:
            raise ValueError(
                "a streamed datasets.IterableDataset was given without max_samples: set max_samples to the number of "
                "rows to read, or pass a datasets.Dataset"
            )
        return RowSource.of(list(islice(dataset.with_format(None), max_samples)), "IterableDataset")
    if isinstance(dataset, list | tuple):
        return RowSource.of(dataset, type(dataset).__name__)
    raise ValueError(
        f"cannot read rows from a {type(dataset).__name__}; accepted are a file, a folder, a hub name, "
        "datasets.Dataset, DatasetDict, IterableDataset (with max_samples) and a list of dicts"
    )


def _from_dataset(dataset: datasets.Dataset, name: str, columns: Sequence[str] | None) -> RowSource:
    total = len(dataset)  # of which nothing is left without a column
    if columns is not None:
        dataset = dataset.select_columns([column for column in dataset.column_names if column in columns])
    dataset = dataset.with_format(None)  # a torch or numpy format would turn strings and lists into something else

    def read(i: int, j: int) -> list[Any]:
        batch = dataset[i:j]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)] or [{}] * (j - i)

    return RowSource(name, read, 0, total)


# Splits ---------------------------------------------------------------------------------------------------------------


def _parse_split(split: str | None) -> tuple[str, tuple[str | None, str | None] | None]:
    """("train", None) for "train", ("train", ("10", "90%")) for "train[10:90%]"; the default split for None."""
    if split is None:
        return DEFAULT_SPLIT, None
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise ValueError(f"split {split!r} is not understood; accepted are 'name', 'name[10:100]' and 'name[:90%]'")
    return match["name"], (match["start"], match["stop"]) if "[" in split else None


def _slice(source: RowSource, bounds: tuple[str | None, str | None] | None) -> RowSource:
    """Bounds as in `datasets`: rows, or percent rounded to the nearest row; negative ones count from the end."""
    if bounds is None:
        return source
    total = len(source)

    def position(bound: str) -> int:
        value = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
        return min(max(value + total if value < 0 else value, 0), total)

    start = 0 if bounds[0] is None else position(bounds[0])
    stop = total if bounds[1] is None else position(bounds[1])
    return replace(source, start=start, stop=max(start, stop))


def _pick_split(splits: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in splits:
        raise ValueError(f"{where} has no split {name!r}; it has {', '.join(map(repr, splits)) or 'none'}")
    return splits[name]


# Named ----------------------------------------------------------------------------------------------------------------


def _open_named(name: str, split: str | None, config: str | None, columns: Sequence[str] | None) -> RowSource:
    split_name, bounds = _parse_split(split)
    source = _open_local(Path(name), split_name, columns)
    if source is None:
        source = _load_dataset(name, split_name, config, columns)
    elif config is not None:
        raise ValueError(f"config {config!r} was given with {name}; only hub data sets have configurations")
    return _slice(source, bounds)


def _open_local(path: Path, split: str, columns: Sequence[str] | None) -> RowSource | None:
    """A file, a saved data set or a folder with a file for this split; None for anything else."""
    if path.is_file() or (path.name.endswith(FILE_SUFFIXES) and not path.exists()):
        if split != DEFAULT_SPLIT:
            raise ValueError(f"{path} is one file: its split is {DEFAULT_SPLIT!r} (or a slice of it), not {split!r}")
        return read_file(path, columns)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if isinstance(saved, datasets.Dataset):  # like a single file, it is "train" whatever it was cut from
            saved = {DEFAULT_SPLIT: saved, str(saved.split or DEFAULT_SPLIT): saved}
        return _from_dataset(_pick_split(saved, split, str(path)), str(path), columns)
    files = [file for suffix in FILE_SUFFIXES if (file := path / f"{split}{suffix}").is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} has several files for the split {split!r}: {', '.join(file.name for file in files)}")
    return read_file(files[0], columns) if files else None


def _load_dataset(name: str, split: str, config: str | None, columns: Sequence[str] | None) -> RowSource:
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot load split {split!r} of the data set {name!r}: {error}") from error
    return _from_dataset(dataset, name, columns)
