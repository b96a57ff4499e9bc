"""Collecting a phase: what is sampled, scored and laid out for an update."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset

from fastalign.rollouts import Completion, SamplingOptions
from fastalign.trainers.ppo_rollout import PromptBatch, PromptSet


class Scripted:
    """A sampler whose completions are known: of lengths 1, 2, 3, ..., each ending in the stop token."""

    def __init__(self, max_new_tokens=6):
        self.options, self.seeds = SamplingOptions(max_new_tokens=max_new_tokens), []

    def sync(self, model):
        pass

    def generate(self, prompts, *, num_samples=1, seed):
        self.seeds.append(seed)
        count = len(prompts) * num_samples
        return [Completion([9] * (i % 5) + [1], True) for i in range(count)]


def collect(trainer, prompts, seed=(0, 1), **options):
    dataset = trainer.train_dataset
    return trainer.collector.collect(prompts, dataset.columns, seed, **({"kl_coef": 0.1, "moments": None} | options))


def test_the_batch_of_an_update(kit):
    trainer = kit.ppo(sampler=Scripted(), num_generations=2, micro_batch_tokens=16)
    prompts = PromptBatch.collate([trainer.train_dataset[i] for i in range(4)])
    batch, experience = collect(trainer, prompts)
    assert batch["lengths"].tolist() == [len(prompts.prompt_ids[i // 2]) + i % 5 + 1 for i in range(8)]
    n = sum(i % 5 + 1 for i in range(8))
    for name in ("old_logps", "ref_logps", "old_values", "advantages", "returns"):
        assert batch[name].shape == (n,), name
        assert batch[name].dtype == torch.float32
    policy, critic = trainer.actor_critic.policy.eval(), trainer.actor_critic.critic.eval()
    start = 0
    for i in range(8):
        ids = torch.tensor([prompts.prompt_ids[i // 2] + [9] * (i % 5) + [1]])
        count = i % 5 + 1
        assert batch["input_ids"][i, : ids.shape[1]].tolist() == ids[0].tolist()
        with torch.no_grad():
            logps = policy(ids).logits[0, -count - 1 : -1].log_softmax(-1).gather(1, ids[0, -count:, None])[:, 0]
            values = critic.score(critic.model(ids).last_hidden_state)[0, -count - 1 : -1, 0]
        torch.testing.assert_close(batch["old_logps"][start : start + count], logps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch["old_values"][start : start + count], values, rtol=1e-4, atol=1e-4)
        assert batch["targets"].flatten()[batch["rows"][start : start + count]].tolist() == ids[0, -count:].tolist()
        start += count
    assert torch.equal(batch["old_logps"], batch["ref_logps"])
    assert "sampling/sampling_logp_difference/mean" not in experience.metrics  # this sampler tells no log-probs


def test_log_probs_are_those_of_the_temperature(kit):
    trainer = kit.ppo(sampler=None, temperature=0.5)
    prompts = PromptBatch.collate([trainer.train_dataset[i] for i in range(4)])
    _, experience = collect(trainer, prompts)
    gap = experience.metrics["sampling/sampling_logp_difference/max"]
    assert float(gap.value) < 1e-4  # what the sampler drew from, and what is recomputed


def test_a_phase_has_seeds_of_its_own(kit):
    sampler = Scripted()
    trainer = kit.ppo(sampler=sampler, evaluation=kit.prompts(3, seed=5), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(set(sampler.seeds)) == 4  # three phases; the evaluations share one, to be comparable
    again = Scripted()
    kit.ppo(sampler=again, evaluation=kit.prompts(3, seed=5), eval_strategy="steps", eval_steps=1).train()
    assert again.seeds == sampler.seeds
    other = kit.ppo(sampler=Scripted(), seed=1)
    other.train()
    assert not set(other.collector.sampler.seeds) & set(sampler.seeds)


def test_seeds_of_processes_differ(kit):
    found = set()
    for process in range(3):
        trainer = kit.ppo(sampler=Scripted())
        trainer.collector.process_index = process
        collect(trainer, PromptBatch([[3, 4]], [0]))
        found |= set(trainer.collector.sampler.seeds)
    assert len(found) == 3


def test_rewards_see_the_columns_of_their_rows(kit):
    """From a list of rows, and from a Dataset that is tokenised already."""
    seen = []

    def reward(completions, reference_answer, hint, prompts):
        seen.append((reference_answer, hint, prompts))
        return [0.0] * len(completions)

    rows = [{"prompt": f"w{3 + i} w9", "completion": f" w{20 + i}", "hint": i} for i in range(8)]
    tokenised = Dataset.from_list(
        [{"prompt_ids": [3 + i, 9], "reference_answer": f" w{20 + i}", "hint": i} for i in range(8)]
    )
    for train in (rows, tokenised):
        trainer = kit.ppo(reward=reward, train=train, num_generations=2, max_steps=2, evaluation=train)
        trainer.train()
        trainer.evaluate()
        for answers, hints, prompts in seen:
            assert [text.split()[0] for text in prompts] == [f"w{3 + hint}" for hint in hints]
            assert answers == [f" w{20 + hint}" for hint in hints]
        assert sorted(hint for _, hints, _ in seen[:2] for hint in hints) == sorted(list(range(8)) * 2)
        seen.clear()


def test_conversations_go_through_the_template(kit):
    """The policy's own for what it is given; rewards get the messages."""
    seen = []

    def reward(prompts, completions, prompt_ids):
        seen.append((prompts, prompt_ids))
        return [0.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": f"w{3 + i} w9"}]} for i in range(8)]
    trainer = kit.ppo(reward=reward, train=rows, max_steps=1)
    trainer.train()
    ((prompts, ids),) = seen
    for messages, tokens in zip(prompts, ids, strict=True):
        assert messages[0]["role"] == "user"
        assert tokens == [int(messages[0]["content"].split()[0][1:]), 9, 1]  # the template ends a message with <eos>


def test_workers_of_a_loader_need_no_columns(kit):
    """A reader of columns may hold what cannot be pickled."""
    dataset = PromptSet(Dataset.from_list([{"prompt_ids": [1, 2], "row": 5}]), lambda rows: {"a": list(rows)})
    assert dataset.columns([5]) == {"a": [5]}
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0] == dataset[0] == {"prompt_ids": [1, 2], "row": 5}
    with pytest.raises(ValueError, match="not in a worker"):
        copy.columns([5])
    seen = []

    def reward(reference_answer):
        seen.extend(reference_answer)
        return [0.0] * len(reference_answer)

    rows = [{"prompt": f"w{3 + i} w9", "completion": f" w{20 + i}"} for i in range(8)]
    kit.ppo(reward=reward, train=rows, dataloader_num_workers=2, max_steps=1).train()
    assert sorted(seen) == sorted(row["completion"] for row in rows)


def test_several_rewards_are_logged_apart(kit):
    def likes(completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    def sometimes(completion_ids):
        return [2.0 if i == 0 else None for i in range(len(completion_ids))]

    def never(completion_ids):
        return [None] * len(completion_ids)

    trainer = kit.ppo(
        reward=[likes, sometimes, never, likes], reward_weights=[1.0, 10.0, 1.0, -0.5], sampler=Scripted(), max_steps=2
    )
    trainer.train()
    for log in kit.logs(trainer):
        lengths = np.array([i % 5 + 1 for i in range(8)])
        assert log["rewards/likes/mean"] == log["rewards/likes_2/mean"] == pytest.approx(lengths.mean())
        assert log["rewards/likes/std"] == pytest.approx(lengths.std(), rel=1e-5)
        assert (log["rewards/sometimes/mean"], log["rewards/sometimes/std"]) == (2.0, 0.0)
        assert log["objective/scores"] == pytest.approx(0.5 * lengths.mean() + 20 / 8)
        assert "rewards/never/mean" in log  # nan: it applied nowhere
    assert np.isnan(log["rewards/never/mean"])


def test_moments_take_in_every_score_once(kit):
    trainer = kit.ppo(normalize_scores=True, evaluation=kit.prompts(4, seed=3), eval_strategy="steps", eval_steps=1)
    scores = []
    rewards = trainer.collector.rewards

    def spy(samples):
        found = rewards(samples)
        if len(samples) == 8:
            scores.extend(found[0].tolist())
        return found

    trainer.collector.rewards = spy
    trainer.train()
    assert float(trainer.run.moments.count) == 24
    assert float(trainer.run.moments.mean) == pytest.approx(np.mean(scores), rel=1e-5)
    assert float(trainer.run.moments.variance) == pytest.approx(np.var(scores, ddof=1), rel=1e-5)


def test_prompts_that_are_too_long(kit):
    rows = [{"prompt": "w3 w4 w5 w6"}, {"prompt": "w3"}, {"prompt": "w7 w8"}]
    trainer = kit.ppo(train=rows, max_length=2, max_steps=1)
    assert len(trainer.train_dataset) == 2
    assert trainer.data_reports["train"].dropped
    cut = kit.ppo(train=rows, max_length=2, on_long_prompt="truncate")
    assert cut.train_dataset[0]["prompt_ids"] == [5, 6]
    with pytest.raises(ValueError, match="row 0 of the tokenised data set has 4 tokens, max_length=2 is accepted"):
        kit.ppo(train=Dataset.from_list([{"prompt_ids": [3, 4, 5, 6]}]), max_length=2)
