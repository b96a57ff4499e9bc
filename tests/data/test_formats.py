"""Each format to a pair, and the strings among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.formats import FORMATS, pair_parser
from fastalign.data.pairs import ChatPair, TextPair
from fastalign.data.report import Reason, RowError
from fastalign.data.rows import Unreadable

auto = pair_parser("auto", has_template=True)
text = pair_parser("text", has_template=True)
chat = pair_parser("chat", has_template=True)
without_template = pair_parser("auto", has_template=False)

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
POOR = {"role": "assistant", "content": "what"}
MESSAGES = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}
STRINGS = {"prompt": "hi", "chosen": " hello", "rejected": " what"}
TRANSCRIPTS = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: what"}


def _fields(pair: TextPair | ChatPair) -> tuple:
    return pair.prompt, pair.chosen, pair.rejected


# Which format a row is read as ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "parse", "kind", "prompt"),
    [
        (MESSAGES, auto, "messages, explicit prompt", [USER]),
        (MESSAGES, chat, "messages, explicit prompt", [USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, POOR]}, auto, "messages, implicit prompt", [USER]),
        (STRINGS, auto, "text, explicit prompt", "hi"),
        (STRINGS, text, "text, explicit prompt", "hi"),
        (STRINGS, without_template, "text, explicit prompt", "hi"),
        (STRINGS, chat, "messages, explicit prompt", [USER]),
        ({"chosen": "hi hello", "rejected": "hi what"}, auto, "text, implicit prompt", "hi"),
        (TRANSCRIPTS, auto, "transcript as chat", [USER]),
        (TRANSCRIPTS, chat, "transcript as chat", [USER]),
        (TRANSCRIPTS, text, "transcript as text", "\n\nHuman: hi\n\nAssistant:"),
        (TRANSCRIPTS, without_template, "transcript as text", "\n\nHuman: hi\n\nAssistant:"),
    ],
)
def test_formats_are_told_apart(row, parse, kind, prompt):
    pair = parse(row)
    assert (pair.format, pair.prompt) == (kind, prompt)
    assert isinstance(pair, ChatPair if isinstance(prompt, list) else TextPair)
    assert pair.chosen != pair.rejected


def test_none_is_an_absent_key():
    row = {"prompt": None, "chosen": "a b", "rejected": "a c", "tools": None, "images": None, "margin": 3}
    assert auto(row).format == "text, implicit prompt"
    assert row["prompt"] is None, "the caller's row is not changed"


@pytest.mark.parametrize(
    ("row", "parse", "reason", "detail"),
    [
        (Unreadable("line 3: broken"), auto, Reason.UNREADABLE, "line 3: broken"),
        (["chosen", "rejected"], auto, Reason.WRONG_TYPE, "row is a list"),
        ({"chosen": "x"}, auto, Reason.MISSING_KEY, "no rejected"),
        ({}, auto, Reason.MISSING_KEY, "no chosen and no rejected"),
        ({"chosen": "x", "rejected": None}, auto, Reason.MISSING_KEY, "no rejected"),
        ({**STRINGS, "chosen": 3}, auto, Reason.WRONG_TYPE, "chosen is a int"),
        ({**STRINGS, "prompt": {"role": "user"}}, auto, Reason.WRONG_TYPE, "prompt is a dict"),
        ({**STRINGS, "images": ["x.png"]}, auto, Reason.UNSUPPORTED, "images"),
        ({**STRINGS, "prompt": " \n"}, auto, Reason.EMPTY_PROMPT, "before"),
        ({**STRINGS, "prompt": ""}, text, Reason.EMPTY_PROMPT, "before"),
        ({**STRINGS, "prompt": ""}, chat, Reason.EMPTY_PROMPT, "before"),
        ({**STRINGS, "chosen": " \n"}, auto, Reason.EMPTY_RESPONSE, "chosen"),
        ({**STRINGS, "rejected": ""}, chat, Reason.EMPTY_RESPONSE, "rejected"),
        ({**STRINGS, "rejected": " hello"}, auto, Reason.IDENTICAL, "equals"),
        ({"chosen": "same", "rejected": "same"}, auto, Reason.IDENTICAL, "equals"),
        ({**TRANSCRIPTS, "rejected": TRANSCRIPTS["chosen"]}, auto, Reason.IDENTICAL, "equals"),
        ({**TRANSCRIPTS, "rejected": TRANSCRIPTS["chosen"]}, text, Reason.IDENTICAL, "equals"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, auto, Reason.IDENTICAL, "equals"),
        ({"chosen": "one thing", "rejected": "another"}, auto, Reason.NO_COMMON_PROMPT, "begin differently"),
        ({"chosen": "one", "rejected": "other"}, auto, Reason.NO_COMMON_PROMPT, "begin differently"),
        ({"chosen": "Q. A", "rejected": "Q."}, auto, Reason.EMPTY_RESPONSE, "rejected"),
        ({"chosen": "a b", "rejected": "a c"}, chat, Reason.MISSING_KEY, "format='chat' needs"),
        (MESSAGES, text, Reason.UNSUPPORTED, "format='text'"),
        (MESSAGES, without_template, Reason.UNSUPPORTED, "the tokenizer has none"),
        ({**STRINGS, "tools": [{"name": "f"}]}, auto, Reason.UNSUPPORTED, "tools with plain text"),
        ({**MESSAGES, "tools": "{"}, auto, Reason.UNREADABLE, "tools: broken JSON at column 2"),
        ({**MESSAGES, "tools": "{}x"}, auto, Reason.UNREADABLE, "tools: broken JSON"),
        ({**MESSAGES, "tools": {"a": 1}}, auto, Reason.WRONG_TYPE, "tools is a dict"),
        ({**MESSAGES, "chat_template_kwargs": [1]}, auto, Reason.WRONG_TYPE, "chat_template_kwargs is a list"),
    ],
)
def test_bad_rows_give_their_reason(row, parse, reason, detail):
    with pytest.raises(RowError) as caught:
        parse(row)
    assert caught.value.reason is reason
    assert detail in caught.value.detail


def test_options_are_checked_at_once():
    with pytest.raises(ValueError, match="format 'hh' is unknown; accepted are 'auto', 'chat', 'text'"):
        pair_parser("hh", has_template=True)
    with pytest.raises(ValueError, match="format='chat' needs a chat template"):
        pair_parser("chat", has_template=False)
    assert all(pair_parser(format, has_template=True) for format in FORMATS)


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_and_template_arguments_reach_the_pair(tools):
    row = {**MESSAGES, "tools": tools, "chat_template_kwargs": {"enable_thinking": False, "absent": None}}
    assert auto(row).template_kwargs == {"enable_thinking": False, "tools": [{"name": "f"}]}
    assert auto({**MESSAGES, "tools": []}).template_kwargs == {}


# Implicit prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),  # as TRL
        ("The sky is blue", "The sky is black", "The sky is"),  # TRL: "The sky is bl"
        ("Q: why?\nYes", "Q: why?\nNo", "Q: why?\n"),  # as TRL
        ("a cat", "a catalogue", "a"),
        ("Well. Yes", "Well. No", "Well."),
        ("问题是什么答案是", "问题是什么答案否", "问题是什么答案"),  # no spaces to go back to
        ("f(x", "f(y", "f("),
    ],
)
def test_strings_are_split_between_words(chosen, rejected, prompt):
    assert _fields(auto({"chosen": chosen, "rejected": rejected})) == (
        prompt,
        chosen[len(prompt) :],
        rejected[len(prompt) :],
    )


def _trl_split(chosen: str, rejected: str) -> int:
    """TRL's extract_prompt on strings."""
    index = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return index - 1 if chosen[index - 1] == " " else index


@given(st.text("ab .\n"), st.text("ab .\n"), st.text("ab .\n"))
def test_the_split_is_never_later_than_trl_s_and_equal_between_words(start: str, left: str, right: str):
    chosen, rejected = f"x {start} c{left}", f"x {start} r{right}"  # two words that differ from their first letter on
    pair = auto({"chosen": chosen, "rejected": rejected})
    assert len(pair.prompt) == _trl_split(chosen, rejected)
    assert pair.prompt + pair.chosen == chosen
    assert pair.prompt + pair.rejected == rejected
