"""Judged responses as token ids: the same as a pair's, one prompt for all, limits, and the account of the rows."""

import pytest

from fastalign.data.judged import prepare_labelled, prepare_lists
from fastalign.data.preferences import prepare_preferences
from fastalign.data.report import BadRowsError

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {"prompt": "Question: is it?\nAnswer:", "completions": [" yes", " no but maybe", " not now"], "rank": [3, 1, 2]}
CHAT = {"prompt": [{"role": "user", "content": "hello"}], "completions": ["hello to you", "no"], "score": [1.5, -1]}


@pytest.fixture(scope="module")
def tokenizer(byte_bpe):
    return byte_bpe(bos=True, chat_template=TEMPLATE)


def test_each_response_has_the_ids_it_has_in_a_pair(tokenizer):
    data, report = prepare_lists([TEXT, CHAT], tokenizer)
    assert data.column_names == ["prompt_ids", "response_ids", "ranks", "row"]
    assert data["ranks"][:] == [[3, 1, 2], [1, 2]]
    assert dict(report.formats) == {"rank, text": 1, "score, messages": 1}
    for example, row in zip(data, (TEXT, CHAT), strict=True):
        for i in range(1, len(row["completions"])):
            pair = {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][i]}
            (expected,) = prepare_preferences([pair], tokenizer).dataset
            assert example["prompt_ids"] == expected["prompt_ids"]
            assert example["response_ids"][0] == expected["chosen_ids"]
            assert example["response_ids"][i] == expected["rejected_ids"]


def test_scores_are_kept_where_they_are_asked_for(tokenizer):
    scored = [CHAT, TEXT | {"rank": None, "score": [1, 3, 2]}]
    data, _ = prepare_lists(scored, tokenizer, scores=True)
    assert data.column_names == ["prompt_ids", "response_ids", "ranks", "scores", "row"]
    assert data["scores"][:] == [[1.5, -1], [1, 3, 2]]
    assert data["ranks"][:] == [[1, 2], [3, 1, 2]]
    with pytest.raises(BadRowsError, match="row 1: missing key"):
        prepare_lists([CHAT, TEXT], tokenizer, scores=True)
    written = prepare_lists([TEXT | {"rank": None, "ranking": "B > C > A"}], tokenizer).dataset
    assert written["ranks"][:] == [[3, 1, 2]]


def test_limits_cut_and_drop_as_for_pairs(tokenizer):
    data, report = prepare_lists([TEXT], tokenizer)
    (whole,) = data
    prompt = len(whole["prompt_ids"])
    data, report = prepare_lists([TEXT], tokenizer, max_length=prompt + 3)
    (cut,) = data
    assert cut["prompt_ids"] == whole["prompt_ids"]
    assert cut["response_ids"] == [ids[:3] for ids in whole["response_ids"]]
    assert report.truncated_completions == 1
    room = prompt + min(map(len, whole["response_ids"])) - 1
    (kept,), report = prepare_lists([TEXT], tokenizer, max_length=room, truncation_mode="keep_end")
    assert report.truncated_prompts == 1
    assert len(kept["prompt_ids"]) < prompt
    assert kept["prompt_ids"][0] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match="1 long_prompt"):
        prepare_lists([TEXT], tokenizer, max_length=prompt)
    _, report = prepare_lists([TEXT], tokenizer, max_length=prompt, on_long_prompt="truncate")
    assert report.truncated_prompts == 1
    same = {"prompt": "Question:", "completions": [" yes and no", " yes and now"], "rank": [1, 2]}
    with pytest.raises(ValueError, match="1 identical_after_truncation"):
        prepare_lists([same], tokenizer, max_length=len(tokenizer("Question:")["input_ids"]) + 1)


def test_bad_rows_are_named_or_skipped(tokenizer):
    rows = [TEXT, TEXT | {"rank": [1, 1, 1]}, CHAT, {"prompt": "x"}]
    with pytest.raises(BadRowsError, match="row 1: unsupported content") as error:
        prepare_lists(rows, tokenizer)
    assert [bad.row for bad in error.value.report.bad] == [1, 3]
    data, report = prepare_lists(rows, tokenizer, on_bad_row="skip")
    assert data["row"][:] == [0, 2]
    assert (report.read, report.kept) == (4, 2)


def test_labels_are_bool_where_all_are_binary(tokenizer):
    rows = [
        {"prompt": "Question:", "completion": f" yes {w}", "label": v} for w, v in zip("ab", (True, 0), strict=True)
    ]
    data, report = prepare_labelled(rows, tokenizer)
    assert data.column_names == ["prompt_ids", "completion_ids", "row", "label"]
    assert data["label"][:] == [True, False]
    assert report.without_eos == 0
    assert all(ids[-1] == tokenizer.eos_token_id for ids in data["completion_ids"])
    data, _ = prepare_labelled([*rows, rows[0] | {"label": 0.5}], tokenizer)
    assert data["label"][:] == [1.0, 0.0, 0.5]
    assert data.features["label"].dtype == "float32"
    assert prepare_labelled(rows[1:], tokenizer, label_type="scalar").dataset.features["label"].dtype == "float32"
    with pytest.raises(BadRowsError, match="neither 0 nor 1"):
        prepare_labelled([rows[0] | {"label": 2}], tokenizer, label_type="binary")
    with pytest.raises(ValueError, match="label_type 'real' is unknown; accepted are 'scalar', 'binary'"):
        prepare_labelled(rows, tokenizer, label_type="real")
