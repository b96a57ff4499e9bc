"""Rewards of sequences: plain transformers' scores of single sequences in any batch; normalisation that lasts."""

import numpy as np
import pytest
import torch
import transformers as tf

from fastalign.models import (
    RewardNormalization,
    load_scalar_model,
    reward_normalization,
    score_sequences,
    set_reward_normalization,
)
from fastalign.models.attention import uses_segments
from fastalign.models.scalar import is_scalar_fused

SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, attention_dropout=0.3)).train()


def sequences(n: int = 9) -> list[tuple[list[int], int]]:
    """Of very different lengths; every third ends with the token that the config pads with."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        ids = rng.integers(3, 53, rng.integers(1, 30)).tolist()
        out.append(([*ids, 2] if i % 3 == 0 else ids, 1))
    return out


def alone(model, ids) -> float:
    """The reward by plain transformers at the last token of one sequence: no padding, no pooling by pad token."""
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_scores_are_those_of_each_sequence_by_itself(model, batch_tokens, layout):
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    got = score_sequences(model, sequences(), batch_tokens=batch_tokens, token_layout=layout)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert not is_scalar_fused(model)
    assert not uses_segments(model)
    model.eval()
    expected = np.array([alone(model, ids) for ids, _ in sequences()], np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def answers() -> list[tuple[list[int], int]]:
    """Four responses to each of five prompts, some equal, some of a single token or none beyond the prompt."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(5):
        prompt = rng.integers(3, 53, rng.integers(8, 20)).tolist()
        own = [rng.integers(3, 53, n).tolist() for n in (1, 4, rng.integers(2, 9))]
        made += [(prompt + ids, len(prompt)) for ids in (*own, own[1])]
    return [*made, (prompt, len(prompt)), (prompt, 0)]


@pytest.mark.parametrize("normalise", [False, True])
def test_a_prompt_is_computed_once(model, normalise):
    expected = np.array([alone(model.eval(), ids) for ids, _ in answers()], np.float32)
    if normalise:
        set_reward_normalization(model, RewardNormalization(0.25, 0.5))
        expected = (expected - 0.25) / 0.5
    tokens, seen = {}, []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["input_ids"],))[0].numel()), with_kwargs=True
    )
    for layout in ("padded", "packed", "shared"):
        for budget in (60, 10_000):
            seen.clear()
            got = score_sequences(model, answers(), batch_tokens=budget, normalise=normalise, token_layout=layout)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
            assert max(seen) <= budget
            tokens[layout, budget] = sum(seen)  # with the probes', the same for packed and shared
    handle.remove()
    for budget in (60, 10_000):
        assert tokens["shared", budget] < 0.75 * tokens["packed", budget]


def test_a_model_that_takes_no_packed_batch_is_scored_padded(model, monkeypatch):
    expected = score_sequences(model, answers())
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    np.testing.assert_allclose(score_sequences(model, answers()), expected, rtol=1e-5, atol=1e-6)


def test_arrays_nothing_and_an_empty_sequence(model):
    arrays = [(np.array(ids), start) for ids, start in sequences()]
    np.testing.assert_array_equal(score_sequences(model, arrays), score_sequences(model, sequences()))
    assert score_sequences(model, []).shape == (0,)
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        score_sequences(model, [([3], 0), ([], 0)])


def test_autocast_is_the_one_asked_for(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = score_sequences(model, sequences())
    np.testing.assert_array_equal(exact, score_sequences(model, sequences()))
    narrow = score_sequences(model, sequences(), autocast=torch.bfloat16)
    assert np.any(narrow != exact)
    np.testing.assert_allclose(narrow, exact, atol=0.02)


def test_normalisation_is_saved_with_the_model(model, tmp_path):
    assert reward_normalization(model) is None
    raw = score_sequences(model, sequences())
    set_reward_normalization(model, RewardNormalization(0.25, 0.5))
    model.save_pretrained(tmp_path / "m")
    again = load_scalar_model(tmp_path / "m")
    assert reward_normalization(again) == (0.25, 0.5)
    np.testing.assert_allclose(score_sequences(again, sequences()), (raw - 0.25) / 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(score_sequences(again, sequences(), normalise=False), raw)
    plain = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert abs(alone(plain, sequences()[1][0]) - raw[1]) < 1e-5  # transformers ignores it
    set_reward_normalization(again, RewardNormalization(0.25))
    np.testing.assert_allclose(score_sequences(again, sequences()), raw - 0.25, rtol=1e-5, atol=1e-6)
    set_reward_normalization(again, None)
    assert reward_normalization(again) is None
    again.save_pretrained(tmp_path / "n")
    assert reward_normalization(load_scalar_model(tmp_path / "n")) is None


def test_normalisation_that_means_nothing_is_refused(model):
    for mean, std, what in ((float("nan"), None, "mean"), (0.0, 0.0, "standard deviation"), (0.0, -1.0, "deviation")):
        with pytest.raises(ValueError, match=what):
            set_reward_normalization(model, RewardNormalization(mean, std))
    model.config.fastalign_reward_normalization = {"shift": 1.0}
    with pytest.raises(ValueError, match="fastalign_reward_normalization"):
        score_sequences(model, sequences())
