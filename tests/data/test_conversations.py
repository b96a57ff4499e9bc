"""Message lists and transcripts."""

from __future__ import annotations

from typing import Any

import pytest

from fastalign.data.conversations import from_messages, from_transcripts, transcripts_of
from fastalign.data.report import Reason, RowError

H, A = "\n\nHuman:", "\n\nAssistant:"
SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
MORE = {"role": "user", "content": "and?"}
GOOD = {"role": "assistant", "content": "fine"}
POOR = {"role": "assistant", "content": "what"}


def _reason(function, *args: Any, **kwargs: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        function(*args, **kwargs)
    return caught.value


# Transcripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": f"{H} a{A} b", "rejected": f"{H} a{A} c"}, (f"{H} a{A} b", f"{H} a{A} c")),
        ({"chosen": f"{H} a{A} b", "rejected": "c"}, (f"{H} a{A} b", "c")),
        ({"prompt": f"{H} a{A}", "chosen": " b", "rejected": " c"}, (f"{H} a{A} b", f"{H} a{A} c")),
        (
            {"prompt": f"{H} a{A}", "chosen": f"{H} a{A} b", "rejected": f"{H} a{A} c"},
            (f"{H} a{A} b", f"{H} a{A} c"),
        ),
        ({"chosen": "a", "rejected": "b"}, None),
        ({"prompt": "a", "chosen": f"{H} b", "rejected": f"{H} c"}, None),
    ],
)
def test_transcripts_are_recognised_and_put_together(row, expected):
    assert transcripts_of(row) == expected


def test_a_transcript_is_split_at_the_last_common_assistant_turn():
    start = f"{H} one {A} two\nlines{H} three"
    chosen, rejected = f"{start}{A} four ", f"{start}{A} five"
    pair = from_transcripts(chosen, rejected, chat=False)
    assert (pair.prompt, pair.chosen, pair.rejected) == (start + A, " four ", " five")
    pair = from_transcripts(chosen, rejected, chat=True)
    assert [(m["role"], m["content"]) for m in pair.prompt] == [
        ("user", "one"), ("assistant", "two\nlines"), ("user", "three"),
    ]  # fmt: skip
    assert (pair.chosen, pair.rejected) == (
        {"role": "assistant", "content": "four"},
        {"role": "assistant", "content": "five"},
    )


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "detail"),
    [
        (f"{H} a{A} b", "c", Reason.WRONG_ROLE, "rejected does not end with an Assistant turn"),
        (f"{H} a", f"{H} a{A} c", Reason.WRONG_ROLE, "chosen does not end"),
        (f"{H} a{A} b{H} c", f"{H} a{A} c", Reason.WRONG_ROLE, "chosen does not end"),
        (f"{H} a{A} b", f"{H} z{A} b", Reason.NO_COMMON_PROMPT, "first turn"),
        (f"{H} a{A} b{A} c", f"{H} a{A} d", Reason.EXTRA_TURNS, "chosen: 2 turns after 1 common ones"),
        (f"{H} a{A} b{H} x{A} c", f"{H} a{A} d{H} x{A} c", Reason.EXTRA_TURNS, "chosen: 3 turns after 1 common"),
        (f"{H} a{A} d", f"{H} a{A} b{H} x{A} c", Reason.EXTRA_TURNS, "rejected: 3 turns after 1 common"),
        (f"{H} a{A} b", f"{H} a{A} b{H} x{A} c", Reason.EXTRA_TURNS, "rejected: 3 turns after 1 common ones"),
        (f"{H} a{A} b{A} c", f"{H} a{A} b{A} d", Reason.WRONG_ROLE, "the common turns end with an Assistant turn"),
    ],
)
def test_bad_transcripts(chosen, rejected, reason, detail, chat):
    error = _reason(from_transcripts, chosen, rejected, chat=chat)
    assert error.reason is reason
    assert detail in error.detail


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [POOR]}, [SYSTEM, USER]),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, POOR]}, [SYSTEM, USER]),
        ({"chosen": [USER, REPLY, MORE, GOOD], "rejected": [USER, REPLY, MORE, POOR]}, [USER, REPLY, MORE]),
        ({"prompt": "hi", "chosen": "fine", "rejected": "what"}, [USER]),
        ({"prompt": [USER], "chosen": "fine", "rejected": [POOR]}, [USER]),
        # a response repeats the prompt's messages
        ({"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [POOR]}, [SYSTEM, USER]),
        # the prompt repeats a message of the conversations
        ({"prompt": " hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, POOR]}, [SYSTEM, USER]),
        ({"prompt": "hi", "chosen": [USER, REPLY, MORE, GOOD], "rejected": [USER, REPLY, MORE, POOR]},
         [USER, REPLY, MORE]),
        # None stands for an absent key
        ({"prompt": [{**USER, "name": None}], "chosen": [{**GOOD, "tool_calls": None}], "rejected": [POOR]}, [USER]),
    ],
)  # fmt: skip
def test_messages(row, prompt):
    pair = from_messages(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, GOOD, POOR)


def test_tool_calls_stand_for_content():
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    result = {"role": "tool", "content": "3"}
    pair = from_messages({"prompt": [USER, {**call, "content": None}, result], "chosen": [GOOD], "rejected": [call]})
    assert pair.prompt[1] == pair.rejected == {**call, "content": ""}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": [USER], "chosen": [3], "rejected": [POOR]}, Reason.WRONG_TYPE, "chosen[0] is a int"),
        ({"prompt": [USER], "chosen": [{"content": "x"}], "rejected": [POOR]}, Reason.MISSING_KEY, "no role"),
        ({"prompt": [{"from": "human", "value": "x"}], "chosen": [GOOD], "rejected": [POOR]},
         Reason.MISSING_KEY, "prompt[0] has no role"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, Reason.MISSING_KEY, "no content"),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": [{"type": "text"}]}], "rejected": [POOR]},
         Reason.WRONG_TYPE, "content of chosen[0] is a list"),
        ({"prompt": [{**USER, "role": "human"}], "chosen": [GOOD], "rejected": [POOR]},
         Reason.WRONG_ROLE, "prompt[0] has an unknown role"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [POOR]}, Reason.EMPTY_RESPONSE, "chosen has no message"),
        ({"prompt": [USER], "chosen": [MORE], "rejected": [POOR]}, Reason.WRONG_ROLE, "chosen has role 'user'"),
        ({"prompt": [USER, REPLY], "chosen": [GOOD], "rejected": [POOR]}, Reason.WRONG_ROLE, "ends with role 'assist"),
        ({"prompt": [SYSTEM], "chosen": [GOOD], "rejected": [POOR]}, Reason.WRONG_ROLE, "ends with role 'system'"),
        ({"prompt": [USER], "chosen": [], "rejected": [POOR]}, Reason.EMPTY_RESPONSE, "chosen has no message"),
        ({"chosen": [GOOD], "rejected": [POOR]}, Reason.NO_COMMON_PROMPT, "no first message in common"),
        ({"chosen": [USER, GOOD], "rejected": [MORE, POOR]}, Reason.NO_COMMON_PROMPT, "no first message in common"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
         Reason.NO_COMMON_PROMPT, "prompt is no message"),
        ({"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, POOR, MORE, GOOD]},
         Reason.EXTRA_TURNS, "chosen: 3 messages after the prompt"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [POOR, MORE, POOR]}, Reason.EXTRA_TURNS, "rejected: 3"),
    ],
)  # fmt: skip
def test_bad_messages(row, reason, detail):
    error = _reason(from_messages, row)
    assert error.reason is reason
    assert detail in error.detail
