"""Which tokens are trained on, against spans written by hand; the ids against the tokenizer's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.completion_encoding import CompletionEncoder, EncodedExample
from fastalign.data.encoding import PairEncoder
from fastalign.data.examples import ChatExample, TextExample
from fastalign.data.pairs import TextPair
from fastalign.data.report import Reason, RowError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM = (  # SmolLM2's: ChatML with a system message of its own
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nyou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNSTABLE = (  # as reasoning models': earlier answers lose what the last one keeps
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "be kind"}, {"role": "user", "content": "is the sky blue?"}
YES, NO = {"role": "assistant", "content": "yes it is"}, {"role": "assistant", "content": "no not now"}
AGAIN = {"role": "user", "content": "and now?"}


def _chatml(byte_bpe, template: str) -> Any:
    return byte_bpe(
        chat_template=template, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def _encode(tokenizer, example, **options) -> EncodedExample:
    (encoded,) = CompletionEncoder(tokenizer, **options)([example])
    assert isinstance(encoded, EncodedExample), encoded
    assert len(encoded.mask) == len(encoded.input_ids)
    return encoded


def _error(tokenizer, example, **options) -> RowError:
    (error,) = CompletionEncoder(tokenizer, **options)([example])
    assert isinstance(error, RowError)
    return error


def _spans(tokenizer, encoded: EncodedExample) -> list[tuple[bool, str]]:
    """Maximal runs of tokens that are all trained on, or none, as text."""
    spans: list[tuple[bool, list[int]]] = []
    for token, trained in zip(encoded.input_ids, encoded.mask, strict=True):
        if not spans or spans[-1][0] != trained:
            spans.append((trained, []))
        spans[-1][1].append(token)
    return [(trained, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for trained, ids in spans]


# Plain text -----------------------------------------------------------------------------------------------------------


def test_text_is_trained_on_whole_between_one_bos_and_one_eos(text_tokenizer):
    encoded = _encode(text_tokenizer, TextExample(None, "the answer is yes", "text"))
    assert _spans(text_tokenizer, encoded) == [(True, "<s>the answer is yes</s>")]
    assert encoded.prompt_length == 0
    closed = _encode(text_tokenizer, TextExample(None, "the answer is yes</s>", "text"))
    assert closed.input_ids == encoded.input_ids


@pytest.mark.parametrize("only", [None, True, False])
def test_a_completion_follows_its_prompt(text_tokenizer, only):
    example = TextExample("the answer is", " yes", "text")
    encoded = _encode(text_tokenizer, example, completion_only_loss=only)
    spans = [(True, "<s>the answer is yes</s>")] if only is False else [(False, "<s>the answer is"), (True, " yes</s>")]
    assert _spans(text_tokenizer, encoded) == spans
    assert encoded.prompt_length == (0 if only is False else len(text_tokenizer("the answer is")["input_ids"]))
    assert encoded.closed


@given(prompt=st.text("answer yes.\n", min_size=1), completion=st.text("change no?", min_size=1))
def test_it_is_a_pairs_encoding(byte_bpe, prompt, completion):
    """Tokens reach across spaces here, so that boundaries merge: both must decide alike."""
    tokenizer = byte_bpe(bos=True, words=False)
    (pair,) = PairEncoder(tokenizer)([TextPair(prompt, completion, "<|user|>", "text")])
    (encoded,) = CompletionEncoder(tokenizer)([TextExample(prompt, completion, "text")])
    if isinstance(pair, RowError):
        assert isinstance(encoded, RowError)
        assert encoded.reason == pair.reason
        return
    assert encoded.input_ids == pair.prompt_ids + pair.chosen_ids
    assert encoded.mask == [False] * len(pair.prompt_ids) + [True] * len(pair.chosen_ids)


def test_plain_text_needs_an_end_of_sequence_token(byte_bpe):
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        CompletionEncoder(byte_bpe(eos_token=None))([TextExample(None, "yes", "text")])


def test_assistant_only_refuses_plain_text(text_tokenizer):
    error = _error(text_tokenizer, TextExample(None, "yes", "text"), assistant_only_loss=True)
    assert error.reason == Reason.UNSUPPORTED


# Conversations --------------------------------------------------------------------------------------------------------


def test_a_conversation_is_what_the_template_renders(byte_bpe):
    tokenizer = _chatml(byte_bpe, CHATML)
    messages = [SYSTEM, USER, YES]
    encoded = _encode(tokenizer, ChatExample(messages, 0, "messages"))
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert all(encoded.mask)
    split = _encode(tokenizer, ChatExample(messages, 2, "messages"))
    assert split.input_ids == encoded.input_ids
    assert _spans(tokenizer, split) == [
        (False, "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nis the sky blue?<|im_end|>\n"
                "<|im_start|>assistant\n"),
        (True, "yes it is<|im_end|>\n"),
    ]  # fmt: skip


@pytest.mark.parametrize(("template", "newline"), [(CHATML, True), (MARKED, False)])
def test_assistant_only_trains_on_every_turn_of_the_assistant(byte_bpe, template, newline):
    tokenizer = _chatml(byte_bpe, template)
    messages = [SYSTEM, USER, YES, AGAIN, NO]
    encoded = _encode(tokenizer, ChatExample(messages, 0, "messages"), assistant_only_loss=True)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    end, start = ("\n", "") if newline else ("", "\n")  # the template says whether the newline is the assistant's
    assert _spans(tokenizer, encoded) == [
        (False, "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nis the sky blue?<|im_end|>\n"
                "<|im_start|>assistant\n"),
        (True, f"yes it is<|im_end|>{end}"),
        (False, f"{start}<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"),
        (True, f"no not now<|im_end|>{end}"),
        *([] if newline else [(False, "\n")]),
    ]  # fmt: skip
    assert encoded.closed


def test_a_system_message_of_the_templates_own_is_given_too(byte_bpe):
    tokenizer = _chatml(byte_bpe, SMOLLM)
    encoded = _encode(tokenizer, ChatExample([USER, YES, AGAIN, NO], 0, "messages"), assistant_only_loss=True)
    assert _spans(tokenizer, encoded) == [
        (False, "<|im_start|>system\nyou are helpful<|im_end|>\n<|im_start|>user\nis the sky blue?<|im_end|>\n"
                "<|im_start|>assistant\n"),
        (True, "yes it is<|im_end|>\n"),
        (False, "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "no not now<|im_end|>\n"),
    ]  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_both_options_leave_out_what_the_assistant_said_in_the_prompt(byte_bpe, template):
    tokenizer = _chatml(byte_bpe, template)
    tool = {"role": "tool", "content": "42"}
    example = ChatExample([USER, YES, AGAIN, NO, tool, YES], 3, "messages")
    trained = [text.rstrip("\n") for flag, text in _spans(
        tokenizer, _encode(tokenizer, example, assistant_only_loss=True)) if flag]  # fmt: skip
    assert trained == ["no not now<|im_end|>", "yes it is<|im_end|>"]
    everywhere = _encode(tokenizer, example, assistant_only_loss=True, completion_only_loss=False)
    assert [text.rstrip("\n") for flag, text in _spans(tokenizer, everywhere) if flag] == [
        "yes it is<|im_end|>", "no not now<|im_end|>", "yes it is<|im_end|>"
    ]  # fmt: skip


def test_what_is_said_follows_the_ids_it_is_said_after(byte_bpe):
    """Tokens that reach across the boundary: the prompt keeps the ids it has alone, in every turn."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_bpe(chat_template=template, words=False)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}, AGAIN, YES]
    encoded = _encode(tokenizer, ChatExample(messages, 0, "messages"), assistant_only_loss=True)
    given = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encoded.input_ids[: encoded.prompt_length] == given["input_ids"]
    assert "".join(text for _, text in _spans(tokenizer, encoded)) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert [text for flag, text in _spans(tokenizer, encoded) if flag] == ["hello to you\n", "yes it is\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(byte_bpe):
    tokenizer = byte_bpe(chat_template=UNSTABLE)
    error = _error(tokenizer, ChatExample([USER, YES, AGAIN, NO], 0, "messages"), assistant_only_loss=True)
    assert error.reason == Reason.TEMPLATE_PREFIX
    assert "messages[1]: they part at character" in error.detail
    assert "{% generation %}" in error.detail
    assert "blue" not in error.detail
    split = _encode(tokenizer, ChatExample([USER, YES, AGAIN, NO], 3, "messages"), assistant_only_loss=True)
    assert [text for flag, text in _spans(tokenizer, split) if flag] == ["no not now</s>"]


def test_nothing_said_by_the_assistant(byte_bpe):
    for template in (CHATML, MARKED):
        tokenizer = _chatml(byte_bpe, template)
        error = _error(tokenizer, ChatExample([USER], 0, "messages"), assistant_only_loss=True)
        assert (error.reason, "assistant" in error.detail) == (Reason.WRONG_ROLE, True)


def test_an_assistant_that_speaks_first_is_given_nothing(byte_bpe):
    error = _error(_chatml(byte_bpe, CHATML), ChatExample([YES, USER], 0, "messages"), assistant_only_loss=True)
    assert (error.reason, error.detail) == (
        Reason.WRONG_ROLE,
        "messages[0] is the assistant's: nothing comes before it",
    )
    marked = _chatml(byte_bpe, MARKED)
    encoded = _encode(marked, ChatExample([YES, USER], 0, "messages"), assistant_only_loss=True)
    assert [text for flag, text in _spans(marked, encoded) if flag] == ["yes it is<|im_end|>"]


def test_a_template_may_refuse(byte_bpe):
    tokenizer = byte_bpe(chat_template="{{ raise_exception('alternate roles') }}")
    for options in ({}, {"assistant_only_loss": True}):
        error = _error(tokenizer, ChatExample([USER, YES], 0, "messages"), **options)
        assert error.reason == Reason.TEMPLATE
        assert "alternate roles" in error.detail


def test_a_chat_that_is_never_closed_is_told(byte_bpe):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert not _encode(byte_bpe(chat_template=template), ChatExample([USER, YES], 0, "messages")).closed
