"""Warnings of a run, each provoked, with its number."""

import logging
import re

import pytest
import torch
from peft import LoraConfig

from fastalign.rollouts import Completion, SamplingOptions
from fastalign.trainers.ppo_checks import Warner, phase_warnings

CALM = {"objective/kl": 1.0, "objective/kl_k3": 1.1, "val/first_approxkl": 1e-9, "completions/clipped_ratio": 0.9}
SETTINGS = {"target_kl": None, "narrow": False, "completions": 8}


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("values", "settings", "text"),
    [
        ({"objective/kl_k3": -0.01}, {}, "objective/kl_k3 is -0.01: the k3 estimate of a KL cannot be negative"),
        ({"objective/kl": -4.0}, {}, "objective/kl is -4 nats per completion: a KL is not negative"),
        ({"objective/kl": 60.0}, {}, "objective/kl is 60 nats per completion, with no target"),
        ({"objective/kl": 6.0}, {"target_kl": 1.0}, "6 nats per completion, with a target of 1: the policy has left"),
        ({"objective/kl": float("nan")}, {}, "objective/kl is nan nats"),
        ({"val/first_approxkl": 2e-4}, {}, r"the ratio is 0.02 off 1 \(root mean square over tokens\)"),
        ({"val/first_approxkl": 0.02}, {"narrow": True}, "the ratio is 0.2 off 1"),
        ({"val/first_approxkl": float("nan")}, {}, "the ratio is nan off 1"),
        ({"sampling/sampling_logp_difference/mean": 0.05}, {}, "log-probs are 0.05 nats a token off the trainer's"),
        ({"completions/clipped_ratio": 1.0}, {}, "all 8 completions of a phase ran into response_length"),
    ],
    ids=str,
)
def test_each_warning_has_its_number(values, settings, text):
    assert phase_warnings(CALM, **SETTINGS) == {}
    (found,) = phase_warnings(CALM | values, **(SETTINGS | settings)).values()
    assert re.search(text, found)


def test_rounding_and_noise_are_no_warning():
    assert phase_warnings(CALM | {"val/first_approxkl": 1e-3}, **(SETTINGS | {"narrow": True})) == {}
    assert phase_warnings(CALM | {"objective/kl": -0.5, "objective/kl_k3": 0.4}, **SETTINGS) == {}
    assert phase_warnings(CALM | {"objective/kl": 4.0}, **(SETTINGS | {"target_kl": 1.0})) == {}
    gap = CALM | {"sampling/sampling_logp_difference/mean": 0.05}
    assert phase_warnings(gap, **(SETTINGS | {"narrow": True})) == phase_warnings(gap, **SETTINGS, corrected=True) == {}
    one = SETTINGS | {"completions": 1}
    assert phase_warnings({"completions/clipped_ratio": 1.0, "objective/kl": -4.0}, **one) == {}


def test_a_warning_is_said_when_it_appears_and_when_it_comes_back(caplog):
    warn = Warner()
    for step, found in enumerate([{"a": "A 1"}, {"a": "A 2", "b": "B"}, {"b": "B"}, {"a": "A 3"}]):
        warn(found, step)
    assert warned(caplog) == ["step 0: A 1", "step 1: B", "step 3: A 3"]


def test_dropout_that_was_left_on(kit, caplog):
    """The mean ratio does not show it: its expectation is 1 whatever the policy."""
    config = LoraConfig(r=8, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    trainer = kit.ppo(kit.model(), peft_config=config, learning_rate=0.05)
    trainer.train()
    assert any("off 1 (root mean square over tokens) at the first mini-batch" in text for text in warned(caplog))
    caplog.clear()
    kit.ppo(kit.model(attention_dropout=0.5), disable_dropout=False, max_steps=1).train()
    assert any("step 1: the ratio is" in text for text in warned(caplog))


def test_a_policy_that_runs_away(kit, caplog):
    trainer = kit.ppo(kit.model(), learning_rate=1.0, optim="sgd", max_grad_norm=0.0, kl_coef=0.05, target_kl=0.01,
                      kl_controller="adaptive", kl_horizon=100)  # fmt: skip
    trainer.train()
    kl = kit.logs(trainer)[1]["objective/kl"]
    assert f"step 2: objective/kl is {kl:.3g} nats per completion, with a target of 0.01" in "\n".join(warned(caplog))


class Foreign:
    """Samples that are not the policy's: each token is the one that it finds the least likely."""

    def __init__(self, policy):
        self.policy, self.options = policy, SamplingOptions(max_new_tokens=6)

    def sync(self, model):
        pass

    @torch.no_grad()
    def generate(self, prompts, *, num_samples=1, seed):
        found = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(self.policy(torch.tensor([ids])).logits[0, -1].argmin()))
            found.append(Completion(ids[len(prompt) :], False))
        return found


def test_samples_of_another_policy_have_a_negative_kl(kit, caplog):
    policy = kit.model()
    trainer = kit.ppo(policy, sampler=Foreign(policy), ref_model=kit.model(seed=5), max_steps=1)
    trainer.train()
    kl = kit.logs(trainer)[0]["objective/kl"]
    assert kl < -1
    text = "\n".join(warned(caplog))
    assert f"step 1: objective/kl is {kl:.3g} nats per completion: a KL is not negative" in text
    assert "step 1: all 8 completions of a phase ran into response_length" in text


def test_warnings_do_not_wait_for_a_log_line(kit, caplog):
    trainer = kit.ppo(kit.model(attention_dropout=0.5), disable_dropout=False, logging_strategy="no", max_steps=1)
    trainer.train()
    assert any("the ratio is" in text for text in warned(caplog))
