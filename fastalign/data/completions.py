"""From any source of rows to a tokenised data set to learn from by cross-entropy, with an account of every row."""

from __future__ import annotations

from typing import Any

from fastalign.data.completion_encoding import CompletionEncoder, EncodedExample
from fastalign.data.examples import Example, ExampleParser
from fastalign.data.length import LengthLimit, cut_left
from fastalign.data.preparation import IDS, MASK, Outcome, PreparedData, open_rows, prepare_rows
from fastalign.data.report import DataReport, RowError


def prepare_completions(
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
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    text_field: str = "text",
) -> PreparedData:
    """Reads, checks and tokenises rows of text, messages, prompts with completions, transcripts or preferences.

    Returns a data set with the columns input_ids, completion_mask (True: trained on; a sequence's first token never is,
    as nothing predicts it) and row. For the formats of rows see `fastalign.data.examples`.

    completion_only_loss, assistant_only_loss      what is trained on, see `CompletionEncoder`. With
                      completion_only_loss=True conversations are split before their last message, and text without a
                      completion is an error; assistant_only_loss=True makes plain text one
    text_field        the column of plain text
    max_length, truncation_mode, on_long_prompt      as for pairs where the prompt is not trained on, see `LengthLimit`;
                      where all is, "keep_start" cuts the end and "keep_end" the start, a leading BOS token kept
    The others are those of `prepare_preferences`.

    ValueError: a source that cannot be read, an unknown option, a chat template or EOS token that is needed and
    missing, or no row left.
    """
    parse = ExampleParser(
        format, getattr(tokenizer, "chat_template", None) is not None, completion_only_loss, text_field
    )
    limit = LengthLimit(max_length, truncation_mode, on_long_prompt, tokenizer.bos_token_id)
    encoder = CompletionEncoder(
        tokenizer, completion_only_loss=completion_only_loss, assistant_only_loss=assistant_only_loss
    )

    def encode(examples: list[Example], report: DataReport) -> list[Outcome]:
        return [_outcome(encoded, limit, report) for encoded in encoder(examples)]

    source = open_rows(dataset, split=split, config=config, max_samples=max_samples, columns=parse.columns)
    columns = [("input_ids", IDS), ("completion_mask", MASK)]
    return prepare_rows(source, columns, parse=parse, encode=encode, on_bad_row=on_bad_row)


def _outcome(encoded: EncodedExample | RowError, limit: LengthLimit, report: DataReport) -> Outcome:
    if isinstance(encoded, RowError):
        return encoded
    fitted = fit(encoded, limit)
    if fitted is None:
        return "long_prompt"
    mask = [False, *fitted.mask[1:]]
    if not any(mask):
        return "nothing_to_train_on"
    lost_prompt = encoded.prompt_length - fitted.prompt_length
    report.truncated_prompts += lost_prompt > 0
    report.truncated_completions += len(encoded.input_ids) - len(fitted.input_ids) > lost_prompt
    report.merged_boundaries += encoded.merged
    report.without_eos += not encoded.closed
    return fitted.input_ids, mask


def fit(example: EncodedExample, limit: LengthLimit) -> EncodedExample | None:
    """The example cut to the limit (itself if it fits); None where its prompt leaves no room."""
    ids, mask, split = example.input_ids, example.mask, example.prompt_length
    if limit.fits(len(ids)):
        return example
    prompt_ids: list[int] | None = []
    if split:
        prompt_ids = limit.cut_prompt(ids[:split], len(ids) - split)
    elif limit.truncation_mode == "keep_end":
        assert limit.max_length is not None
        kept = cut_left(ids, limit.max_length, limit.bos_token_id)
        return EncodedExample(kept, mask[-len(kept) :], 0, example.merged, example.closed)
    if prompt_ids is None:
        return None
    room = limit.room(prompt_ids)
    ids, mask = prompt_ids + ids[split:][:room], [False] * len(prompt_ids) + mask[split:][:room]
    return EncodedExample(ids, mask, len(prompt_ids), example.merged, example.closed)
