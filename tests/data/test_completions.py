"""From rows to a tokenised data set to learn from: masks, limits, reports; real transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastalign.data import BadRowsError, prepare_completions
from fastalign.data.completion_encoding import EncodedExample
from fastalign.data.completions import fit
from fastalign.data.length import LengthLimit

PAIR = {"prompt": "the answer is", "completion": " yes and no but maybe not now"}
TEXT = {"text": "the answer is yes and no but maybe not now"}


def _example(prompt: int, rest: int) -> EncodedExample:
    ids = list(range(prompt + rest))
    return EncodedExample(ids, [i >= prompt for i in ids], prompt)


def test_columns_and_report(text_tokenizer):
    data = prepare_completions([TEXT, PAIR, {"prompt": "p", "completion": ""}], text_tokenizer, on_bad_row="skip")
    assert data.dataset.column_names == ["input_ids", "completion_mask", "row"]
    text, pair = data.dataset.to_list()
    assert text["input_ids"][1:-1] == text_tokenizer(TEXT["text"], add_special_tokens=False)["input_ids"]
    assert text["completion_mask"] == [False] + [True] * (len(text["input_ids"]) - 1)
    prompt = text_tokenizer(PAIR["prompt"])["input_ids"]
    assert pair["input_ids"][: len(prompt)] == prompt
    assert pair["completion_mask"] == [i >= len(prompt) for i in range(len(pair["input_ids"]))]
    report = data.report
    assert report.formats == {"text": 1, "text, prompt and completion": 1}
    assert (report.read, report.kept, report.bad_by_reason) == (3, 2, {"empty response": 1})
    assert report.without_eos == 0


def test_one_bad_row_stops_by_default_and_is_named(text_tokenizer, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [TEXT, {"messages": []}, {"body": 1}])))
    with pytest.raises(BadRowsError, match="row 1: unsupported content") as caught:
        prepare_completions(path, text_tokenizer)
    assert "row 2: missing key (none of 'text'" in str(caught.value)


def test_nothing_to_train_on_is_dropped_and_counted(text_tokenizer):
    rows = [PAIR, {"prompt": "the answer is " * 5, "completion": "yes"}]
    prompt = len(text_tokenizer(PAIR["prompt"])["input_ids"])
    data = prepare_completions(rows, text_tokenizer, max_length=prompt + 2)
    assert data.report.dropped == {"long_prompt": 1}
    assert data.report.truncated_completions == 1
    assert len(data.dataset["input_ids"][0]) == prompt + 2
    assert str(data.report).endswith("dropped: 1 long_prompt; truncated: 1 completions")


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_turns_beyond_the_limit_leave_nothing(chat_tokenizer, mode):
    user, assistant = {"role": "user", "content": "yes " * 30}, {"role": "assistant", "content": "no"}
    rows = [{"messages": [user, assistant, user]}, {"messages": [user, assistant]}]
    data = prepare_completions(
        rows, chat_tokenizer, assistant_only_loss=True, max_length=12, truncation_mode=mode, on_long_prompt="truncate",
    )  # fmt: skip
    assert all(any(mask) and len(mask) <= 12 for mask in data.dataset["completion_mask"][:])
    assert data.report.kept == 2
    with pytest.raises(ValueError, match=r"no row is left .*dropped: 2 long_prompt"):
        prepare_completions(rows, chat_tokenizer, assistant_only_loss=True, max_length=12)


@pytest.mark.parametrize(
    ("prompt", "rest", "mode", "on_long", "expected"),
    [
        (3, 4, "keep_start", "drop", [0, 1, 2, 3, 4, 5]),  # of max_length 6
        (4, 3, "keep_end", "drop", [0, 2, 3, 4, 5, 6]),  # BOS stays
        (3, 9, "keep_end", "drop", [0, 1, 2, 3, 4, 5]),  # the prompt keeps half
        (7, 2, "keep_start", "drop", None),
        (7, 2, "keep_start", "truncate", [0, 4, 5, 6, 7, 8]),
        (0, 8, "keep_start", "drop", [0, 1, 2, 3, 4, 5]),
        (0, 8, "keep_end", "drop", [0, 3, 4, 5, 6, 7]),
        (2, 4, "keep_end", "drop", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_limits(prompt, rest, mode, on_long, expected):
    found = fit(_example(prompt, rest), LengthLimit(6, mode, on_long, bos_token_id=0))
    if expected is None:
        assert found is None
        return
    assert found.input_ids == expected
    assert found.mask[1:] == [i >= prompt for i in expected][1:]
    assert len(found.mask) == len(found.input_ids)


def test_no_limit(text_tokenizer):
    rows = [{"text": "yes " * 2000}]
    assert len(prepare_completions(rows, text_tokenizer, max_length=None).dataset["input_ids"][0]) > 2000


def test_a_first_token_is_nothing_to_train_on(byte_bpe):
    tokenizer = byte_bpe(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="2 nothing_to_train_on"):
        prepare_completions([{"messages": [{"role": "assistant", "content": "!"}]}] * 2, tokenizer)


@pytest.fixture(scope="module")
def real(shared_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "hh-tiny")
    return tokenizer, shared_dir / "data" / "hh_harmless.jsonl.gz"


def test_real_preferences_teach_their_chosen_response(real):
    tokenizer, path = real
    data, report = prepare_completions(path, tokenizer, split="train[:400]", on_bad_row="skip", max_length=512)
    assert report.read == 400
    assert report.kept + len(report.bad) + sum(report.dropped.values()) == 400
    assert report.kept > 380
    assert report.formats == {"transcript as chat, chosen": report.kept}
    header = tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    for ids, mask in zip(data["input_ids"][:50], data["completion_mask"][:50], strict=True):
        start = mask.index(True)
        assert ids[start - len(header) : start] == header
        assert all(mask[start:])


def test_real_conversations_teach_every_turn(real, tmp_path: Path):
    tokenizer, path = real
    data, _ = prepare_completions(path, tokenizer, split="train[:100]", on_bad_row="skip", max_length=None)
    turns, _ = prepare_completions(
        path, tokenizer, split="train[:100]", on_bad_row="skip", max_length=None, assistant_only_loss=True,
        completion_only_loss=False,
    )  # fmt: skip
    assert turns["input_ids"][:] == data["input_ids"][:]
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for ids, last, every in zip(
        data["input_ids"][:], data["completion_mask"][:], turns["completion_mask"][:], strict=True
    ):
        assert np.all(np.array(every) >= np.array(last))
        starts = [i for i in range(1, len(every)) if every[i] and not every[i - 1]]
        assert [ids[i - 1] for i in starts] == [header] * ids.count(header)
