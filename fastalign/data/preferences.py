"""From any source of preference rows to a tokenised data set, with an account of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import pyarrow
from datasets.utils import tqdm

from fastalign.data.encoding import Encoded, PairEncoder
from fastalign.data.formats import COLUMNS, Pair, pair_parser
from fastalign.data.length import LengthLimit
from fastalign.data.report import BadRow, BadRowsError, DataReport, RowError
from fastalign.data.rows import RowSource
from fastalign.data.sources import load_rows

ON_BAD_ROW = ("error", "skip")
"""What a bad row does: raise BadRowsError once all rows are read, or be left out and reported."""

_BATCH_ROWS = 512
_IDS = pyarrow.list_(pyarrow.int32())
_SCHEMA = pyarrow.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS), ("row", pyarrow.int64())])


class PreferenceData(NamedTuple):
    """`dataset`: columns prompt_ids, chosen_ids, rejected_ids (lists of token ids) and row (number in the source)."""

    dataset: datasets.Dataset
    report: DataReport


def prepare_preferences(
    dataset: Any,
    tokenizer: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    format: str = "auto",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_long_prompt: str = "drop",
    on_bad_row: str = "error",
) -> PreferenceData:
    """Reads, checks and tokenises preference rows.

    dataset, split, config, max_samples     see `load_rows`; a `RowSource` is taken as it is
    tokenizer         a transformers tokenizer; its pad token plays no part here
    format            "auto", "chat" or "text": how rows reach the model, see `formats.FORMATS`. "auto" turns
                      transcripts into messages when the tokenizer has a chat template; "text" keeps them verbatim
    max_length, truncation_mode, on_long_prompt      see `LengthLimit`
    on_bad_row        "error": BadRowsError if any row is bad, after reading all, with the first ten and the counts by
                      reason; "skip": leave them out (they are in the report)

    ValueError: a source that cannot be read, an unknown option, a chat template or EOS token that is needed and
    missing, or no row left.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row {on_bad_row!r} is unknown; accepted are {', '.join(map(repr, ON_BAD_ROW))}")
    parse = pair_parser(format, getattr(tokenizer, "chat_template", None) is not None)
    limit = LengthLimit(max_length, truncation_mode, on_long_prompt, tokenizer.bos_token_id)
    encoder = PairEncoder(tokenizer)
    if not isinstance(dataset, RowSource):
        dataset = load_rows(dataset, split=split, config=config, max_samples=max_samples, columns=COLUMNS)
    elif (split, config, max_samples) != (None, None, None):
        raise ValueError("split, config and max_samples belong to load_rows when a RowSource is given")
    report = DataReport(source=dataset.name)
    tables = []
    with tqdm(total=len(dataset), desc="Tokenizing", unit=" rows", delay=2, disable=None) as progress:
        for first, rows in dataset.batches(_BATCH_ROWS):
            pairs: dict[int, Pair] = {}
            for number, row in enumerate(rows, first):
                try:
                    pairs[number] = parse(row)
                except RowError as error:
                    report.bad.append(BadRow(number, error.reason, error.detail))
            tables.append(_encode_batch(pairs, encoder, limit, report))
            report.read += len(rows)
            progress.update(len(rows))
    report.bad.sort()
    if report.bad and on_bad_row == "error":
        raise BadRowsError(report)
    if not report.kept:
        raise ValueError(f"no row is left to train on: {report}")
    table = pyarrow.concat_tables(tables)
    return PreferenceData(datasets.Dataset(table, fingerprint=_fingerprint(table)), report)


def _fingerprint(table: pyarrow.Table) -> str:
    """Of the contents, in place; the one `datasets` makes by itself needs four times the table's memory."""
    digest = hashlib.blake2b(digest_size=8)
    for column in table.columns:
        for buffer in (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None):
            digest.update(buffer)
    return digest.hexdigest()


def _encode_batch(
    pairs: dict[int, Pair], encoder: PairEncoder, limit: LengthLimit, report: DataReport
) -> pyarrow.Table:
    kept: list[tuple[list[int], list[int], list[int], int]] = []
    for (number, pair), encoded in zip(pairs.items(), encoder(list(pairs.values())), strict=True):
        if isinstance(encoded, RowError):
            report.bad.append(BadRow(number, encoded.reason, encoded.detail))
            continue
        fitted = limit(encoded)
        if isinstance(fitted, str):
            report.dropped[fitted] += 1
            continue
        report.formats[pair.format] += 1
        _count(report, encoded, fitted, encoder.eos_token_id)
        kept.append((fitted.prompt_ids, fitted.chosen_ids, fitted.rejected_ids, number))
    report.kept += len(kept)
    columns: Sequence[Sequence[Any]] = list(zip(*kept, strict=True)) or [()] * len(_SCHEMA)
    arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pyarrow.Table.from_arrays(arrays, schema=_SCHEMA)


def _count(report: DataReport, encoded: Encoded, fitted: Encoded, eos_token_id: int | None) -> None:
    report.truncated_prompts += len(fitted.prompt_ids) < len(encoded.prompt_ids)
    report.truncated_chosen += len(fitted.chosen_ids) < len(encoded.chosen_ids)
    report.truncated_rejected += len(fitted.rejected_ids) < len(encoded.rejected_ids)
    report.merged_boundaries += encoded.merged
    report.without_eos += sum(eos_token_id not in ids for ids in (encoded.chosen_ids, encoded.rejected_ids))
