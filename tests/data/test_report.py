"""The account of a data set, in words and in numbers."""

from __future__ import annotations

import json
import pickle

import pytest

from fastalign.data.report import BadRow, BadRowsError, DataReport, Reason, RowError


@pytest.fixture
def report() -> DataReport:
    report = DataReport(source="pairs.jsonl", read=20, kept=5, truncated_chosen=2, merged_boundaries=3, without_eos=1)
    report.bad = [BadRow(i, Reason.EMPTY_RESPONSE, "chosen") for i in range(9)]
    report.bad += [BadRow(9 + i, Reason.WRONG_ROLE, "prompt[0]") for i in range(3)]
    report.dropped["long_prompt"] = 3
    report.formats["text, explicit prompt"] = 5
    return report


def test_numbers_are_ready_for_json(report: DataReport):
    assert json.loads(json.dumps(report.as_dict())) == {
        "source": "pairs.jsonl",
        "read": 20,
        "kept": 5,
        "bad": {"empty response": 9, "wrong role": 3},
        "dropped": {"long_prompt": 3},
        "formats": {"text, explicit prompt": 5},
        "truncated_prompts": 0,
        "truncated_chosen": 2,
        "truncated_rejected": 0,
        "truncated_completions": 0,
        "merged_boundaries": 3,
        "without_eos": 1,
    }


def test_words(report: DataReport):
    assert str(report) == (
        "pairs.jsonl: 5 of 20 rows kept (5 text, explicit prompt); "
        "12 bad rows skipped: 9 empty response, 3 wrong role; "
        "dropped: 3 long_prompt; truncated: 2 chosen; 3 responses encoded apart from their prompt; "
        "1 responses without the end-of-sequence token"
    )
    assert str(DataReport(source="x", read=2, kept=2)) == "x: 2 of 2 rows kept (none)"


def test_the_error_lists_ten_rows_and_counts_all(report: DataReport):
    error = BadRowsError(report)
    message = str(error)
    assert message.startswith(
        "12 of 20 rows of pairs.jsonl cannot be used: 9 empty response, 3 wrong role. Counted from 0:\n"
    )
    assert [line.strip() for line in message.splitlines() if line.startswith("  row")] == [
        f"row {bad.row}: {bad.reason} ({bad.detail})" for bad in report.bad[:10]
    ]
    assert "and 2 more" in message
    assert "on_bad_row='skip'" in message
    report.bad = report.bad[:10]
    assert "more" not in str(BadRowsError(report))


def test_the_error_crosses_processes(report: DataReport):
    error = pickle.loads(pickle.dumps(BadRowsError(report)))
    assert str(error) == str(BadRowsError(report))
    assert error.report == report


def test_a_row_error_keeps_reason_and_detail():
    error = RowError(Reason.MISSING_KEY, "no chosen")
    assert (error.reason, error.detail, str(error)) == (Reason.MISSING_KEY, "no chosen", "missing key: no chosen")
