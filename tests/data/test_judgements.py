"""Rows of judged responses: what they are understood as, and every way in which they are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.judgements import label_parser, list_parser
from fastalign.data.report import Reason, RowError

USER = [{"role": "user", "content": "Is it?"}]
YES = {"role": "assistant", "content": "Yes."}
THREE = {"prompt": "Is it?", "completions": [" Yes.", " No.", " Maybe."]}


def parse(row, format="auto", template=True):
    return list_parser(format, template)(row)


def labelled(row, label_type=None):
    seen = set()
    return label_parser("auto", True, label_type, seen)(row), seen


def reason_of(call, *args) -> tuple[Reason, str]:
    with pytest.raises(RowError) as error:
        call(*args)
    return error.value.reason, error.value.detail


def test_text_completions_with_ranks_and_with_scores():
    item = parse(THREE | {"rank": [2, 1, 2]})
    assert item.prompt == "Is it?"
    assert list(item.responses.values()) == [" Yes.", " No.", " Maybe."]
    assert item.values == [2, 1, 2]
    assert item.format == "rank, text"
    scored = parse(THREE | {"score": [0.5, 7, 0.5], "rank": None})
    assert (scored.values, scored.scores) == ([2, 1, 2], [0.5, 7, 0.5])
    assert item.scores is None
    written = parse(THREE | {"ranking": "B > A = C"})
    assert (written.values, written.format) == ([2, 1, 2], "ranking, text")


def test_scores_that_are_asked_for():
    parse_scored = list_parser("auto", True, scored=True)
    assert parse_scored(THREE | {"score": [1, 2, 3]}).scores == [1, 2, 3]
    assert reason_of(parse_scored, THREE | {"rank": [1, 2, 3]})[0] == Reason.MISSING_KEY


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6).filter(lambda values: len(set(values)) > 1))
def test_ranks_are_dense_and_scores_are_the_other_way_round(values):
    row = {"prompt": "p", "completions": [f"c{i}" for i in range(len(values))]}
    best_first = sorted(set(values))
    assert parse(row | {"rank": values}).values == [best_first.index(v) + 1 for v in values]
    assert parse(row | {"score": [-v for v in values]}).values == parse(row | {"rank": values}).values


def test_messages_and_transcripts():
    item = parse({"prompt": USER, "completions": [[YES], YES, "No."], "rank": [1, 1, 2]})
    assert list(item.responses.values()) == [YES, YES, {"role": "assistant", "content": "No."}]
    assert item.format == "rank, messages"
    row = {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "completions": [" Yes. ", " No."], "rank": [1, 2]}
    chat = parse(row)
    assert chat.prompt == USER
    assert chat.responses["completions[0]"] == YES
    text = parse(row, "text")
    assert (text.prompt, text.responses["completions[0]"]) == (row["prompt"], " Yes. ")
    assert parse(THREE | {"rank": [1, 2, 3], "tools": None}, "chat").prompt == USER
    kwargs = {"prompt": USER, "completions": ["a", "b"], "rank": [1, 2], "chat_template_kwargs": {"x": 1}}
    assert parse(kwargs).template_kwargs == {"x": 1}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (THREE, Reason.MISSING_KEY, "one of rank, ranking, score is needed, the row has none of them"),
        (THREE | {"rank": [1, 2, 3], "score": [3, 2, 1]}, Reason.MISSING_KEY, "the row has rank and score"),
        (THREE | {"ranking": "A > B"}, Reason.MISSING_KEY, "ranking leaves out C"),
        (THREE | {"ranking": "A = B = C"}, Reason.UNSUPPORTED, "3 completions of one rank"),
        (THREE | {"completions": "Yes", "ranking": "A > B"}, Reason.WRONG_TYPE, "completions is a string"),
        (THREE | {"rank": [1, 2]}, Reason.WRONG_TYPE, "3 completions for 2 values of rank"),
        (THREE | {"completions": "Yes", "rank": [1, 2]}, Reason.WRONG_TYPE, "a string for 2"),
        (THREE | {"rank": "D > C"}, Reason.WRONG_TYPE, "rank is a str, not a list"),
        (THREE | {"rank": [1, None, 2]}, Reason.WRONG_TYPE, "rank[1] is a NoneType"),
        (THREE | {"rank": [1, True, 2]}, Reason.WRONG_TYPE, "rank[1] is a bool"),
        (THREE | {"score": [1, 2, float("nan")]}, Reason.WRONG_TYPE, "score[2] is nan, not a finite"),
        (THREE | {"rank": [4, 4, 4]}, Reason.UNSUPPORTED, "3 completions of one rank"),
        ({"prompt": "p", "completions": ["a"], "rank": [1]}, Reason.UNSUPPORTED, "1 completions"),
        ({"prompt": "p", "completions": [], "rank": []}, Reason.UNSUPPORTED, "0 completions"),
        (THREE | {"completions": ["a", " ", "b"], "rank": [1, 2, 3]}, Reason.EMPTY_RESPONSE, "completions[1]"),
        (THREE | {"completions": ["a", "b", "a"], "rank": [1, 2, 3]}, Reason.IDENTICAL, "completions[0] equals"),
        (THREE | {"completions": ["a", [YES], "b"], "rank": [1, 2, 3]}, Reason.WRONG_TYPE, "is a list, and the prompt"),
        ({"prompt": USER, "completions": ["a", 3], "rank": [1, 2]}, Reason.WRONG_TYPE, "completions[1] is a int"),
        ({"prompt": USER, "completions": ["a", [YES, YES]], "rank": [1, 2]}, Reason.EXTRA_TURNS, "2 messages"),
        ({"prompt": USER, "completions": ["a", []], "rank": [1, 2]}, Reason.EMPTY_RESPONSE, "0 messages"),
        ({"prompt": USER, "completions": ["a", USER], "rank": [1, 2]}, Reason.WRONG_ROLE, "role 'user'"),
        ({"prompt": [YES], "completions": ["a", "b"], "rank": [1, 2]}, Reason.WRONG_ROLE, "not 'user'"),
        ({"completions": ["a", "b"], "rank": [1, 2]}, Reason.MISSING_KEY, "no prompt"),
        (THREE | {"rank": [1, 2, 3], "image": [0]}, Reason.UNSUPPORTED, "text only"),
    ],
)  # fmt: skip
def test_bad_lists(row, reason, detail):
    found, text = reason_of(parse, row)
    assert found == reason
    assert detail in text


def test_equal_responses_of_equal_rank_are_fine():
    assert parse(THREE | {"completions": ["a", "b", "a"], "rank": [1, 2, 1]}).values == [1, 2, 1]


def test_messages_without_a_template_are_refused():
    row = {"prompt": USER, "completions": ["a", "b"], "rank": [1, 2]}
    assert reason_of(list_parser("auto", False), row)[0] == Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("label", "kind"), [(True, "binary"), (0, "binary"), (1, "binary"), (1.0, "scalar"), (-2, "scalar")]
)
def test_labels_and_their_types(label, kind):
    item, seen = labelled({"prompt": "p", "completion": "c", "label": label})
    assert (item.values, seen) == ([float(label)], {kind})
    assert item.format == "labelled, text"


def test_a_label_type_that_is_asked_for():
    row = {"prompt": USER, "completion": [YES], "label": 1}
    assert labelled(row, "scalar")[1] == {"scalar"}
    assert labelled(row | {"label": 1.0}, "binary")[1] == {"binary"}
    assert reason_of(labelled, row | {"label": 0.5}, "binary")[1].startswith("label is neither 0 nor 1")
    assert reason_of(labelled, row | {"label": True}, "scalar")[1] == "label is a bool, not a number"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, Reason.MISSING_KEY), ({"completion": None}, Reason.MISSING_KEY),
        ({"label": "good"}, Reason.WRONG_TYPE), ({"label": float("inf")}, Reason.WRONG_TYPE),
        ({"completion": "\n"}, Reason.EMPTY_RESPONSE), ({"prompt": ""}, Reason.EMPTY_PROMPT),
    ],
)  # fmt: skip
def test_bad_labelled_rows(change, reason):
    assert reason_of(labelled, {"prompt": "p", "completion": "c", "label": 1} | change)[0] == reason
