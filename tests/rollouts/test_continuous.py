from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig

from fastalign.models import fuse_head
from fastalign.rollouts import SamplingOptions, TransformersSampler

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None, "sliding_window": 6},
}
TIGHT = ContinuousBatchingConfig(page_size=16, num_blocks=7, max_batch_tokens=24)


def sampler(model, continuous_batching=True, stops=(2,), **changes):
    options = SamplingOptions(**{"max_new_tokens": 12, **changes})
    return TransformersSampler(model, (0, stops), options, continuous_batching=continuous_batching)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("continuous_batching", [True, TIGHT], ids=["roomy", "tight"])
def test_logps_are_those_of_each_sequence_alone(tiny_model, make_prompts, check_logps, kind, continuous_batching):
    """In a tight cache too, where prompts are split and requests evicted."""
    model, prompts = tiny_model(kind, **FAMILIES[kind]), make_prompts(9)
    attention = model.config._attn_implementation
    completions = sampler(model, continuous_batching, temperature=0.8).generate(prompts, num_samples=2, seed=1)
    check_logps(model, prompts, completions, num_samples=2, temperature=0.8)
    assert model.config._attn_implementation == attention


def test_the_likeliest_tokens_are_those_of_padded_batches(tiny_model, make_prompts):
    model, prompts = tiny_model(), make_prompts(9)
    expected = [completion.ids for completion in sampler(model, False, top_k=1).generate(prompts, seed=1)]
    assert [completion.ids for completion in sampler(model, top_k=1).generate(prompts, seed=2)] == expected


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 8, "top_p": 0.9}], ids=str)
def test_frequencies_are_those_of_padded_batches(tiny_model, settings):
    """Of the first tokens, and of the second ones: two samples from one distribution, by their chi-square distance."""
    model, n = tiny_model(scale=0.1, eos_token_id=None), 800
    one, other = (
        sampler(model, way, stops=(), max_new_tokens=2, **settings).generate([[5, 6, 7]], num_samples=n, seed=3)
        for way in (True, False)
    )
    for position in range(2):
        a, b = (
            torch.tensor([completion.ids[position] for completion in found]).bincount(minlength=31)
            for found in (one, other)
        )
        common = (a + b) >= 10
        a, b = (torch.cat([x[common], x[~common].sum().view(1)]).double() for x in (a, b))
        statistic = ((a - b) ** 2 / (a + b).clamp(min=1)).sum()
        assert torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), statistic / 2) > 1e-3


def test_a_seed_decides_and_nothing_else_is_touched(tiny_model, make_prompts):
    model, prompts = tiny_model(attn_implementation="eager").train(), make_prompts(8)
    model.model.layers[1].eval()
    modes, own, state = [part.training for part in model.modules()], model.generation_config, torch.get_rng_state()
    one, same, other = (sampler(model).generate(prompts, num_samples=2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert model.generation_config is own
    assert model.config._attn_implementation == "eager"
    assert [completion.ids for completion in one] == [completion.ids for completion in same]
    assert [completion.ids for completion in one] != [completion.ids for completion in other]


def test_stop_tokens_and_cuts(tiny_model, make_prompts):
    model = tiny_model(scale=0.05, eos_token_id=None)
    completions = sampler(model, stops=(2, 3, 4), max_new_tokens=9).generate(make_prompts(12), num_samples=3, seed=1)
    for completion in completions:
        assert not {2, 3, 4} & set(completion.ids[:-1])
        assert completion.finished == (completion.ids[-1] in (2, 3, 4))
        assert completion.finished or len(completion.ids) == 9
        assert len(completion.logps) == len(completion.ids)
    assert {completion.finished for completion in completions} == {True, False}
    endless = sampler(model, stops=()).generate([[5], [6, 7]], seed=1)
    assert [(len(completion.ids), completion.finished) for completion in endless] == [(12, False)] * 2


def test_the_callers_settings_stay_the_callers(tiny_model):
    given = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, seed=5)
    sampler(tiny_model(), given).generate([[5, 6]], seed=1)
    assert given == ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, seed=5)


def test_adapters_and_fused_heads(tiny_model, make_prompts, check_logps):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, prompts = fuse_head(get_peft_model(tiny_model(), config)), make_prompts(5)
    check_logps(model.eval(), prompts, sampler(model).generate(prompts, seed=1))


def test_a_failure_is_one(tiny_model, make_prompts):
    model = tiny_model().train()
    own, state, threads = model.generation_config, torch.get_rng_state(), threading.active_count()
    calls = []

    def broken(part, args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="continuous batching"):
        sampler(model, stops=()).generate(make_prompts(3), seed=1)
    handle.remove()
    assert model.generation_config is own
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads
    assert len(sampler(model).generate(make_prompts(3), seed=1)) == 3


def test_what_it_cannot_do_is_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"cannot be used: transformers applies no min_new_tokens there.*=False"):
        sampler(model, min_new_tokens=2).generate([[3]], seed=1)
    half = TransformersSampler(
        model, (0, [2]), SamplingOptions(max_new_tokens=3), continuous_batching=True, autocast=torch.bfloat16
    )
    with pytest.raises(ValueError, match=r"autocast=torch\.bfloat16 does not reach"):
        half.generate([[3]], seed=1)
    with pytest.raises(ValueError, match=r"ignores attn_logit_softcapping=50\.0: load the model with flash"):
        sampler(tiny_model("gemma2")).generate([[3]], seed=1)
    model._cached_continuous_batching_manager = object()
    with pytest.raises(ValueError, match="the model keeps a manager with settings of its own"):
        sampler(model).generate([[3]], seed=1)
