"""Every format of rows to learn from, and what is wrong with the others."""

from __future__ import annotations

import json

import pytest

from fastalign.data.examples import ChatExample, ExampleParser, TextExample
from fastalign.data.report import Reason, RowError
from fastalign.data.rows import Unreadable

USER, ASSISTANT = {"role": "user", "content": "blue?"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be kind"}
MORE = [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "no"}]
TRANSCRIPT = "\n\nHuman: blue?\n\nAssistant: yes"


def _parse(row, *, format="auto", template=True, **options):
    return ExampleParser(format, template, **options)(row)


@pytest.mark.parametrize(
    ("row", "prompt_length", "how"),
    [
        ({"messages": [USER, ASSISTANT]}, 0, "messages"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, 1, "messages, prompt and completion"),
        ({"prompt": [USER], "completion": "yes"}, 1, "messages, prompt and completion"),
        ({"prompt": "blue?", "completion": [ASSISTANT]}, 1, "messages, prompt and completion"),
        ({"prompt": "\n\nHuman: blue?", "completion": " yes"}, 1, "transcript as chat, prompt and completion"),
        ({"text": TRANSCRIPT}, 0, "transcript as chat"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": "no"}, 1, "messages, explicit prompt, chosen"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "!"}, 1, "transcript as chat, chosen"),
        ({"messages": [USER, ASSISTANT], "text": None, "score": 3}, 0, "messages"),
    ],
)
def test_conversations(row, prompt_length, how):
    assert _parse(row) == ChatExample([USER, ASSISTANT], prompt_length, how)


@pytest.mark.parametrize(
    ("row", "prompt", "text", "how"),
    [
        ({"text": "hello"}, None, "hello", "text"),
        ({"prompt": "blue?", "completion": " yes"}, "blue?", " yes", "text, prompt and completion"),
        ({"text": TRANSCRIPT}, None, TRANSCRIPT, "text"),
        ({"prompt": "\n\nHuman: blue?", "completion": " yes"}, TRANSCRIPT.removesuffix(" yes"), " yes",
         "transcript as text, prompt and completion"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "!"}, TRANSCRIPT.removesuffix(" yes"), " yes",
         "transcript as text, chosen"),
    ],
)  # fmt: skip
def test_plain_text(row, prompt, text, how):
    assert _parse(row, template=False) == TextExample(prompt, text, how)
    assert _parse(row, format="text") == TextExample(prompt, text, how)


def test_completions_of_several_messages_stay_whole():
    row = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT, *MORE]}
    assert _parse(row) == ChatExample([SYSTEM, USER, ASSISTANT, *MORE], 2, "messages, prompt and completion")


def test_completion_only_splits_conversations_before_their_last_message():
    for row in ({"messages": [USER, ASSISTANT, *MORE]}, {"text": TRANSCRIPT + "\n\nHuman: sure?\n\nAssistant: no"}):
        example = _parse(row, completion_only_loss=True)
        assert (example.messages, example.prompt_length) == ([USER, ASSISTANT, *MORE], 3)
        assert example.format.endswith(", last turn")
    as_text = _parse({"text": TRANSCRIPT}, completion_only_loss=True, template=False)
    assert (as_text.prompt, as_text.text) == (TRANSCRIPT.removesuffix(" yes"), " yes")


def test_the_text_column_has_a_name():
    parser = ExampleParser("auto", False, text_field="body")
    assert parser({"body": "hello", "text": 3}) == TextExample(None, "hello", "text")
    assert "body" in parser.columns
    assert "text" not in parser.columns
    with pytest.raises(RowError, match="none of 'body', 'messages', 'prompt' and 'completion', 'chosen' and 'rejec"):
        parser({"text": "hello"})


def test_format_chat_makes_messages_of_strings():
    assert _parse({"prompt": "blue?", "completion": "yes"}, format="chat") == ChatExample(
        [USER, ASSISTANT], 1, "messages, prompt and completion"
    )
    with pytest.raises(ValueError, match="format='chat' needs a chat template"):
        ExampleParser("chat", False)


def test_template_arguments_are_kept():
    row = {"messages": [USER, ASSISTANT], "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"think": True}}
    assert _parse(row).template_kwargs == {"think": True, "tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("row", "options", "reason", "detail"),
    [
        (Unreadable("line 3: broken"), {}, Reason.UNREADABLE, "line 3"),
        ([], {}, Reason.WRONG_TYPE, "not an object"),
        ({"prompt": "alone"}, {}, Reason.MISSING_KEY, "none of 'text', 'messages', 'prompt' and 'completion'"),
        ({"text": 3}, {}, Reason.WRONG_TYPE, "text is a int"),
        ({"text": ["a"]}, {}, Reason.WRONG_TYPE, "text is a list, not a string"),
        ({"messages": "hello"}, {}, Reason.WRONG_TYPE, "messages is a str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, {}, Reason.MISSING_KEY, "messages[0] has no content"),
        ({"messages": [USER, ASSISTANT]}, {"template": False}, Reason.UNSUPPORTED, "messages need a chat template"),
        ({"messages": [USER, ASSISTANT], "image": "x"}, {}, Reason.UNSUPPORTED, "text only"),
        ({"text": "hello", "tools": [{"name": "f"}]}, {}, Reason.UNSUPPORTED, "no template takes it"),
        ({"text": " "}, {}, Reason.EMPTY_RESPONSE, "no text to learn from"),
        ({"prompt": "", "completion": "yes"}, {}, Reason.EMPTY_PROMPT, "nothing comes before the completion"),
        ({"prompt": [], "completion": "yes"}, {}, Reason.EMPTY_PROMPT, "no messages"),
        ({"prompt": "blue?", "completion": ""}, {}, Reason.EMPTY_RESPONSE, "completion"),
        ({"prompt": [USER], "completion": []}, {}, Reason.EMPTY_RESPONSE, "completion"),
        ({"prompt": [USER], "completion": [USER]}, {}, Reason.WRONG_ROLE, "completion[0] has role 'user'"),
        ({"prompt": TRANSCRIPT, "completion": "a"}, {}, Reason.WRONG_ROLE, "ends with an Assistant turn"),
        ({"chosen": "a", "rejected": "a", "prompt": "p"}, {}, Reason.IDENTICAL, "chosen equals rejected"),
        ({"text": "hello"}, {"format": "chat"}, Reason.UNSUPPORTED, "needs messages, or a prompt and a completion"),
        ({"text": "hello"}, {"completion_only_loss": True}, Reason.UNSUPPORTED, "text has no completion"),
        ({"messages": [USER]}, {"completion_only_loss": True}, Reason.WRONG_ROLE, "last message is not the assistant"),
        ({"text": "\n\nHuman: a"}, {"completion_only_loss": True, "template": False}, Reason.EMPTY_RESPONSE, "end wit"),
    ],
)
def test_bad_rows(row, options, reason, detail):
    with pytest.raises(RowError) as caught:
        _parse(row, **options)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
