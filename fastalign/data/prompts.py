"""Prompts alone, for sampling: any row that has one, tokenised as the model is given it when it answers.

    prompts             {"prompt": str | [{"role", "content"}, ...]}, with or without "completion"
    conversations       {"messages": [...]}: up to its end, or up to the last message if that is the assistant's
    preferences         {"chosen", "rejected"} with or without "prompt": the prompt they have in common
    transcripts         "\\n\\nHuman: ..." in any of these, or in "text": up to the last "\\n\\nAssistant:"

`tools` and `chat_template_kwargs` go to the chat template, as for preference rows; other columns are left alone and
can be had by row number from `PromptColumns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets

from fastalign.data.conversations import is_transcript, messages_of, split_transcript
from fastalign.data.encoding import Rendered, ResponseEncoder
from fastalign.data.formats import (
    checked_row,
    is_empty,
    needs_chat,
    pair_parser,
    takes_no_template,
    template_kwargs_of,
    uses_chat,
)
from fastalign.data.length import ON_LONG_PROMPT, check_choice, cut_left
from fastalign.data.pairs import Message
from fastalign.data.preparation import IDS, Outcome, open_rows, prepare_rows
from fastalign.data.report import DataReport, Reason, RowError
from fastalign.data.rows import RowSource


@dataclass(slots=True)
class Prompt:
    """A prompt as text or messages, the header of the answer not included, and the answer its row gives, if any."""

    prompt: str | list[Message]
    answer: str | None
    format: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


class PromptColumns:
    """What a row holds beside the ids: read from the source when it is asked for, so nothing is kept twice.

    `columns(rows)` takes row numbers (the data set's `row`) and returns lists as long by name: `prompt` as the model
    was given it (text, or messages), `reference_answer` (the text of the row's completion, of the last assistant
    message, or of the chosen response; None where there is none) and every other column of the source, None where a
    row lacks it. A column of the source that is called reference_answer wins.
    """

    def __init__(self, source: RowSource, parse: Callable[[Any], Prompt]):
        self._source, self._parse = source, parse

    def __call__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        records = []
        for number in map(int, rows):
            (row,) = self._source.read(number, number + 1)
            parsed = self._parse(row)
            records.append({"reference_answer": parsed.answer} | row | {"prompt": parsed.prompt})
        return {name: [record.get(name) for record in records] for name in {k: None for r in records for k in r}}


class PromptData(NamedTuple):
    """`dataset`: columns prompt_ids (lists of token ids) and row (number in the source); `columns`: the rest by row."""

    dataset: datasets.Dataset
    report: DataReport
    columns: PromptColumns


def prepare_prompts(
    dataset: Any,
    tokenizer: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    format: str = "auto",
    max_length: int | None = None,
    on_long_prompt: str = "drop",
    on_bad_row: str = "error",
) -> PromptData:
    """Reads, checks and tokenises prompts: whatever rows have one, see the module.

    prompt_ids        the tokens before the first one that is sampled: BOS before plain text, the template's header of
                      the assistant's turn behind a conversation
    max_length        tokens of a prompt at most; a longer one is dropped (`on_long_prompt="drop"`), or loses its
                      beginning but not its BOS token ("truncate")
    The others are those of `prepare_preferences`.

    ValueError: a source that cannot be read, an unknown option, a chat template that is needed and missing, or no row
    left.
    """
    check_choice("on_long_prompt", on_long_prompt, ON_LONG_PROMPT)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
    parse = prompt_parser(format, getattr(tokenizer, "chat_template", None) is not None)
    encoder = ResponseEncoder(tokenizer)

    def encode(prompts: list[Prompt], report: DataReport) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for ids in encoder.encode_prompts([_render(encoder, prompt) for prompt in prompts]):
            if isinstance(ids, RowError):
                outcomes.append(ids)
            elif max_length is None or len(ids) <= max_length:
                outcomes.append((ids,))
            elif on_long_prompt == "drop":
                outcomes.append("long_prompt")
            else:
                report.truncated_prompts += 1
                outcomes.append((cut_left(ids, max_length, tokenizer.bos_token_id),))
        return outcomes

    source = open_rows(dataset, split=split, config=config, max_samples=max_samples)
    prepared = prepare_rows(source, [("prompt_ids", IDS)], parse=parse, encode=encode, on_bad_row=on_bad_row)
    return PromptData(*prepared, PromptColumns(source, parse))


def _render(encoder: ResponseEncoder, prompt: Prompt) -> Rendered | RowError:
    if isinstance(prompt.prompt, str):
        return Rendered(prompt.prompt, {}, plain=True)
    return encoder.render_chat(prompt.prompt, {}, prompt.template_kwargs)


def prompt_parser(format: str, has_template: bool) -> Callable[[Any], Prompt]:
    """The function from a row to its `Prompt`; see `pair_parser`, whose errors it shares."""
    chat, parse_pair = uses_chat(format, has_template), pair_parser(format, has_template)

    def parse(row: Any) -> Prompt:
        row = checked_row(row, (), ("prompt", "completion", "messages", "text"))
        prompt = _find(row)
        prompt.template_kwargs = template_kwargs_of(row)
        if isinstance(prompt.prompt, str):
            takes_no_template(prompt.template_kwargs)
        elif prompt.prompt and (role := prompt.prompt[-1]["role"]) not in ("user", "tool"):
            raise RowError(Reason.WRONG_ROLE, f"the prompt ends with role {role!r}, not 'user' or 'tool'")
        if all(map(is_empty, [prompt.prompt] if isinstance(prompt.prompt, str) else prompt.prompt)):
            raise RowError(Reason.EMPTY_PROMPT, "there is nothing in it")
        return prompt

    def _find(row: dict[str, Any]) -> Prompt:
        if "chosen" in row and "rejected" in row:
            pair = parse_pair(row)
            return Prompt(pair.prompt, _text(pair.chosen), pair.format)
        if (prompt := row.get("prompt")) is not None:
            return _from_prompt(prompt, _text(row.get("completion")))
        if "messages" in row:
            return _from_messages(row["messages"])
        if is_transcript(row.get("text")):
            found, answer = split_transcript(row["text"], chat=chat)
            return Prompt(found, _text(answer), f"transcript as {'chat' if chat else 'text'}")
        raise RowError(Reason.MISSING_KEY, "no prompt, no messages, no transcript, no chosen and rejected")

    def _from_prompt(prompt: str | list[Any], answer: str | None) -> Prompt:
        if is_transcript(prompt):
            assert isinstance(prompt, str)
            found, own = split_transcript(prompt, chat=chat)
            if own is not None:
                raise RowError(Reason.WRONG_ROLE, "the prompt ends with an Assistant turn")
            return Prompt(found, answer, f"prompt, transcript as {'chat' if chat else 'text'}")
        if isinstance(prompt, str) and format != "chat":
            return Prompt(prompt, answer, "prompt, text")
        needs_chat(chat, has_template)
        return Prompt(messages_of(prompt, "prompt", "user"), answer, "prompt, messages")

    def _from_messages(value: str | list[Any]) -> Prompt:
        if isinstance(value, str):
            raise RowError(Reason.WRONG_TYPE, "messages is a str, not a list of messages")
        needs_chat(chat, has_template)
        messages, answer = messages_of(value, "messages", "user"), None
        if messages and messages[-1]["role"] == "assistant":
            answer = _text(messages.pop())
        return Prompt(messages, answer, "messages")

    return parse


def _text(answer: str | Message | list[Any] | None) -> str | None:
    """The text of an answer: itself, a message's content, or that of a list's last message."""
    if isinstance(answer, list):
        messages = messages_of(answer, "completion", "assistant")
        answer = messages[-1] if messages else None
    return answer["content"] if isinstance(answer, dict) else answer
