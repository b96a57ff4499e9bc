from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fastalign.models.causal import is_fused
from fastalign.reference import ModelScorer
from fastalign.rollouts import Completion, SamplingOptions, TransformersSampler, sampler_gap, score_completions

GEMMA = {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}


def sample(model, prompts, num_samples=1, **changes):
    options = SamplingOptions(**{"max_new_tokens": 12, **changes})
    return TransformersSampler(model, (0, [2]), options).generate(prompts, num_samples=num_samples, seed=1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gpt2", {}), ("gemma2", GEMMA)])
def test_logps_and_entropies(tiny_model, make_prompts, naive_logps, kind, changes, temperature):
    model, prompts = tiny_model(kind, **changes), make_prompts(7)
    completions = sample(model, prompts, 2, temperature=temperature)
    scores = score_completions(
        model, prompts, completions, temperature=temperature, entropy=True, batch_tokens=90, backend="torch"
    )
    for index, (completion, found) in enumerate(zip(completions, scores, strict=True)):
        prompt = prompts[index // 2]
        expected = naive_logps(model, prompt, completion.ids, temperature)
        np.testing.assert_allclose(found.logps, expected, rtol=0, atol=2e-5)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        entropy = torch.distributions.Categorical(logits=logits.double() / temperature).entropy().numpy()
        np.testing.assert_allclose(found.entropy, entropy, rtol=0, atol=2e-5)
        assert found.entropy.dtype == found.logps.dtype == np.float32
    assert {found.entropy for found in score_completions(model, prompts, completions)} == {None}
    assert not is_fused(model)


def test_the_policy_comes_back_as_it_was(tiny_model, make_prompts):
    model, prompts = tiny_model(attention_dropout=0.5), make_prompts(5)
    completions = sample(model, prompts)
    expected = score_completions(model, prompts, completions)
    state = torch.get_rng_state()
    found = score_completions(model.train(), prompts, completions)
    assert all(np.array_equal(a.logps, b.logps) for a, b in zip(expected, found, strict=True))
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_active_adapters_count(tiny_model, make_prompts, check_logps):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model, prompts = get_peft_model(tiny_model(), config).train(), make_prompts(5)
    completions = sample(model, prompts)

    def scored(policy):
        rows = score_completions(policy, prompts, completions)
        pairs = zip(completions, rows, strict=True)
        return [Completion(completion.ids, completion.finished, row.logps) for completion, row in pairs]

    active = scored(model)
    assert model.training
    with model.disable_adapter():
        off = scored(model)
    check_logps(model.eval(), prompts, active)
    check_logps(tiny_model(), prompts, off)
    with pytest.raises(ValueError, match="adapter='default' and keep_adapters=True exclude each other"):
        ModelScorer(model, adapter="default", keep_adapters=True)
    prompt_tuned = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"adapter 'default' is PROMPT_TUNING, .* use LoRA"):
        score_completions(prompt_tuned, prompts, completions)


def test_counts_must_fit(tiny_model):
    model, done = tiny_model(), Completion([3, 4], True)
    assert score_completions(model, [], []) == []
    for prompts, completions in (([[5], [6]], [done] * 3), ([[5]], []), ([], [done])):
        message = f"{len(completions)} completions do not divide among {len(prompts)} prompts"
        with pytest.raises(ValueError, match=message):
            score_completions(model, prompts, completions)
    with pytest.raises(ValueError, match="completion 1 is empty"):
        score_completions(model, [[5], [6]], [done, Completion([], False)])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        score_completions(model, [[5], []], [done, done])
    with pytest.raises(ValueError, match="token id 31 is outside the model's vocabulary of 31"):
        score_completions(model, [[5]], [Completion([31], False)])


def test_gap_by_hand():
    own = [Completion([3, 4], True, np.log([0.5, 0.2])), Completion([5], False, np.log([0.1]))]
    gap = sampler_gap(own, [np.log([0.25, 0.2]), np.log([0.3])])
    assert gap == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": (math.log(2) + 0 + math.log(3)) / 3,
            "sampling/sampling_logp_difference/max": math.log(3),
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/importance_sampling_ratio/mean": (0.5 + 1 + 3) / 3,
            "sampling/importance_sampling_ratio/max": 3.0,
        }
    )


def test_gap_of_another_policy_shows(tiny_model, make_prompts):
    prompts = make_prompts(6)
    completions = sample(tiny_model(), prompts)
    for model, least, most in ((tiny_model(), 0.0, 1e-4), (tiny_model(seed=1), 1.0, 100.0)):
        gap = sampler_gap(completions, [row.logps for row in score_completions(model, prompts, completions)])
        assert least <= gap["sampling/sampling_logp_difference/max"] <= most


def test_gaps_that_cannot_be_had():
    done = Completion([3, 4], True, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="expected log-probs of each completion, got 1 for 2 completions"):
        sampler_gap([done, done], [np.zeros(2)])
    with pytest.raises(ValueError, match="got 0 for 0"):
        sampler_gap([], [])
    with pytest.raises(ValueError, match="completion 1 has no log-probs of its sampler"):
        sampler_gap([done, Completion([3], True)], [np.zeros(2), np.zeros(1)])
    with pytest.raises(ValueError, match=r"completion 0: \(2,\) log-probs of the sampler, \(3,\) recomputed"):
        sampler_gap([done], [np.zeros(3)])
