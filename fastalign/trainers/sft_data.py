"""Data for SFT: the tokenizer that a config asks for, and rows to examples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastalign.data import CompletionCollator, DataReport, load_rows, prepare_completions
from fastalign.data.packing import pack
from fastalign.data.rows import RowSource
from fastalign.trainers.examples import Examples, padding_id, row_options
from fastalign.trainers.reference import list_lengths
from fastalign.trainers.sft_config import SFTConfig

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "completion_mask")
TEMPLATE_SUFFIXES = (".jinja", ".j2")

FormattingFunc = Callable[[dict[str, Any]], str]


def completion_examples(tokenizer: Any, args: SFTConfig, formatting_func: FormattingFunc | None = None) -> Examples:
    """Sequences to learn from: input_ids, completion_mask. formatting_func makes the text of a row."""
    if formatting_func is not None and (args.completion_only_loss or args.assistant_only_loss):
        raise ValueError(
            "formatting_func makes plain text, which has no completion and no turns: leave out completion_only_loss "
            "and assistant_only_loss, or give rows with a prompt and a completion, or messages"
        )

    def tokenize(dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        if formatting_func is not None:
            dataset, options = _formatted(load_rows(dataset, **options), formatting_func, args.dataset_text_field), {}
        return prepare_completions(
            dataset, tokenizer, completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss, text_field=args.dataset_text_field,
            **options, **limits,
        )  # fmt: skip

    # "bfd_split" cuts what is too long only when it packs
    split = args.packing and args.packing_strategy == "bfd_split"
    limits = row_options(args) | ({"max_length": None} if split else {})
    piece = args.max_length if split else None

    def lengths(dataset: Dataset) -> np.ndarray:
        found = list_lengths(dataset, "input_ids")
        return found if piece is None else np.minimum(found, piece)

    collator = CompletionCollator(padding_id(tokenizer), pad_to_multiple_of=args.pad_to_multiple_of)
    return Examples(tokenizer, args, tokenize, COLUMNS, lengths, collator)


def packed(dataset: Dataset, name: str, args: SFTConfig) -> Dataset:
    """A tokenised data set with several sequences an example; one with seq_lengths is packed already."""
    if "seq_lengths" in dataset.column_names:
        return dataset
    assert args.max_length is not None
    whole = pack(dataset, args.max_length, args.packing_strategy)
    full = list_lengths(whole, "input_ids").mean() / args.max_length
    logger.info("%s data: %d sequences packed into %d, %.1f %% full", name, len(dataset), len(whole), 100 * full)
    return whole


def _formatted(source: RowSource, formatting_func: FormattingFunc, text_field: str) -> RowSource:
    """Rows with the text that `formatting_func` makes of each; broken records stay what they are."""

    def read(start: int, stop: int) -> list[Any]:
        rows = source.read(start, stop)
        return [{text_field: formatting_func(row)} if isinstance(row, dict) else row for row in rows]

    return replace(source, read=read)


# The tokenizer --------------------------------------------------------------------------------------------------------


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Give the tokenizer the chat template and the end-of-sequence token that the config names, in place.

    Raises ValueError: no template there, special tokens of that template that the vocabulary lacks, or no such token.
    """
    if args.chat_template_path is not None:
        tokenizer.chat_template = _template(args.chat_template_path, tokenizer, args)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={args.eos_token!r}: it is not in the vocabulary of the tokenizer")
        tokenizer.eos_token = args.eos_token


def _template(path: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str:
    if path.endswith(TEMPLATE_SUFFIXES):
        if not Path(path).is_file():
            raise ValueError(f"chat_template_path={path!r}: there is no such file")
        return Path(path).read_text(encoding="utf-8")
    other = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    template = other.chat_template
    if not isinstance(template, str):
        kind = "has no chat template" if template is None else f"has several: {', '.join(template)}"
        raise ValueError(f"chat_template_path={path!r}: that tokenizer {kind}")
    vocabulary = tokenizer.get_vocab()
    own = [token for token in other.get_added_vocab() if token in template and token not in vocabulary]
    if own:
        raise ValueError(
            f"chat_template_path={path!r}: its template writes {', '.join(own)}, which this tokenizer does not have; "
            "add them to the tokenizer and resize the model's embeddings first"
        )
    return template
