"""The models and data of a run from what was handed in: critics, rewards, samplers, stop tokens, refusals."""

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.models import load_scalar_model
from fastalign.models.rewards import RewardNormalization, reward_normalization, set_reward_normalization
from fastalign.rollouts import SamplingOptions, TransformersSampler
from fastalign.trainers.ppo_models import stop_ids
from fastalign.trainers.reward_functions import FunctionReward, RewardModel


@pytest.fixture
def scorer(kit):
    """A reward model on disk with its tokenizer, and a normalisation."""
    folder = kit.folder / "scorer"
    kit.model(seed=4).save_pretrained(folder)
    torch.manual_seed(0)
    model = load_scalar_model(str(folder))
    set_reward_normalization(model, RewardNormalization(0.5, 2.0))
    model.save_pretrained(folder)
    kit.tokenizer.save_pretrained(folder)
    return str(folder)


def same_trunk(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def likes(completion_ids):
    return [float(len(ids)) for ids in completion_ids]


# ---- the critic


def test_a_critic_starts_from_the_reward_model(kit, scorer):
    trainer = kit.ppo(reward=scorer, learning_rate=0.05)
    (reward,) = trainer.collector.rewards.sources.values()
    critic = trainer.actor_critic.critic
    assert same_trunk(critic, reward.model)
    assert torch.equal(critic.score.weight, reward.model.score.weight)
    assert reward_normalization(reward.model) == RewardNormalization(0.5, 2.0)
    assert reward_normalization(critic) is None  # values are of shaped rewards, not of the model's scores
    before = {name: p.clone() for name, p in reward.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in reward.model.named_parameters())
    assert not any(p.requires_grad for p in reward.model.parameters())
    assert not same_trunk(critic, reward.model)


def test_a_critic_starts_from_the_policy_where_the_reward_is_a_function(kit):
    kit.model().save_pretrained(kit.folder / "policy")
    for source in (kit.model(), str(kit.folder / "policy")):
        both = kit.ppo(source).actor_critic
        assert same_trunk(both.critic, both.policy)
        assert both.critic.score.weight.shape == (1, 32)


def test_a_critic_that_is_given(kit, scorer):
    given = load_scalar_model(scorer)
    assert kit.ppo(value_model=given).actor_critic.critic is given
    assert same_trunk(kit.ppo(value_model_path=scorer).actor_critic.critic, given)
    frozen = load_scalar_model(scorer, dtype=torch.bfloat16).requires_grad_(False)
    critic = kit.ppo(value_model=frozen).actor_critic.critic
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in critic.parameters())
    head_only = load_scalar_model(scorer)
    head_only.model.requires_grad_(False)
    trained = {name for name, p in kit.ppo(value_model=head_only).actor_critic.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("critic")} == {"critic.score.weight"}  # as it was given


def test_an_adapter_as_reward_model_and_as_critic(kit, scorer):
    base = load_scalar_model(scorer)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(kit.folder / "adapter")
    kit.tokenizer.save_pretrained(kit.folder / "adapter")
    ids = torch.randint(3, 61, (2, 7))
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        assert not torch.allclose(expected, load_scalar_model(scorer)(ids).logits)
        trainer = kit.ppo(reward=str(kit.folder / "adapter"))
        (reward,) = trainer.collector.rewards.sources.values()
        torch.testing.assert_close(reward.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        for critic in (
            trainer.actor_critic.critic,
            kit.ppo(value_model_path=str(kit.folder / "adapter")).actor_critic.critic,
        ):
            torch.testing.assert_close(critic.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert all(p.requires_grad for p in critic.parameters())  # whole, the adapter merged


def test_critics_that_cannot_be(kit, scorer):
    model = load_scalar_model(scorer)
    with pytest.raises(ValueError, match="value_model is the reward model, which stays as it is"):
        kit.ppo(reward=model, value_model=model)
    with pytest.raises(ValueError, match="name two critics"):
        kit.ppo(value_model=model, value_model_path=scorer)
    with pytest.raises(ValueError, match="value_model has no effect with advantage_estimator='reinforce'"):
        kit.ppo(value_model=model, advantage_estimator="reinforce")
    with pytest.raises(ValueError, match="value_head=True has no critic of its own, and value_model is one"):
        kit.ppo(value_model=model, value_head=True)


# ---- the rewards


def test_rewards_by_name_in_memory_and_functions(kit, scorer, tmp_path, monkeypatch):
    (tmp_path / "rewards_by_name.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = kit.ppo(reward=[scorer, load_scalar_model(scorer), likes, likes], reward_weights=[1.0, 2.0, 3.0, 4.0])
    sources = given.collector.rewards.sources
    assert list(sources) == ["scorer", "model_1", "likes", "likes_2"]
    assert [type(s) for s in sources.values()] == [RewardModel, RewardModel, FunctionReward, FunctionReward]
    assert given.collector.rewards.weights.tolist() == [1, 2, 3, 4]
    named = kit.ppo(reward=None, reward_model_path=[scorer], reward_funcs=["rewards_by_name:one"])
    assert list(named.collector.rewards.sources) == ["scorer", "one"]
    named.train()
    assert kit.logs(named)[0]["rewards/one/mean"] == 1.0


def test_tokenizers_of_reward_models(kit, scorer):
    other = type(kit.tokenizer).from_pretrained(scorer)
    other.add_tokens(["more"])
    model = load_scalar_model(scorer)
    for reward, own, shares in (
        (model, None, True),
        (model, other, False),
        ([likes, model], [None, other], False),
        ([likes, model], other, False),
    ):
        sources = kit.ppo(reward=reward, reward_processing_class=own).collector.rewards.sources
        (found,) = (source for source in sources.values() if isinstance(source, RewardModel))
        assert found.shares_tokenizer is shares
        assert (found.tokenizer is other) is not shares
    with pytest.raises(ValueError, match="reward_processing_class has 1 tokenizers for 2 rewards"):
        kit.ppo(reward=[likes, model], reward_processing_class=[other])


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (None, {}, "no reward: give reward_model, reward_funcs"),
        (3, {}, "reward_model must be a model, its name or a function, got int"),
        (likes, {"reward_funcs": ["a:b"]}, "are two ways; give one of them"),
        (likes, {"reward_weights": [1.0, 2.0]}, "reward_weights has 2 weights for 1 rewards: likes"),
        (torch.nn.Linear(2, 1), {}, "expected a transformers sequence classifier .*, got Linear"),
    ],
    ids=["none", "number", "twice", "weights", "linear"],
)
def test_rewards_that_cannot_be(kit, reward, settings, message):
    with pytest.raises(ValueError, match=message):
        kit.ppo(reward=reward, **settings)


def test_a_function_that_fails_in_a_run_is_named_with_its_row(kit):
    def judge(completion_ids):
        return [1.0] * (len(completion_ids) - 1) + [float("nan")]

    with pytest.raises(ValueError, match=r"judge gave nan for a completion of row \d+"):
        kit.ppo(reward=judge).train()


# ---- the sampler


def test_the_sampler_samples_as_the_config_says(kit, caplog):
    sampler = kit.ppo(temperature=0.7, response_length=9).collector.sampler
    assert isinstance(sampler, TransformersSampler)
    assert sampler.options == SamplingOptions(max_new_tokens=9, temperature=0.7)
    assert not caplog.text
    impure = kit.ppo(top_k=5, min_response_length=2, stop_token_id=7).collector.sampler
    assert impure.options == SamplingOptions(max_new_tokens=6, top_k=5, min_new_tokens=2, stop_token_ids=(7,))
    assert "what is sampled is not what is trained" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "the sampler's temperature is 0.5, the config's 1.0"),
        ({"max_new_tokens": 9}, "the sampler's max_new_tokens is 9, the config's 6"),
        ({"top_p": 0.9}, "the sampler's top_p is 0.9, the config's 1.0"),
        ({"stop_token_ids": (4,)}, r"the sampler's stop_token_ids is \(4,\), the config's \(\)"),
    ],
    ids=str,
)
def test_a_sampler_that_samples_otherwise_is_refused(kit, given, message):
    model = kit.model()
    options = SamplingOptions(**({"max_new_tokens": 6} | given))
    with pytest.raises(ValueError, match=message):
        kit.ppo(model, sampler=TransformersSampler(model, kit.tokenizer, options))


def test_stop_tokens(kit):
    def found(**settings):
        return stop_ids(kit.tokenizer, kit.ppo_config(**settings))

    assert found() == found(stop_token="eos") == ()
    assert found(stop_token="w9") == (9,)
    assert found(stop_token_id=12) == (12,)
    with pytest.raises(ValueError, match="stop_token='w9 w10' is 2 tokens, one is accepted"):
        found(stop_token="w9 w10")


def test_vllm_gets_an_engine_of_the_policys_checkpoint(kit, monkeypatch):
    with pytest.raises(ValueError, match="use_vllm=True needs a policy that was loaded by name"):
        kit.ppo(use_vllm=True)
    with pytest.raises(ValueError, match="use_vllm=True and sampler are two ways"):
        kit.ppo(use_vllm=True, sampler=kit.fixed_answers(6))
    kit.model().save_pretrained(kit.folder / "policy")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="use_vllm=True needs vllm, which cannot be imported"):
        kit.ppo(str(kit.folder / "policy"), use_vllm=True)

    class LLM:
        def __init__(self, **settings):
            self.settings = settings
            config = types.SimpleNamespace(logprobs_mode=settings["logprobs_mode"], max_model_len=128)
            self.llm_engine = types.SimpleNamespace(model_config=config)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    sampler = kit.ppo(str(kit.folder / "policy"), use_vllm=True, temperature=0.7).collector.sampler
    assert sampler.llm.settings["model"] == str(kit.folder / "policy")
    assert sampler.llm.settings["logprobs_mode"] == "processed_logprobs"
    assert sampler.options.temperature == 0.7


# ---- policy and data


def test_what_is_missing_is_named(kit):
    from fastalign.trainers import PPOTrainer

    with pytest.raises(ValueError, match="no model: give model"):
        PPOTrainer(kit.ppo_config(), kit.tokenizer, reward_model=likes, train_dataset=kit.prompts(8))
    with pytest.raises(ValueError, match="model must be a name or a model, got dict"):
        kit.ppo({})
    with pytest.raises(ValueError, match="no data: give train_dataset"):
        PPOTrainer(kit.ppo_config(), kit.tokenizer, kit.model(), reward_model=likes)
    with pytest.raises(ValueError, match="processing_class is missing"):
        PPOTrainer(kit.ppo_config(), None, kit.model(), reward_model=likes, train_dataset=kit.prompts(8))


def test_a_trainer_that_only_evaluates(kit):
    from fastalign.trainers import PPOTrainer

    trainer = PPOTrainer(
        kit.ppo_config(), kit.tokenizer, kit.model(), reward_model=likes, eval_dataset=[{"prompt": "w3 w4"}]
    )
    assert trainer.evaluate()["eval_objective/scores"] > 0
