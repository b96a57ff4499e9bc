"""TRPO end to end on a tiny Llama: sampled completions, an outcome reward, the KL bound held at every step."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

from fastalign.losses import ppo_loss
from fastalign.trainers.fisher import categorical_kl, check_double_backward
from fastalign.trainers.trpo import trpo_step

torch.set_num_threads(1)


def tiny_llama():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


class Rollout:
    """128 completions of 6 tokens after prompts of 4, sampled from the model; the reward counts tokens below 8."""

    def __init__(self, model, seed):
        self.model = model
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(23, (128, 4), generator=g)
        with torch.no_grad():
            for _ in range(6):
                p = model(input_ids=self.ids).logits[:, -1].softmax(-1)
                self.ids = torch.cat([self.ids, torch.multinomial(p, 1, generator=g)], 1)
            self.old = self.logits().log_softmax(-1)
        rewards = (self.ids[:, 4:] < 8).float().sum(1)
        self.advantages = (rewards - rewards.mean())[:, None].expand(128, 6)
        self.mean_reward = float(rewards.mean())

    def logits(self, rows=slice(None)):
        return self.model(input_ids=self.ids[rows], use_cache=False).logits[:, 3:-1]

    def taken(self, log_probs, rows):
        return log_probs.gather(-1, self.ids[rows, 4:, None])[..., 0]

    def loss(self, rows=slice(None)):
        new = self.taken(self.logits(rows).log_softmax(-1), rows)
        return ppo_loss(
            new, self.taken(self.old[rows], rows), self.advantages[rows], epsilon_low=1.0, epsilon_high=math.inf,
            num_items=128 * 6,
        ).loss  # fmt: skip

    def kl(self, rows=slice(None)):
        return categorical_kl(self.old[rows], self.logits(rows), num_items=128 * 6)


def test_a_tiny_llama_end_to_end():
    model = tiny_llama()
    check_double_backward(model)
    means = []
    for seed in range(10):
        rollout = Rollout(model, seed)
        before = rollout.loss().item()
        result = trpo_step(model.parameters(), rollout.loss, rollout.kl, max_kl=0.05)
        means.append(rollout.mean_reward)
        assert result.accepted
        with torch.no_grad():
            assert before - rollout.loss().item() == pytest.approx(result.improvement, abs=1e-6)
            assert 0 < rollout.kl().item() <= 0.05
        assert result.improvement > 0
        assert result.cg_residual < 1
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 1  # of 6 tokens; 1.7 to 3.8


def test_a_tiny_llama_in_micro_batches():
    whole, split = tiny_llama(), tiny_llama()
    a, b = Rollout(whole, 0), Rollout(split, 0)
    first = trpo_step(whole.parameters(), a.loss, a.kl, max_kl=0.02, cg_iterations=3)
    parts = [slice(0, 5), slice(5, 128)]
    second = trpo_step(
        split.parameters(), [lambda r=r: b.loss(r) for r in parts], [lambda r=r: b.kl(r) for r in parts], max_kl=0.02,
        cg_iterations=3,
    )  # fmt: skip
    assert tuple(first) == pytest.approx(tuple(second), rel=1e-3, abs=1e-6)
    for mine, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
