"""From any source of judged responses to a tokenised data set, with an account of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pyarrow

from fastalign.data.encoding import EncodedResponses, Rendered, ResponseEncoder
from fastalign.data.judgements import LABEL_COLUMNS, LABEL_TYPES, LIST_COLUMNS, Judged, label_parser, list_parser
from fastalign.data.length import LengthLimit, check_choice
from fastalign.data.preparation import IDS, Outcome, PreparedData, open_rows, prepare_rows
from fastalign.data.report import DataReport, Reason, RowError


def prepare_lists(
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
    scores: bool = False,
) -> PreparedData:
    """Reads, checks and tokenises ranked or scored responses; see `judgements` for the rows.

    Columns: prompt_ids, response_ids (K lists of token ids), ranks (K float32: 1 is best, ties are equal) and row;
    with `scores` also scores (K float32), which all rows must have. The other arguments are those of
    `prepare_preferences`; all responses of a row share one prompt.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    limit = LengthLimit(max_length, truncation_mode, on_long_prompt, tokenizer.bos_token_id)

    def finish(prompt_ids: list[int], responses: list[list[int]], item: Judged) -> tuple[Any, ...]:
        return prompt_ids, responses, item.values, *([item.scores] if scores else [])

    source = open_rows(dataset, split=split, config=config, max_samples=max_samples, columns=LIST_COLUMNS)
    numbers = pyarrow.list_(pyarrow.float32())
    columns = [("prompt_ids", IDS), ("response_ids", pyarrow.list_(IDS)), ("ranks", numbers)]
    columns += [("scores", numbers)] if scores else []
    parse = list_parser(format, has_template, scores)
    return prepare_rows(source, columns, parse=parse, encode=_encoder(tokenizer, limit, finish), on_bad_row=on_bad_row)


def prepare_labelled(
    dataset: Any,
    tokenizer: Any,
    *,
    label_type: str | None = None,
    split: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    format: str = "auto",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_long_prompt: str = "drop",
    on_bad_row: str = "error",
) -> PreparedData:
    """Reads, checks and tokenises labelled responses; see `judgements` for the rows.

    Columns: prompt_ids, completion_ids, label and row; label is bool where labels are binary, else float32.
    label_type: "binary", "scalar", or None: binary if every label is a bool or one of the integers 0 and 1. The other
    arguments are those of `prepare_preferences`.
    """
    if label_type is not None:
        check_choice("label_type", label_type, LABEL_TYPES)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    limit = LengthLimit(max_length, truncation_mode, on_long_prompt, tokenizer.bos_token_id)

    def finish(prompt_ids: list[int], responses: list[list[int]], item: Judged) -> tuple[Any, ...]:
        return prompt_ids, responses[0], item.values[0]

    seen: set[str] = set()
    source = open_rows(dataset, split=split, config=config, max_samples=max_samples, columns=LABEL_COLUMNS)
    data, report = prepare_rows(
        source,
        [("prompt_ids", IDS), ("completion_ids", IDS), ("label", pyarrow.float32())],
        parse=label_parser(format, has_template, label_type, seen),
        encode=_encoder(tokenizer, limit, finish),
        on_bad_row=on_bad_row,
    )
    if seen == {"binary"}:
        labels = pyarrow.array([label == 1.0 for label in data["label"]])
        data = data.remove_columns("label").add_column("label", labels)
    return PreparedData(data, report)


def _encoder(
    tokenizer: Any,
    limit: LengthLimit,
    finish: Callable[[list[int], list[list[int]], Judged], tuple[Any, ...]],
) -> Callable[[list[Judged], DataReport], list[Outcome]]:
    encoder = ResponseEncoder(tokenizer)

    def render(item: Judged) -> Rendered | RowError:
        if isinstance(item.prompt, str):
            return Rendered(item.prompt, item.responses, plain=True)
        messages = {name: [response] for name, response in item.responses.items()}
        return encoder.render_chat(item.prompt, messages, item.template_kwargs)

    def encode(items: list[Judged], report: DataReport) -> list[Outcome]:
        encoded = encoder.encode([render(item) for item in items])
        return [outcome(item, ids, report) for item, ids in zip(items, encoded, strict=True)]

    def outcome(item: Judged, encoded: EncodedResponses | RowError, report: DataReport) -> Outcome:
        if isinstance(encoded, RowError):
            return encoded
        if _conflict(encoded.responses, item.values):
            return RowError(Reason.IDENTICAL, "two responses of different rank have the same tokens")
        fitted = fit_responses(limit, encoded.prompt_ids, encoded.responses)
        if fitted is None:
            return "long_prompt"
        prompt_ids, responses = fitted
        if _conflict(responses, item.values):
            return "identical_after_truncation"
        report.truncated_prompts += len(prompt_ids) < len(encoded.prompt_ids)
        report.truncated_completions += any(map(_shorter, responses, encoded.responses))
        report.merged_boundaries += encoded.merged
        report.without_eos += sum(encoder.eos_token_id not in ids for ids in encoded.responses)
        return finish(prompt_ids, responses, item)

    return encode


def fit_responses(
    limit: LengthLimit, prompt_ids: list[int], responses: list[list[int]]
) -> tuple[list[int], list[list[int]]] | None:
    """Prompt and responses cut by the rules of `LengthLimit`, or None where the row is dropped for its prompt."""
    longest = max(map(len, responses))
    if limit.fits(len(prompt_ids) + longest):
        return prompt_ids, responses
    cut = limit.cut_prompt(prompt_ids, longest)
    if cut is None:
        return None
    room = limit.room(cut)
    return cut, [ids[:room] for ids in responses]


def _shorter(ids: Sequence[int], before: Sequence[int]) -> bool:
    return len(ids) < len(before)


def _conflict(responses: list[list[int]], values: list[float]) -> bool:
    """Whether two responses are the same and their ranks are not."""
    pairs = zip(combinations(responses, 2), combinations(values, 2), strict=True)
    return any(a == b and x != y for (a, b), (x, y) in pairs)
