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
from fastalign.data.files import parse_json
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

# Arguments of `apply_chat_template` that are not variables of a template. The template itself above all: it is a
# program, which comes with the tokenizer and never with a row of data.
_NOT_A_ROWS = {"chat_template", "conversation", "tokenize", "add_generation_prompt", "continue_final_message"}
_NOT_A_ROWS |= {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tools"}
_NOT_A_ROWS |= {"tokenizer_kwargs", "padding"}


def pair_parser(format: str, has_template: bool) -> Callable[[Any], Pair]:
    """The function from a row to its `Pair`, for a `format` (see FORMATS) and a tokenizer with or without a template.

    It raises RowError for a bad row. ValueError, here: unknown format, or format "chat" without a template.
    """
    chat = uses_chat(format, has_template)

    def parse(row: Any) -> Pair:
        pair: Pair
        row = checked_row(row, ("chosen", "rejected"), ("prompt",))
        template_kwargs = template_kwargs_of(row)
        if not all(isinstance(row.get(key, ""), str) for key in ("prompt", "chosen", "rejected")):
            needs_chat(chat, has_template)
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
        else:
            takes_no_template(template_kwargs)
        _check_pair(pair)
        return pair

    return parse


# Checks ---------------------------------------------------------------------------------------------------------------


def uses_chat(format: str, has_template: bool) -> bool:
    """Whether conversations go through a chat template. ValueError: unknown format, or "chat" without a template."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; accepted are {', '.join(map(repr, FORMATS))}")
    if format == "chat" and not has_template:
        raise ValueError("format='chat' needs a chat template, and the tokenizer has none; set tokenizer.chat_template")
    return has_template and format != "text"


def needs_chat(chat: bool, has_template: bool) -> None:
    """RowError where messages were found and cannot be rendered."""
    if not chat:
        why = "format='text'" if has_template else "the tokenizer has none"
        raise RowError(Reason.UNSUPPORTED, f"messages need a chat template, and {why}")


def takes_no_template(template_kwargs: dict[str, Any]) -> None:
    """RowError where plain text comes with what only a template could take."""
    if template_kwargs:
        names = " and ".join(str(name)[:40] for name in list(template_kwargs)[:4])  # of the row's own, of any length
        raise RowError(Reason.UNSUPPORTED, f"{names} with plain text: no template takes it")


def checked_row(row: Any, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row without its None values: a columnar source gives every row every key.

    RowError: no object, an image, a `required` key is missing, or a key of either is neither text nor messages.
    """
    if isinstance(row, Unreadable):
        raise RowError(Reason.UNREADABLE, row.detail)
    if not isinstance(row, dict):
        raise RowError(Reason.WRONG_TYPE, f"the row is a {type(row).__name__}, not an object with keys")
    row = {key: value for key, value in row.items() if value is not None}
    missing = [key for key in required if key not in row]
    if missing:
        raise RowError(Reason.MISSING_KEY, f"no {' and no '.join(missing)}")
    for key in (*optional, *required):
        if key in row and not isinstance(row[key], str | list):
            found = type(row[key]).__name__
            raise RowError(Reason.WRONG_TYPE, f"{key} is a {found}, not a string or a list of messages")
    for key in ("image", "images"):
        if row.get(key):
            raise RowError(Reason.UNSUPPORTED, f"column {key!r}: text only")
    return row


def template_kwargs_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row passes to the chat template. RowError: `tools` or `chat_template_kwargs` that cannot be taken."""
    kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise RowError(Reason.WRONG_TYPE, f"chat_template_kwargs is a {type(kwargs).__name__}, not an object")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if ours := sorted(_NOT_A_ROWS & kwargs.keys()):
        raise RowError(Reason.UNSUPPORTED, f"chat_template_kwargs may not set {', '.join(ours)}")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except json.JSONDecodeError as error:
            raise RowError(Reason.UNREADABLE, f"tools: broken JSON at column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise RowError(Reason.UNREADABLE, f"tools: {error}") from None
    if tools and not isinstance(tools, list):
        raise RowError(Reason.WRONG_TYPE, f"tools is a {type(tools).__name__}, not a list")
    return {**kwargs, "tools": tools} if tools else kwargs


def _check_pair(pair: Pair) -> None:
    prompt = [pair.prompt] if isinstance(pair, TextPair) else pair.prompt
    if all(map(is_empty, prompt)):
        raise RowError(Reason.EMPTY_PROMPT, "nothing comes before the responses")
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if is_empty(response):
            raise RowError(Reason.EMPTY_RESPONSE, name)
    if pair.chosen == pair.rejected:
        raise RowError(Reason.IDENTICAL, "chosen equals rejected")


def is_empty(part: str | Message) -> bool:
    """Whether there is nothing in a text, or neither text nor a tool call in a message."""
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
