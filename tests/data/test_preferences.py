"""From rows to a tokenised data set: every row accounted for; real transcripts; a peer's batch."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import fastalign.data.preparation as preparation
from fastalign.data import BadRowsError, PreferenceCollator, Reason, load_rows, prepare_preferences

SECRET = "zebra"  # stands in every row below and must stand in no report
STRINGS = [
    {"prompt": f"the {SECRET} answer {i} is", "chosen": f" yes {i} {SECRET}", "rejected": f" no {i}"} for i in range(7)
]
MESSAGES = {
    "prompt": [{"role": "user", "content": SECRET}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
BAD: dict[Reason, Any] = {
    Reason.MISSING_KEY: {"prompt": SECRET, "chosen": SECRET},
    Reason.WRONG_TYPE: {"prompt": SECRET, "chosen": 3, "rejected": SECRET},
    Reason.WRONG_ROLE: {**MESSAGES, "rejected": [{"role": "user", "content": "zebra!"}]},
    Reason.UNSUPPORTED: {**STRINGS[0], "images": [SECRET]},
    Reason.NO_COMMON_PROMPT: {"chosen": SECRET, "rejected": "x" + SECRET},
    Reason.EMPTY_PROMPT: {"prompt": "", "chosen": SECRET, "rejected": "x" + SECRET},
    Reason.EMPTY_RESPONSE: {"prompt": SECRET, "chosen": "", "rejected": SECRET},
    Reason.EXTRA_TURNS: {**MESSAGES, "chosen": [*MESSAGES["chosen"], *MESSAGES["chosen"]]},
    Reason.IDENTICAL: {"prompt": SECRET, "chosen": SECRET, "rejected": SECRET},
    Reason.TEMPLATE: {**MESSAGES, "chat_template_kwargs": {"refuse": True}},
    Reason.TEMPLATE_PREFIX: {**MESSAGES, "chat_template_kwargs": {"thinking": True}},
}
TEMPLATE = (
    "{% if refuse %}{{ raise_exception('refused') }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(byte_bpe) -> Any:
    return byte_bpe(bos=True, chat_template=TEMPLATE)


def _examples(data: datasets.Dataset) -> list[dict]:
    return data.to_list()


# Every row accounted for ----------------------------------------------------------------------------------------------


def test_every_reason_is_reported_with_its_row_and_without_its_text(tokenizer, tmp_path: Path):
    rows, expected = [], {}
    for reason, row in BAD.items():
        rows += [STRINGS[0], row]
        expected[len(rows) - 1] = reason
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + f'{{"chosen": "{SECRET}\n')
    expected[len(rows)] = Reason.UNREADABLE
    assert {*expected.values(), Reason.BOUNDARY} == {*Reason}  # that one is in test_encoding.py

    dataset, report = prepare_preferences(path, tokenizer, on_bad_row="skip")
    assert {bad.row: bad.reason for bad in report.bad} == expected
    assert [bad.row for bad in report.bad] == sorted(expected)
    assert dataset["row"][:] == [i for i in range(len(rows)) if i not in expected]
    assert (report.read, report.kept) == (len(rows) + 1, len(BAD))
    assert "line 23" in report.bad[-1].detail

    with pytest.raises(BadRowsError, match=r"12 of 23 rows of .* cannot be used") as caught:
        prepare_preferences(path, tokenizer)
    assert caught.value.report.bad == report.bad
    assert "and 2 more" in str(caught.value)
    for told in (str(report), str(report.as_dict()), str(report.bad), str(caught.value)):
        assert SECRET not in told


def test_rows_of_every_format_in_one_data_set(tokenizer):
    transcript = "\n\nHuman: the question\n\nAssistant: "
    rows = [
        STRINGS[0],
        MESSAGES,
        {"chosen": transcript + "yes", "rejected": transcript + "no"},
        {"chosen": "the answer is yes", "rejected": "the answer is no"},
    ]
    dataset, report = prepare_preferences(rows, tokenizer)
    texts = [
        tuple(tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in dataset
    ]
    assert texts == [
        (f"<s>{STRINGS[0]['prompt']}", f"{STRINGS[0]['chosen']}</s>", f"{STRINGS[0]['rejected']}</s>"),
        (f"<|user|>{SECRET}</s><|assistant|>", "yes</s>", "no</s>"),
        ("<|user|>the question</s><|assistant|>", "yes</s>", "no</s>"),
        ("<s>the answer is", " yes</s>", " no</s>"),
    ]
    assert report.formats == {
        "text, explicit prompt": 1,
        "messages, explicit prompt": 1,
        "transcript as chat": 1,
        "text, implicit prompt": 1,
    }
    assert report.without_eos == 0


def test_the_length_limit_is_counted(tokenizer):
    long, words = "yes " * 50, "no maybe yesterday now"
    rows = [
        {"prompt": "yes", "chosen": " no", "rejected": " maybe"},
        {"prompt": long, "chosen": " no", "rejected": " maybe"},
        {"prompt": "yes", "chosen": f" {words} {words} {words}", "rejected": " maybe"},
        {"prompt": "yes", "chosen": " yes", "rejected": f" yesterday {words} {words} {words}"},
        {"prompt": "yes", "chosen": f" {words} {words} {words} yes", "rejected": f" {words} {words} {words} no"},
    ]
    dataset, report = prepare_preferences(rows, tokenizer, max_length=10)
    assert report.dropped == {"long_prompt": 1, "identical_after_truncation": 1}
    assert (report.truncated_prompts, report.truncated_chosen, report.truncated_rejected) == (0, 1, 1)
    assert dataset["row"][:] == [0, 2, 3]
    eos = tokenizer.eos_token_id
    assert [(row["chosen_ids"][-1] == eos, row["rejected_ids"][-1] == eos) for row in dataset] == [
        (True, True), (False, True), (True, False),
    ]  # fmt: skip
    assert report.without_eos == 0, "truncated responses are not counted"

    dataset, report = prepare_preferences(rows, tokenizer, max_length=10, on_long_prompt="truncate")
    assert report.dropped == {"identical_after_truncation": 1}
    assert report.truncated_prompts == 1
    assert dataset[1]["prompt_ids"][0] == tokenizer.bos_token_id
    assert all(len(row["prompt_ids"] + row[f"{side}_ids"]) <= 10 for row in dataset for side in ("chosen", "rejected"))
    for report_ in (report, prepare_preferences(rows, tokenizer, max_length=None).report):
        assert report_.read == report_.kept + len(report_.bad) + sum(report_.dropped.values())


def test_merged_boundaries_and_missing_ends_are_counted(byte_bpe):
    tokenizer = byte_bpe(chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    rows = [{"prompt": "the answer is ", "chosen": "yes", "rejected": "?"}, MESSAGES]
    report = prepare_preferences(rows, tokenizer).report
    assert (report.merged_boundaries, report.without_eos) == (1, 2)


def test_the_size_of_a_batch_changes_nothing(tokenizer, monkeypatch: pytest.MonkeyPatch):
    rows = [*STRINGS, BAD[Reason.MISSING_KEY], MESSAGES, BAD[Reason.TEMPLATE], STRINGS[0]]
    whole = prepare_preferences(rows, tokenizer, on_bad_row="skip")
    monkeypatch.setattr(preparation, "_BATCH_ROWS", 2)
    parts = prepare_preferences(rows, tokenizer, on_bad_row="skip")
    assert _examples(parts.dataset) == _examples(whole.dataset)
    assert parts.report == whole.report


def test_every_source_gives_the_same_examples(tokenizer, tmp_path: Path):
    dataset = datasets.Dataset.from_list(STRINGS)
    dataset.save_to_disk(tmp_path / "saved")
    pq.write_table(pa.Table.from_pylist(STRINGS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STRINGS))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write((tmp_path / "rows.jsonl").read_text())
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, STRINGS[0])
        writer.writeheader()
        writer.writerows(STRINGS)
    expected = _examples(prepare_preferences(STRINGS, tokenizer).dataset)
    assert len(expected) == len(STRINGS)
    names = ("saved", "rows.parquet", "rows.jsonl", "rows.jsonl.gz", "rows.csv")
    for source in (dataset, load_rows(STRINGS), *(tmp_path / name for name in names)):
        assert _examples(prepare_preferences(source, tokenizer).dataset) == expected
    stream = dataset.to_iterable_dataset()
    assert _examples(prepare_preferences(stream, tokenizer, max_samples=3).dataset) == expected[:3]
    part = prepare_preferences(tmp_path / "rows.csv", tokenizer, split="train[2:6]", max_samples=3).dataset
    assert _examples(part) == expected[2:5]


def test_messages_from_columns_that_differ_between_rows(tokenizer):
    """Arrow gives each message every key of any message; None must not reach the template."""
    other = {**MESSAGES, "prompt": [{"role": "user", "content": SECRET, "name": "x"}], "tools": None}
    dataset = datasets.Dataset.from_list([MESSAGES, other])
    first, second = _examples(prepare_preferences(dataset, tokenizer).dataset)
    assert {**first, "row": 1} == second


def test_pad_is_never_looked_for(byte_bpe, tokenizer):
    """With pad == eos, the end of a response still counts and padding still does not."""
    same = byte_bpe(bos=True, chat_template=TEMPLATE, pad_token="</s>")
    rows = [*STRINGS, MESSAGES]
    dataset = prepare_preferences(rows, same).dataset
    assert _examples(dataset) == _examples(prepare_preferences(rows, tokenizer).dataset)
    ours, usual = (PreferenceCollator(t.pad_token_id)(_examples(dataset)) for t in (same, tokenizer))
    for key in ("attention_mask", "targets", "rows", "cu_seqlens"):
        assert np.array_equal(ours[key], usual[key])
    ends = ours["targets"].flatten()[ours["rows"][ours["cu_seqlens"][1:] - 1]]
    assert (ends == same.eos_token_id).all()


def test_the_data_set_holds_small_integers_and_survives_the_disk(tokenizer, tmp_path: Path):
    dataset = prepare_preferences(STRINGS, tokenizer).dataset
    assert str(dataset.features["chosen_ids"].feature) == str(datasets.Value("int32"))
    dataset.save_to_disk(tmp_path / "tokens")
    assert _examples(datasets.load_from_disk(tmp_path / "tokens")) == _examples(dataset)


def test_the_fingerprint_is_the_contents(tokenizer):
    def fingerprint(rows):
        return prepare_preferences(rows, tokenizer).dataset._fingerprint

    assert fingerprint(STRINGS) == fingerprint(datasets.Dataset.from_list(STRINGS))
    assert len({fingerprint(rows) for rows in (STRINGS, STRINGS[1:], STRINGS[::-1])}) == 3


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (STRINGS, {"on_bad_row": "ignore"}, "on_bad_row 'ignore' is unknown; accepted are 'error', 'skip'"),
        (STRINGS, {"format": "hh"}, "format 'hh' is unknown"),
        (STRINGS, {"max_length": 1}, "max_length must be at least 2"),
        (load_rows(STRINGS), {"max_samples": 3}, "belong to load_rows"),
        ([], {}, "no row is left"),
        ([BAD[Reason.MISSING_KEY]], {"on_bad_row": "skip"}, "no row is left.*1 missing key"),
        ([STRINGS[0]], {"max_length": 3}, "no row is left.*1 long_prompt"),
    ],
)
def test_what_cannot_be_prepared(tokenizer, dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_preferences(dataset, tokenizer, **arguments)


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hh_tokenizer(shared_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared_dir / "models" / "hh-tiny")


@pytest.fixture(scope="module")
def hh_path(shared_dir: Path) -> Path:
    return shared_dir / "data" / "hh_harmless.jsonl.gz"


@pytest.mark.parametrize("format", ["auto", "text"])
def test_real_transcripts(hh_path: Path, hh_tokenizer, format: str):
    with gzip.open(hh_path, "rt") as stream:
        rows = [json.loads(line) for line in stream]
    empty, unequal = [], []  # by another road than the package's: cut at the last header
    for number, row in enumerate(rows):
        (prompt, chosen), (other, rejected) = (row[key].rsplit("\n\nAssistant:", 1) for key in ("chosen", "rejected"))
        if prompt != other:
            unequal.append(number)
        elif not (chosen.strip() and rejected.strip()):
            empty.append(number)
    assert (len(empty), len(unequal)) == (4, 1)

    dataset, report = prepare_preferences(
        hh_path, hh_tokenizer, format=format, max_length=None, on_bad_row="skip", max_samples=1300
    )
    assert (report.read, report.kept, dataset.num_rows) == (1300, 1295, 1295)
    assert {bad.row: bad.reason for bad in report.bad} == {
        **dict.fromkeys(empty, Reason.EMPTY_RESPONSE),
        **dict.fromkeys(unequal, Reason.EXTRA_TURNS),
    }
    end = hh_tokenizer.eos_token_id
    assert all(row[f"{side}_ids"][-1] == end for row in dataset for side in ("chosen", "rejected"))
    example = dataset[100]
    row = rows[example["row"]]
    prompt, chosen = row["chosen"].rsplit("\n\nAssistant:", 1)
    decoded = [hh_tokenizer.decode(example[f"{name}_ids"]) for name in ("prompt", "chosen")]
    if format == "text":
        assert decoded == [prompt + "\n\nAssistant:", chosen + "<|end|>"]
    else:
        assert decoded[1] == chosen.strip() + "<|end|>"
        assert decoded[0].endswith("<|end|><|assistant|>")
        assert decoded[0].count("<|user|>") == prompt.count("\n\nHuman:")


def test_the_batch_of_trl(shared_dir: Path, hh_path: Path, hh_tokenizer):
    """TRL 1.16 was given these transcripts as messages, which is what format="auto" makes of them."""
    golden = json.loads((shared_dir / "golden" / "trl_dpo.json").read_text())
    dataset = prepare_preferences(
        hh_path, hh_tokenizer, max_length=golden["max_length"], max_samples=86, on_bad_row="skip"
    ).dataset
    batch = PreferenceCollator(hh_tokenizer.pad_token_id)(dataset.select(range(8)).to_list())
    assert dataset["row"][:8] == golden["rows"]
    assert batch["input_ids"].tolist() == golden["batch"]["input_ids"]
    assert batch["attention_mask"].tolist() == golden["batch"]["attention_mask"]
    mask = np.array(golden["batch"]["completion_mask"], dtype=bool)
    scored = (batch["targets"] != -100).numpy()
    assert not mask[:, 0].any()
    assert not scored[:, -1].any()
    assert np.array_equal(scored[:, :-1], mask[:, 1:])
    assert np.array_equal(np.diff(batch["cu_seqlens"]), mask.sum(axis=1))


# Numbers beside the pair ----------------------------------------------------------------------------------------------


def test_a_column_of_numbers_is_kept_with_its_pair(tokenizer):
    rows = [{**STRINGS[0], "margin": 0.5}, {**BAD[Reason.IDENTICAL], "margin": 9}, {**STRINGS[0], "margin": 2}]
    dataset, _ = prepare_preferences(rows, tokenizer, on_bad_row="skip", numbers=["margin"])
    assert dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "margin", "row"]
    assert list(zip(dataset["row"], dataset["margin"], strict=True)) == [(0, 0.5), (2, 2.0)]
    assert "margin" not in prepare_preferences([rows[0]], tokenizer).dataset.column_names


@pytest.mark.parametrize(
    ("margin", "message"),
    [(None, "no margin, which other rows have"), ("much", "margin is a str"), (float("nan"), "margin is nan")],
)
def test_a_row_without_its_number_is_bad(tokenizer, margin, message):
    rows = [{**STRINGS[0], "margin": 0.5}, {**STRINGS[0], "margin": margin}]
    with pytest.raises(BadRowsError, match=rf"row 1: .*{message}"):
        prepare_preferences(rows, tokenizer, numbers=["margin"])
