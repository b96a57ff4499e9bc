"""Prompts alone: every kind of row that has one, the tokens before an answer, and the row behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from fastalign.data import BadRowsError, Reason, prepare_prompts

USER = {"role": "user", "content": "is the sky blue?"}
ASSISTANT = {"role": "assistant", "content": "yes it is"}
TRANSCRIPT = "\n\nHuman: is the sky blue?\n\nAssistant:"
RENDERED = "<s><|user|>is the sky blue?</s>\n<|assistant|>"  # of USER by the conftest's template


def _texts(tokenizer: Any, data: Any) -> list[str]:
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in data.dataset["prompt_ids"][:]]


@pytest.mark.parametrize(
    ("row", "answer", "how"),
    [
        ({"prompt": [USER]}, None, "prompt, messages"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "yes it is", "prompt, messages"),
        ({"prompt": [USER], "completion": "yes it is"}, "yes it is", "prompt, messages"),
        ({"messages": [USER]}, None, "messages"),
        ({"messages": [USER, ASSISTANT]}, "yes it is", "messages"),
        ({"text": f"{TRANSCRIPT} yes it is"}, "yes it is", "transcript as chat"),
        ({"text": TRANSCRIPT.removesuffix("\n\nAssistant:")}, None, "transcript as chat"),
        ({"prompt": TRANSCRIPT, "completion": "yes it is"}, "yes it is", "prompt, transcript as chat"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "no"}]}, "yes it is",
         "messages, implicit prompt"),
        ({"chosen": f"{TRANSCRIPT} yes it is", "rejected": f"{TRANSCRIPT} no"}, "yes it is", "transcript as chat"),
    ],
)  # fmt: skip
def test_every_kind_of_row_gives_the_same_prompt(chat_tokenizer, row, answer, how):
    data = prepare_prompts([row], chat_tokenizer)
    assert _texts(chat_tokenizer, data) == [RENDERED]
    assert data.columns([0])["reference_answer"] == [answer]
    assert data.columns([0])["prompt"] == [[USER]]
    assert dict(data.report.formats) == {how: 1}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "is the sky blue?"}, "is the sky blue?", None),
        ({"prompt": "is the sky blue?", "completion": " yes"}, "is the sky blue?", " yes"),
        ({"chosen": "the answer is yes", "rejected": "the answer is no"}, "the answer is", " yes"),
        ({"prompt": TRANSCRIPT}, TRANSCRIPT, None),
        ({"prompt": TRANSCRIPT.removesuffix("\n\nAssistant:")}, TRANSCRIPT, None),
        ({"text": f"{TRANSCRIPT} yes"}, TRANSCRIPT, " yes"),
        ({"chosen": f"{TRANSCRIPT} yes", "rejected": f"{TRANSCRIPT} no"}, TRANSCRIPT, " yes"),
    ],
)
def test_without_a_template_text_stays_text_with_one_bos(text_tokenizer, row, prompt, answer):
    data = prepare_prompts([row], text_tokenizer)
    assert _texts(text_tokenizer, data) == ["<s>" + prompt]
    assert data.columns([0])["prompt"] == [prompt]
    assert data.columns([0])["reference_answer"] == [answer]


def test_format_chat_makes_a_message_of_text(chat_tokenizer):
    assert _texts(chat_tokenizer, prepare_prompts([{"prompt": USER["content"]}], chat_tokenizer, format="chat")) == [
        RENDERED
    ]
    (text,) = _texts(chat_tokenizer, prepare_prompts([{"prompt": USER["content"]}], chat_tokenizer))
    assert text == "<s>is the sky blue?"


def test_tools_and_template_arguments_reach_the_template(byte_bpe):
    tokenizer = byte_bpe(
        chat_template="{{ mood }}|{{ tools | length }}|{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    row = {"prompt": [USER], "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"mood": "calm"}}
    assert _texts(tokenizer, prepare_prompts([row], tokenizer)) == ["calm|1|is the sky blue?>"]


def test_bad_rows_are_named_with_their_reason(chat_tokenizer):
    bad = {
        Reason.MISSING_KEY: {"completion": "yes"},
        Reason.WRONG_ROLE: {"prompt": [USER, ASSISTANT]},
        Reason.WRONG_TYPE: {"prompt": 3},
        Reason.EMPTY_PROMPT: {"prompt": "  "},
        Reason.UNSUPPORTED: {"prompt": "text", "tools": [{"name": "f"}]},
        Reason.IDENTICAL: {"prompt": "text", "chosen": "a", "rejected": "a"},
    }
    rows = [
        {"prompt": [USER]},
        *bad.values(),
        {"text": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"},
        {"text": "no transcript"},
    ]
    with pytest.raises(BadRowsError, match=f"{len(rows) - 1} of {len(rows)} rows"):
        prepare_prompts(rows, chat_tokenizer)
    data = prepare_prompts(rows, chat_tokenizer, on_bad_row="skip")
    expected = [*bad, Reason.WRONG_ROLE, Reason.MISSING_KEY]
    assert [(row.row, row.reason) for row in data.report.bad] == list(enumerate(expected, 1))
    assert data.dataset["row"][:] == [0]


def test_messages_need_a_template(text_tokenizer):
    for row in ({"prompt": [USER]}, {"messages": [USER]}):
        data = [row, {"prompt": "text"}]
        assert prepare_prompts(data, text_tokenizer, on_bad_row="skip").report.bad_by_reason == {
            "unsupported content": 1
        }


def test_long_prompts_are_dropped_or_lose_their_beginning(text_tokenizer):
    rows = [{"prompt": "yes and no but maybe not now because answers change"}, {"prompt": "yes"}]
    whole = prepare_prompts(rows, text_tokenizer).dataset["prompt_ids"][0]
    limit = len(whole) - 2
    dropped = prepare_prompts(rows, text_tokenizer, max_length=limit)
    assert dropped.dataset["row"][:] == [1]
    assert dropped.report.dropped == {"long_prompt": 1}
    cut = prepare_prompts(rows, text_tokenizer, max_length=limit, on_long_prompt="truncate")
    assert cut.dataset["prompt_ids"][0] == [whole[0], *whole[-(limit - 1) :]]
    assert cut.report.truncated_prompts == 1
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        prepare_prompts(rows, text_tokenizer, max_length=0)
    with pytest.raises(ValueError, match="on_long_prompt 'cut' is unknown; accepted are 'drop', 'truncate'"):
        prepare_prompts(rows, text_tokenizer, on_long_prompt="cut")


@pytest.mark.parametrize("stored", ["list", "dataset", "jsonl"])
def test_columns_come_back_by_row_number(text_tokenizer, tmp_path: Path, stored: str):
    rows = [{"prompt": f"question {i}", "level": i, "label": None if i == 2 else f"l{i}"} for i in range(4)]
    rows[1]["prompt"] = ""  # bad: row numbers are those of the source
    source: Any = rows
    if stored == "dataset":
        source = datasets.Dataset.from_list(rows)
    elif stored == "jsonl":
        source = tmp_path / "prompts.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_prompts(source, text_tokenizer, on_bad_row="skip")
    assert data.dataset["row"][:] == [0, 2, 3]
    assert data.dataset.column_names == ["prompt_ids", "row"]
    assert data.columns([3, 0, 2, 3]) == {
        "reference_answer": [None] * 4,
        "prompt": ["question 3", "question 0", "question 2", "question 3"],
        "level": [3, 0, 2, 3],
        "label": ["l3", "l0", None, "l3"],
    }


def test_a_columns_own_reference_answer_wins(text_tokenizer):
    data = prepare_prompts([{"prompt": "a", "completion": "b", "reference_answer": "c"}], text_tokenizer)
    assert data.columns([0])["reference_answer"] == ["c"]
    assert data.columns([0])["completion"] == ["b"]


def test_real_transcripts(shared_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "hh-tiny")
    data = prepare_prompts(
        shared_dir / "data" / "hh_harmless.jsonl.gz", tokenizer, split="train[:300]", on_bad_row="skip"
    )
    report = data.report
    assert report.read == 300
    assert report.kept + len(report.bad) == 300
    assert report.kept > 290
    header = tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    assert all(ids[-len(header) :] == header for ids in data.dataset["prompt_ids"][:])
    columns = data.columns(data.dataset["row"][:20])
    for prompt, answer, chosen in zip(columns["prompt"], columns["reference_answer"], columns["chosen"], strict=True):
        assert prompt[-1]["role"] == "user"
        assert chosen.rstrip().endswith(answer)
