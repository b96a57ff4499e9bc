"""Preference rows in the formats people have, turned into one: a `Pair` of a prompt and two responses.

    strings, explicit prompt      {"prompt": str, "chosen": str, "rejected": str}
    strings, implicit prompt      {"chosen": str, "rejected": str}                   split at their common beginning
    messages, explicit prompt     {"prompt": [{"role", "content"}, ...], "chosen": [...], "rejected": [...]}
    messages, implicit prompt     {"chosen": [...], "rejected": [...]}               split after their common messages
    transcripts                   strings of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns: Anthropic's HH data

The first four are TRL's. With messages the prompt may also be one string (the user's message), a response one string
(the assistant's), and a response may repeat the prompt's messages. Optional columns: `tools` (list or JSON text) and
`chat_template_kwargs` (dict) are passed to the chat template; any other column is left alone.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

from fastalign.data.conversations import from_messages, from_transcripts, transcripts_of
from fastalign.data.pairs import ChatPair, Message, Pair, TextPair, common_length
from fastalign.data.report import Reason, RowError
from fastalign.data.rows import Unreadable

FORMATS = ("auto", "chat", "text")
"""How rows reach the model.

auto    messages and transcripts through the tokenizer's chat template; without a template transcripts stay plain text
        (and messages are an error); other strings are plain text
chat    everything through the chat template; strings with a prompt become a user's and an assistant's message
text    everything as plain text, transcripts verbatim; messages are an error
"""

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "image", "images")
"""The columns that are read; image columns only to refuse them."""


def pair_parser(format: str, has_template: bool) -> Callable[[Any], Pair]:
    """The function from a row to its `Pair`, for a `format` (see FORMATS) and a tokenizer with or without a template.

    It raises RowError for a bad row. ValueError, here: unknown format, or format "chat" without a template.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; accepted are {', '.join(map(repr, FORMATS))}")
    if format == "chat" and not has_template:
        raise ValueError("format='chat' needs a chat template, and the tokenizer has none; set tokenizer.chat_template")
    chat = has_template and format != "text"

    def parse(row: Any) -> Pair:
        pair: Pair
        row = _checked_row(row)
        template_kwargs = _template_kwargs(row)
        if not all(isinstance(row.get(key, ""), str) for key in ("prompt", "chosen", "rejected")):
            if not chat:
                why = "format='text'" if has_template else "the tokenizer has none"
                raise RowError(Reason.UNSUPPORTED, f"messages need a chat template, and {why}")
            pair = from_messages(row)
        elif (transcripts := transcripts_of(row)) is not None:
            pair = from_transcripts(*transcripts, chat=chat)
        elif format == "chat":
            if "prompt" not in row:
                raise RowError(Reason.MISSING_KEY, "no prompt: format='chat' needs one beside plain strings")
            pair = from_messages(row)
        else:
            pair = _from_strings(row)
        if isinstance(pair, ChatPair):
            pair.template_kwargs = template_kwargs
        elif template_kwargs:
            raise RowError(Reason.UNSUPPORTED, f"{' and '.join(template_kwargs)} with plain text: no template takes it")
        _check_pair(pair)
        return pair

    return parse


# Checks ---------------------------------------------------------------------------------------------------------------


def _checked_row(row: Any) -> dict[str, Any]:
    """The row without its None values: a columnar source gives every row every key."""
    if isinstance(row, Unreadable):
        raise RowError(Reason.UNREADABLE, row.detail)
    if not isinstance(row, dict):
        raise RowError(Reason.WRONG_TYPE, f"the row is a {type(row).__name__}, not an object with keys")
    row = {key: value for key, value in row.items() if value is not None}
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise RowError(Reason.MISSING_KEY, f"no {' and no '.join(missing)}")
    for key in ("prompt", "chosen", "rejected"):
        if key in row and not isinstance(row[key], str | list):
            found = type(row[key]).__name__
            raise RowError(Reason.WRONG_TYPE, f"{key} is a {found}, not a string or a list of messages")
    for key in ("image", "images"):
        if row.get(key):
            raise RowError(Reason.UNSUPPORTED, f"column {key!r}: text only")
    return row


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise RowError(Reason.WRONG_TYPE, f"chat_template_kwargs is a {type(kwargs).__name__}, not an object")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(Reason.UNREADABLE, f"tools: broken JSON at column {error.colno}: {error.msg}") from None
    if tools and not isinstance(tools, list):
        raise RowError(Reason.WRONG_TYPE, f"tools is a {type(tools).__name__}, not a list")
    return {**kwargs, "tools": tools} if tools else kwargs


def _check_pair(pair: Pair) -> None:
    prompt = [pair.prompt] if isinstance(pair, TextPair) else pair.prompt
    if all(map(_is_empty, prompt)):
        raise RowError(Reason.EMPTY_PROMPT, "nothing comes before the responses")
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(response):
            raise RowError(Reason.EMPTY_RESPONSE, name)
    if pair.chosen == pair.rejected:
        raise RowError(Reason.IDENTICAL, "chosen equals rejected")


def _is_empty(part: str | Message) -> bool:
    if isinstance(part, str):
        return not part.strip()
    return not part["content"].strip() and not part.get("tool_calls")


# Strings --------------------------------------------------------------------------------------------------------------


def _from_strings(row: dict[str, Any]) -> TextPair:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return TextPair(row["prompt"], chosen, rejected, "text, explicit prompt")
    if chosen == rejected:
        raise RowError(Reason.IDENTICAL, "chosen equals rejected")
    split = _split_point(chosen, rejected)
    if not chosen[:split].strip():
        raise RowError(Reason.NO_COMMON_PROMPT, "chosen and rejected begin differently")
    return TextPair(chosen[:split], chosen[split:], rejected[split:], "text, implicit prompt")


def _split_point(chosen: str, rejected: str) -> int:
    """Length of the common beginning, moved back to the start of a word and over one space before it.

    TRL splits where the characters first differ, even inside a word: "is blue" and "is black" leave it "ue" and "ack".
    Where words differ from their first letter on, the two agree. Wide characters (Chinese, Japanese, Korean) are not
    parts of words.
    """
    split = common_length(chosen, rejected)
    if any(_in_word(text[split]) for text in (chosen, rejected) if split < len(text)):
        while split and _in_word(chosen[split - 1]):
            split -= 1
    return split - 1 if split and chosen[split - 1] == " " else split


def _in_word(character: str) -> bool:
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"
