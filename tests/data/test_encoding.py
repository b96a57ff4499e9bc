"""Boundaries, special tokens and chat templates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.encoding import Encoded, PairEncoder
from fastalign.data.pairs import ChatPair, TextPair
from fastalign.data.report import Reason, RowError


def _text_pair(prompt: str, chosen: str, rejected: str) -> TextPair:
    return TextPair(prompt, chosen, rejected, "text")


def _chat_pair(prompt: str, chosen: str, rejected: str, **template_kwargs) -> ChatPair:
    response = {"role": "assistant"}
    return ChatPair(
        [{"role": "user", "content": prompt}],
        {**response, "content": chosen},
        {**response, "content": rejected},
        "chat",
        template_kwargs,
    )


def _one(tokenizer, pair) -> Encoded:
    (encoded,) = PairEncoder(tokenizer)([pair])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def _error(tokenizer, pair) -> RowError:
    (error,) = PairEncoder(tokenizer)([pair])
    assert isinstance(error, RowError)
    return error


def _tokens(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def _bare(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _trl(tokenizer, prompt: str, chosen: str, rejected: str) -> tuple[list[int], list[int], list[int]]:
    """TRL 1.16's DPO tokenisation of strings: EOS appended as text, split at the common beginning of the ids."""
    ids = [tokenizer(text)["input_ids"] for text in (prompt, *(prompt + r + "</s>" for r in (chosen, rejected)))]

    def common(other: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(ids[0], other, strict=False)) if a != b), len(ids[0]))

    length = min(common(ids[1]), common(ids[2]))
    return ids[0][:length], ids[1][length:], ids[2][length:]


# Plain text -----------------------------------------------------------------------------------------------------------


def test_text_begins_with_bos_and_ends_with_eos(text_tokenizer):
    encoded = _one(text_tokenizer, _text_pair("Question: is the sky blue?\nAnswer:", " yes it is", " no"))
    assert _tokens(text_tokenizer, encoded.prompt_ids).count("<s>") == 1
    assert _tokens(text_tokenizer, encoded.prompt_ids)[0] == "<s>"
    for ids, text in ((encoded.chosen_ids, " yes it is"), (encoded.rejected_ids, " no")):
        assert _tokens(text_tokenizer, ids).count("</s>") == 1
        assert _decode(text_tokenizer, ids) == text + "</s>"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_special_tokens_stand_once_whatever_the_tokenizer_adds_and_the_row_brings(byte_bpe, bos: bool, eos: bool):
    tokenizer = byte_bpe(bos=bos, eos=eos)
    plain = _one(tokenizer, _text_pair("yes and", " no", " maybe"))
    assert _one(tokenizer, _text_pair("yes and", " no</s>", " maybe</s>")) == plain
    prompt_ids = [tokenizer.bos_token_id] * bos + _bare(tokenizer, "yes and")
    chosen_ids, rejected_ids = ([*_bare(tokenizer, text), tokenizer.eos_token_id] for text in (" no", " maybe"))
    assert plain == Encoded(prompt_ids, chosen_ids, rejected_ids)
    if bos:
        assert _one(tokenizer, _text_pair("<s>yes and", " no", " maybe")) == plain


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused(text_tokenizer):
    class Changing:
        eos_token_id = 1

        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [5, 6, 7]} if add_special_tokens else text_tokenizer(text, add_special_tokens=False)

    with pytest.raises(ValueError, match="differently with and without special tokens"):
        PairEncoder(Changing())([_text_pair("yes", " no", " maybe")])


def test_pad_may_be_eos(byte_bpe, text_tokenizer):
    same = byte_bpe(bos=True, pad_token="</s>")
    pair = _text_pair("the answer is", " yes", " no")
    assert _one(same, pair) == _one(text_tokenizer, pair)


def test_text_needs_an_eos_token(byte_bpe):
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        PairEncoder(byte_bpe(eos_token=None))([_text_pair("a", "b", "c")])


@pytest.mark.parametrize("empty", ["</s>", ""])
def test_a_response_without_tokens_of_its_own_is_empty(text_tokenizer, empty: str):
    error = _error(text_tokenizer, _text_pair("the answer is", " yes", empty))
    assert (error.reason, error.detail) == (Reason.EMPTY_RESPONSE, "rejected has no tokens")


def test_responses_with_the_same_tokens_are_identical(text_tokenizer):
    error = _error(text_tokenizer, _text_pair("the answer is", " yes", " yes</s>"))
    assert error.reason is Reason.IDENTICAL


# The boundary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "chosen", "merges"),
    [
        ("the answer is", " yes", 0),
        ("the answer is ", "yes", 1),  # " yes" is one token
        ("the answer is y", "es", 1),
        ("the answer is\n", "\nyes", 0),
    ],
)
def test_the_prompt_is_encoded_as_it_is_at_inference(text_tokenizer, prompt: str, chosen: str, merges: int):
    encoded = _one(text_tokenizer, _text_pair(prompt, chosen, "?"))
    assert encoded.prompt_ids == text_tokenizer(prompt)["input_ids"]
    assert _decode(text_tokenizer, encoded.prompt_ids + encoded.chosen_ids) == f"<s>{prompt}{chosen}</s>"
    assert encoded.merged == merges
    trl_prompt, trl_chosen, _ = _trl(text_tokenizer, prompt, chosen, "?")
    assert (trl_prompt == encoded.prompt_ids) == (merges == 0)
    if not merges:
        assert trl_chosen == encoded.chosen_ids


def test_a_merge_across_the_space_between_prompt_and_response(byte_bpe):
    tokenizer = byte_bpe(words=False)
    assert len(_bare(tokenizer, "yes and no")) == 1
    encoded = _one(tokenizer, _text_pair("yes and", " no", " maybe"))
    assert encoded.prompt_ids == _bare(tokenizer, "yes and")
    assert _decode(tokenizer, encoded.prompt_ids + encoded.chosen_ids) == "yes and no</s>"
    assert encoded.merged >= 1
    assert _trl(tokenizer, "yes and", " no", " maybe")[0] == [], "TRL leaves no prompt here"


pieces = st.text("aeyns .\n:é中", min_size=1, max_size=12)


@pytest.mark.parametrize("words", [True, False])
def test_any_boundary_keeps_text_prompt_and_eos(byte_bpe, words: bool):
    tokenizer = byte_bpe(bos=True, words=words)
    encoder = PairEncoder(tokenizer)

    @given(st.lists(st.tuples(pieces, pieces, pieces), min_size=1, max_size=5))
    def check(rows: list[tuple[str, str, str]]):
        for (prompt, chosen, rejected), encoded in zip(rows, encoder([_text_pair(*row) for row in rows]), strict=True):
            if chosen == rejected:
                assert isinstance(encoded, RowError)
                assert encoded.reason is Reason.IDENTICAL
                continue
            assert encoded.prompt_ids == tokenizer(prompt)["input_ids"]
            for ids, text in ((encoded.chosen_ids, chosen), (encoded.rejected_ids, rejected)):
                assert _decode(tokenizer, encoded.prompt_ids + ids) == f"<s>{prompt}{text}</s>"
                assert ids.count(tokenizer.eos_token_id) == 1
            if not encoded.merged:
                assert (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids) == _trl(
                    tokenizer, prompt, chosen, rejected
                )

    check()


def test_no_space_is_put_before_a_response(metaspace_bpe):
    """Alone, such a tokenizer makes "es" into " es"; that would turn "y" + "es" into "y es"."""
    tokenizer = metaspace_bpe()
    assert _decode(tokenizer, _bare(tokenizer, "a y") + _bare(tokenizer, "es")) == "a y es"
    encoded = _one(tokenizer, _text_pair("the answer is y", "es", " and no"))
    assert encoded.merged == 1
    assert encoded.prompt_ids == tokenizer("the answer is y")["input_ids"]
    bare_prompt = encoded.prompt_ids[1:]
    assert _decode(tokenizer, bare_prompt + encoded.chosen_ids) == "the answer is yes</s>"
    assert _decode(tokenizer, bare_prompt + encoded.rejected_ids) == "the answer is y and no</s>"


def test_a_boundary_that_cannot_be_kept_is_reported(text_tokenizer, monkeypatch: pytest.MonkeyPatch):
    encoder = PairEncoder(text_tokenizer)
    monkeypatch.setattr(encoder, "_text", lambda ids: str(len(ids)))  # no ids give the joint ids' text
    (error,) = encoder([_text_pair("the answer is ", "yes", "no")])
    assert isinstance(error, RowError)
    assert error.reason is Reason.BOUNDARY


# Chat -----------------------------------------------------------------------------------------------------------------


def test_chat_is_what_the_template_renders(chat_tokenizer):
    encoded = _one(chat_tokenizer, _chat_pair("hello there", "hello to you", "no"))
    assert _decode(chat_tokenizer, encoded.prompt_ids) == "<s><|user|>hello there</s>\n<|assistant|>"
    assert _decode(chat_tokenizer, encoded.chosen_ids) == "hello to you</s>\n"
    assert _decode(chat_tokenizer, encoded.rejected_ids) == "no</s>\n"
    assert encoded.prompt_ids.count(chat_tokenizer.bos_token_id) == 1
    assert encoded.merged == 0


def test_chat_equals_the_templates_own_tokenisation(chat_tokenizer):
    pair = _chat_pair("is the sky blue", "yes it is", "maybe not")
    encoded = _one(chat_tokenizer, pair)
    assert (
        encoded.prompt_ids == chat_tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True)["input_ids"]
    )
    for ids, response in ((encoded.chosen_ids, pair.chosen), (encoded.rejected_ids, pair.rejected)):
        whole = chat_tokenizer.apply_chat_template([*pair.prompt, response])["input_ids"]
        assert encoded.prompt_ids + ids == whole


def test_template_arguments_are_passed(byte_bpe):
    tokenizer = byte_bpe(
        chat_template="{% if mood %}{{ mood }} {% endif %}{{ tools | length if tools else '' }}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    plain = _one(tokenizer, _chat_pair("hello", "yes", "no"))
    moody = _one(tokenizer, _chat_pair("hello", "yes", "no", mood="happy", tools=[{"name": "f"}]))
    assert _decode(tokenizer, plain.prompt_ids) == "<|user|>hello</s><|assistant|>"
    assert _decode(tokenizer, moody.prompt_ids) == "happy 1<|user|>hello</s><|assistant|>"


@pytest.mark.parametrize(
    ("template", "reason", "detail"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
         Reason.TEMPLATE_PREFIX, "chosen: they part at character 0 of the 6 of the rendered prompt"),
        ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
         Reason.TEMPLATE_PREFIX, "chosen: they part at character 9 of the 16"),
        ("{{ raise_exception('only two roles') }}", Reason.TEMPLATE, "TemplateError: only two roles"),
        ("{{ messages[0]['content'] + 1 }}", Reason.TEMPLATE, "TypeError"),
        ("{{ messages[-1]['content'] | upper }}{% if not add_generation_prompt %}{{ 1 // 0 }}{% endif %}",
         Reason.TEMPLATE, "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_are_reported(byte_bpe, template: str, reason: Reason, detail: str):
    error = _error(byte_bpe(chat_template=template), _chat_pair("hello", "yes", "no"))
    assert error.reason is reason
    assert detail in error.detail


def test_bad_pairs_leave_the_others_of_a_batch_in_place(chat_tokenizer):
    good, other = _text_pair("a", "b", "c"), _chat_pair("d", "e", "f")
    bad = _chat_pair("x", "y", "z", tokenize=True)  # an argument of ours
    encoder = PairEncoder(chat_tokenizer)
    results = encoder([bad, good, bad, other])
    assert [type(result) for result in results] == [RowError, Encoded, RowError, Encoded]
    assert results[1::2] == encoder([good]) + encoder([other])
    assert encoder([]) == []
    assert [type(result) for result in encoder([bad])] == [RowError]
