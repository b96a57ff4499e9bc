"""Rewards: functions and what they are called with, reward models with other tokenizers, weights, refusals."""

import sys

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from fastalign.models import load_scalar_model, score_sequences
from fastalign.rollouts import Completion
from fastalign.trainers.reward_functions import (
    FunctionReward,
    RewardModel,
    Rewards,
    Samples,
    load_function,
    same_tokens,
    token_sequences,
)

EOS = 1
MESSAGES = [{"role": "user", "content": "w7 w8"}]


def samples(**columns):
    """Three completions: finished, cut, and nothing but the stop token."""
    completions = [Completion([5, 6, EOS], True), Completion([9, 10], False), Completion([EOS], True)]
    rows = [4, 4, 7]
    read = (lambda numbers: {k: [v[n] for n in numbers] for k, v in columns.items()}) if columns else None
    return Samples(prompt_ids=[[3, 4], [3, 4], [8]], completions=completions, rows=rows, read_columns=read)


def by_row(**values):
    return {name: {4: four, 7: seven} for name, (four, seven) in values.items()}


def other_tokenizer():
    """The words are other numbers, and the template another one."""
    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, "user:": 3, "bot:": 4} | {f"w{i}": 70 - i for i in range(3, 61)}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]",
        chat_template="{% for m in messages %}{{ 'user: ' if m['role'] == 'user' else 'bot: ' }}{{ m['content'] }} "
        "{% if m['role'] != 'user' %}[EOS]{% endif %}{% endfor %}{% if add_generation_prompt %}bot: {% endif %}",
    )  # fmt: skip


@pytest.fixture
def scorer(kit):
    kit.model(vocab_size=80).save_pretrained(kit.folder / "scorer")
    torch.manual_seed(3)
    return load_scalar_model(str(kit.folder / "scorer")).eval()


def test_a_function_gets_what_it_names(tokenizer):
    def reward(completions, finished, reference_answer, scale=2.0):
        assert completions == ["w5 w6", "w9 w10", ""]
        assert finished == [True, False, True]
        assert reference_answer == ["yes", "yes", "no"]
        return [scale * len(text.split()) for text in completions]

    got = FunctionReward(reward, tokenizer)(samples(**by_row(reference_answer=("yes", "no"), other=(1, 2))))
    assert got.dtype == np.float32
    assert got.tolist() == [4.0, 4.0, 0.0]


def test_a_function_of_anything_gets_everything(tokenizer):
    seen = {}

    def reward(**given):
        seen.update(given)
        return torch.tensor([1.0, 2.0, 3.0])

    data = samples(**by_row(reference_answer=("yes", "no"), prompt=("w3 w4", MESSAGES)))
    assert FunctionReward(reward, tokenizer)(data).tolist() == [1, 2, 3]
    assert seen.keys() == {
        "prompts",
        "completions",
        "prompt_ids",
        "completion_ids",
        "finished",
        "reference_answer",
        "prompt",
    }
    assert seen["prompts"] == ["w3 w4", "w3 w4", MESSAGES]
    assert seen["completion_ids"] == [[5, 6, EOS], [9, 10], [EOS]]
    assert seen["prompt_ids"] == [[3, 4], [3, 4], [8]]
    FunctionReward(reward, tokenizer)(samples())  # without other columns prompts are what the ids say
    assert seen["prompts"] == ["w3 w4", "w3 w4", "w8"]


def test_objects_with_a_call_are_functions(tokenizer):
    class Length:
        def __call__(self, completion_ids):
            return np.array([len(ids) for ids in completion_ids])

    reward = FunctionReward(Length(), tokenizer)
    assert reward.name == "Length"
    assert reward(samples()).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "judge returned 2 values for 3 completions"),
        (None, "judge returned NoneType for 3 completions"),
        (1.0, "judge returned float for 3 completions"),
        ([1.0, float("nan"), 0.0], "judge gave nan for a completion of row 4"),
        ([1.0, 2.0, float("inf")], "judge gave inf for a completion of row 7"),
        ([1.0, 2.0, 1e39], r"judge gave 1e\+39 for a completion of row 7"),
        ([1.0, 2.0, "good"], "judge gave 'good' for a completion of row 7"),
        (torch.zeros(3, 2), r"judge gave \[0.0, 0.0\] for a completion of row 4"),
    ],
    ids=str,
)
def test_a_functions_mistakes_are_named(tokenizer, values, message):
    def judge(completions):
        return values

    with pytest.raises(ValueError, match=message):
        FunctionReward(judge, tokenizer)(samples())


def test_a_column_that_is_not_there_is_named(tokenizer):
    def judge(completions, answer):
        return [0.0] * 3

    with pytest.raises(ValueError, match="judge takes answer, and there is no such column; there are completion_ids"):
        FunctionReward(judge, tokenizer)(samples(**by_row(reference_answer=("yes", "no"))))

    def strict(completions, /):
        return [0.0] * 3

    with pytest.raises(ValueError, match="strict takes completions by position"):
        FunctionReward(strict, tokenizer)


def test_weights_and_what_does_not_apply():
    one = lambda samples: np.array([1.0, np.nan, 3.0], np.float32)  # noqa: E731
    two = lambda samples: np.array([10.0, 20.0, np.nan], np.float32)  # noqa: E731
    total, each = Rewards({"one": one, "two": two}, [2.0, 0.5])(samples())
    assert total.tolist() == [7.0, 10.0, 6.0]
    assert list(each) == ["one", "two"]
    assert np.isnan(each["one"][1])
    with pytest.raises(ValueError, match="no reward applies to a completion of row 4: one"):
        Rewards({"one": one}, None)(samples())
    with pytest.raises(ValueError, match="reward_weights has 1 weights for 2 rewards: one, two"):
        Rewards({"one": one, "two": two}, [1.0])
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0, inf\]: they must be finite"):
        Rewards({"one": one, "two": two}, [1.0, float("inf")])
    with pytest.raises(ValueError, match="no reward: give reward_model"):
        Rewards({}, None)


def test_a_reward_model_of_the_same_tokens_reads_the_sampled_ids(tokenizer, scorer):
    reward = RewardModel(scorer, tokenizer, tokenizer, batch_tokens=16)
    data = samples()
    with torch.no_grad():
        expected = [float(scorer(torch.tensor([ids])).logits) for ids, _ in token_sequences(data)]
    np.testing.assert_allclose(reward(data), expected, rtol=1e-4, atol=1e-5)
    assert token_sequences(data)[0] == ([3, 4, 5, 6, EOS], 2)  # the stop token is read, and nothing after it


def test_another_tokenizer_gets_text(tokenizer, scorer):
    own = other_tokenizer()
    assert not same_tokens(own, tokenizer)
    got = RewardModel(scorer, own, tokenizer, batch_tokens=64)(samples())
    sequences = [([67, 66, 65, 64, 1], 2), ([67, 66, 61, 60], 2), ([62, 1], 1)]  # [EOS] only where it ended by itself
    np.testing.assert_allclose(got, score_sequences(scorer, sequences), rtol=1e-4, atol=1e-5)


def test_another_tokenizer_gets_its_own_template(tokenizer, scorer):
    got = RewardModel(scorer, other_tokenizer(), tokenizer, batch_tokens=64)(samples(**by_row(prompt=(MESSAGES, "w8"))))
    chat = [[3, 63, 62, 4, 65, 64, 1], [3, 63, 62, 4, 61, 60, 1]]
    sequences = [(chat[0], 4), (chat[1], 4), ([62, 1], 1)]
    np.testing.assert_allclose(got, score_sequences(scorer, sequences), rtol=1e-4, atol=1e-5)


def test_the_same_tokens_with_another_template(tokenizer, scorer):
    """Messages go through the reward model's template, text as it was sampled."""
    own = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="w60 {% for m in messages %}{{ m['content'] }} {% endfor %}",
    )  # fmt: skip
    reward = RewardModel(scorer, own, tokenizer, batch_tokens=64)
    assert reward.shares_tokenizer
    got = reward(samples(**by_row(prompt=(MESSAGES, "w8"))))
    sequences = [([60, 7, 8, 5, 6], 3), ([60, 7, 8, 9, 10], 3), ([8, EOS], 1)]
    np.testing.assert_allclose(got, score_sequences(scorer, sequences), rtol=1e-4, atol=1e-5)
    own.chat_template = None  # it has none to prefer
    np.testing.assert_allclose(
        RewardModel(scorer, own, tokenizer, batch_tokens=64)(samples(**by_row(prompt=(MESSAGES, "w8")))),
        score_sequences(scorer, token_sequences(samples())), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_the_models_normalisation_is_applied(tokenizer, scorer):
    from fastalign.models.rewards import RewardNormalization, set_reward_normalization

    reward = RewardModel(scorer, tokenizer, tokenizer, batch_tokens=64)
    raw = reward(samples())
    set_reward_normalization(scorer, RewardNormalization(0.5, 2.0))
    np.testing.assert_allclose(reward(samples()), (raw - 0.5) / 2.0, rtol=1e-5)


def test_a_diverged_reward_model_is_named(tokenizer, scorer):
    reward = RewardModel(scorer, tokenizer, tokenizer, batch_tokens=64)
    with torch.no_grad():
        scorer.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification gave nan for a completion of row 4"):
        reward(samples())


def test_functions_by_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_this_test.py").write_text(
        "LIMIT = 3\ndef length(completions):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("rewards_of_this_test:length")(["a"]) == [0.0]
    for path, message in [
        ("rewards_of_this_test", "must be package.module:function"),
        ("rewards_of_this_test:width", "cannot be imported"),
        ("no_such_module_here:f", "cannot be imported: No module named"),
        ("rewards_of_this_test:LIMIT", "is a int, not a function"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_function(path)
