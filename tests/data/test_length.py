"""The length limit, against TRL's rule and for any lengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.data.encoding import Encoded
from fastalign.data.length import ON_LONG_PROMPT, TRUNCATION_MODES, LengthLimit

BOS = 0
ids = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def _trl_cut(encoded: Encoded, max_length: int) -> tuple[list[int], ...] | None:
    """TRL's "keep_start": rows whose prompt fills max_length are dropped, sequences lose their end."""
    if len(encoded.prompt_ids) >= max_length:
        return None
    room = max_length - len(encoded.prompt_ids)
    return encoded.prompt_ids, encoded.chosen_ids[:room], encoded.rejected_ids[:room]


@given(ids, ids, ids, st.integers(2, 20))
def test_the_defaults_are_trl_s(prompt, chosen, rejected, max_length):
    encoded = Encoded(prompt, chosen, rejected)
    result, expected = LengthLimit(max_length)(encoded), _trl_cut(encoded, max_length)
    if expected is None:
        assert result == ("long_prompt" if len(prompt) + max(len(chosen), len(rejected)) > max_length else encoded)
    elif expected[1] == expected[2] and len(prompt) + max(len(chosen), len(rejected)) > max_length:
        assert result == "identical_after_truncation"  # nothing to learn there; TRL keeps it
    else:
        assert result == Encoded(*expected)


@given(
    st.booleans(), ids, ids, ids, st.integers(2, 12),
    st.sampled_from(TRUNCATION_MODES), st.sampled_from(ON_LONG_PROMPT),
)  # fmt: skip
def test_the_limit_holds_and_nothing_becomes_empty(bos, prompt, chosen, rejected, max_length, mode, on_long_prompt):
    prompt = [BOS, *prompt] if bos else prompt
    encoded = Encoded(prompt, chosen, rejected, merged=1)
    result = LengthLimit(max_length, mode, on_long_prompt, BOS)(encoded)
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest <= max_length:
        assert result is encoded
        return
    if len(prompt) >= max_length and on_long_prompt == "drop":
        assert result == "long_prompt"
        return
    if result == "identical_after_truncation":
        return
    assert isinstance(result, Encoded)
    kept = result.prompt_ids
    assert len(kept) + max(len(result.chosen_ids), len(result.rejected_ids)) <= max_length
    assert kept
    assert result.chosen_ids
    assert result.rejected_ids
    assert result.chosen_ids == chosen[: len(result.chosen_ids)]
    assert result.rejected_ids == rejected[: len(result.rejected_ids)]
    assert result.merged == 1
    if mode == "keep_start" and len(prompt) < max_length:
        assert kept == prompt
        return
    assert len(kept) == min(len(prompt), max(max_length - longest, max_length // 2))
    if len(kept) < len(prompt):  # its end survives, and BOS
        body = kept[1:] if bos and len(kept) > 1 else kept
        assert body == prompt[len(prompt) - len(body) :]
        assert (kept[0] == BOS) == (bos and len(kept) > 1)
    if longest <= max_length - max_length // 2:
        assert (result.chosen_ids, result.rejected_ids) == (chosen, rejected)


def test_without_a_limit_everything_stays():
    encoded = Encoded([1] * 5000, [2], [3])
    assert LengthLimit(None)(encoded) is encoded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"truncation_mode": "left"}, "truncation_mode 'left' is unknown; accepted are 'keep_start', 'keep_end'"),
        ({"on_long_prompt": "keep"}, "on_long_prompt 'keep' is unknown; accepted are 'drop', 'truncate'"),
    ],
)
def test_unknown_limits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LengthLimit(**arguments)
