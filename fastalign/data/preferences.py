"""From any source of preference rows to a tokenised data set, with an account of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow

from fastalign.data.encoding import Encoded, PairEncoder
from fastalign.data.formats import COLUMNS, Pair, pair_parser
from fastalign.data.judgements import number_of
from fastalign.data.length import LengthLimit
from fastalign.data.preparation import IDS, ON_BAD_ROW, Outcome, PreparedData, open_rows, prepare_rows
from fastalign.data.report import DataReport, Reason, RowError

__all__ = ["ON_BAD_ROW", "PreferenceData", "prepare_preferences"]

PreferenceData = PreparedData


@dataclass(slots=True)
class _Numbered:
    pair: Pair
    numbers: tuple[float, ...]
    format: str


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
    numbers: Sequence[str] = (),
) -> PreferenceData:
    """Reads, checks and tokenises preference rows: columns prompt_ids, chosen_ids, rejected_ids, `numbers` and row.

    dataset, split, config, max_samples     see `load_rows`; a `RowSource` is taken as it is
    tokenizer         a transformers tokenizer; its pad token plays no part here
    format            "auto", "chat" or "text": how rows reach the model, see `formats.FORMATS`. "auto" turns
                      transcripts into messages when the tokenizer has a chat template; "text" keeps them verbatim
    max_length, truncation_mode, on_long_prompt      see `LengthLimit`
    on_bad_row        "error": BadRowsError if any row is bad, after reading all, with the first ten and the counts by
                      reason; "skip": leave them out (they are in the report)
    numbers           further columns, of one finite number a row, that are kept as float32: "margin"

    ValueError: a source that cannot be read, an unknown option, a chat template or EOS token that is needed and
    missing, or no row left.
    """
    parse_pair = pair_parser(format, getattr(tokenizer, "chat_template", None) is not None)
    limit = LengthLimit(max_length, truncation_mode, on_long_prompt, tokenizer.bos_token_id)
    encoder = PairEncoder(tokenizer)

    def parse(row: Any) -> _Numbered:
        pair = parse_pair(row)
        return _Numbered(pair, tuple(_number(row, name) for name in numbers), pair.format)

    def encode(items: list[_Numbered], report: DataReport) -> list[Outcome]:
        outcomes = (_outcome(ids, limit, report, encoder.eos_token_id) for ids in encoder([i.pair for i in items]))
        return [
            (*outcome, *item.numbers) if isinstance(outcome, tuple) else outcome
            for item, outcome in zip(items, outcomes, strict=True)
        ]

    source = open_rows(dataset, split=split, config=config, max_samples=max_samples, columns=(*COLUMNS, *numbers))
    columns = [(name, IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    columns += [(name, pyarrow.float32()) for name in numbers]
    return prepare_rows(source, columns, parse=parse, encode=encode, on_bad_row=on_bad_row)


def _number(row: dict[str, Any], name: str) -> float:
    if row.get(name) is None:
        raise RowError(Reason.MISSING_KEY, f"no {name}, which other rows have")
    return number_of(row[name], name)


def _outcome(encoded: Encoded | RowError, limit: LengthLimit, report: DataReport, eos_token_id: int | None) -> Outcome:
    if isinstance(encoded, RowError):
        return encoded
    fitted = limit(encoded)
    if isinstance(fitted, str):
        return fitted
    report.truncated_prompts += len(fitted.prompt_ids) < len(encoded.prompt_ids)
    report.truncated_chosen += len(fitted.chosen_ids) < len(encoded.chosen_ids)
    report.truncated_rejected += len(fitted.rejected_ids) < len(encoded.rejected_ids)
    report.merged_boundaries += encoded.merged
    report.without_eos += sum(eos_token_id not in ids for ids in (encoded.chosen_ids, encoded.rejected_ids))
    return fitted.prompt_ids, fitted.chosen_ids, fitted.rejected_ids
