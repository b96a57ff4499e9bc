from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from fastalign.models import fuse_head
from fastalign.models.causal import is_fused
from fastalign.rollouts import SamplingOptions, TransformersSampler, sampler_gap, score_completions

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "granite": {"logits_scaling": 0.5},
}
SPECIAL = (0, [2])


def options(**changes):
    return SamplingOptions(**{"max_new_tokens": 12, **changes})


@pytest.mark.parametrize("kind", FAMILIES)
def test_logps_are_those_of_each_sequence_alone(tiny_model, make_prompts, check_logps, kind):
    model, prompts = tiny_model(kind, **FAMILIES[kind]), make_prompts(9)
    sampler = TransformersSampler(model, SPECIAL, options(temperature=0.8))
    check_logps(model, prompts, sampler.generate(prompts, seed=1), temperature=0.8)


@pytest.mark.parametrize("kind", FAMILIES)
def test_batched_is_one_at_a_time(tiny_model, make_prompts, kind):
    """The likeliest token each time, so that no random number decides: padding and positions alone could."""
    model, prompts = tiny_model(kind, **FAMILIES[kind]), make_prompts(9)
    together = TransformersSampler(model, SPECIAL, options(top_k=1))
    alone = TransformersSampler(model, SPECIAL, options(top_k=1), batch_size=1)
    found = [completion.ids for completion in together.generate(prompts, seed=1)]
    assert found == [completion.ids for completion in alone.generate(prompts, seed=2)]
    assert len({tuple(ids) for ids in found}) > 4


class Tokenizer:
    pad_token_id, eos_token_id = 0, 5


@pytest.mark.parametrize("eos", [None, 2, [2, 9]])
def test_stop_tokens_come_from_everywhere(tiny_model, make_prompts, eos):
    model, prompts = tiny_model(scale=0.05), make_prompts(20)
    model.generation_config.eos_token_id = eos
    sampler = TransformersSampler(model, Tokenizer(), options(max_new_tokens=25, stop_token_ids=(11, 12)))
    stops = {5, 11, 12} | set(np.atleast_1d(eos if eos is not None else []).tolist())
    assert sampler.stop_ids(model) == stops
    completions = sampler.generate(prompts, num_samples=4, seed=1)
    for completion in completions:
        assert not stops & set(completion.ids[:-1])
        assert completion.finished == (completion.ids[-1] in stops)
        assert completion.finished or len(completion.ids) == 25
        assert len(completion.logps) == len(completion.ids)
    assert {completion.ids[-1] for completion in completions if completion.finished} == stops
    assert any(not completion.finished for completion in completions)


def test_the_stop_token_may_be_the_padding(tiny_model, make_prompts, check_logps):
    model, prompts = tiny_model(scale=0.05), make_prompts(12)
    completions = TransformersSampler(model, (2, [2]), options(max_new_tokens=25)).generate(prompts, seed=4)
    assert {completion.finished for completion in completions} == {True, False}
    assert all(completion.ids.count(2) == completion.finished for completion in completions)
    check_logps(model, prompts, completions)


def test_nothing_stops_without_stop_tokens(tiny_model, make_prompts):
    model = tiny_model()
    model.generation_config.eos_token_id = None
    completions = TransformersSampler(model, (None, []), options()).generate(make_prompts(6), seed=1)
    assert {len(completion.ids) for completion in completions} == {12}
    assert not any(completion.finished for completion in completions)


def test_no_prompts(tiny_model):
    assert TransformersSampler(tiny_model(), SPECIAL, options()).generate([], num_samples=3, seed=1) == []


def test_samples_are_prompt_major(tiny_model, make_prompts, check_logps):
    model, prompts = tiny_model(scale=0.1), make_prompts(7)
    completions = TransformersSampler(model, SPECIAL, options(), batch_tokens=150).generate(
        prompts, num_samples=3, seed=1
    )
    check_logps(model, prompts, completions, num_samples=3)
    assert all(a.ids != b.ids for a, b in pairwise(completions))


def test_batches_keep_to_their_budget(tiny_model, make_prompts, monkeypatch):
    model, prompts = tiny_model(), make_prompts(20)
    shapes, generate = [], model.generate

    def watched(**arguments):
        shapes.append(arguments["input_ids"].shape)
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watched)
    TransformersSampler(model, SPECIAL, options(), batch_tokens=120, batch_size=3).generate(prompts, seed=1)
    assert sum(rows for rows, _ in shapes) == 20
    assert all(rows <= 3 and rows * (width + 12) <= 120 for rows, width in shapes)
    assert {rows for rows, _ in shapes[:-1]} == {2, 3}


def test_the_cache_is_used_whatever_the_config_says(tiny_model, make_prompts):
    model = tiny_model(use_cache=False, eos_token_id=None).train()
    model.gradient_checkpointing_enable()
    widths = []
    handle = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    TransformersSampler(model, (0, []), options()).generate(make_prompts(4), seed=1)
    handle.remove()
    assert widths == [30] + [1] * 11
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing


def test_a_seed_decides_and_nothing_else_is_touched(tiny_model, make_prompts, check_logps):
    model, prompts = tiny_model("gpt2", scale=0.1, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), make_prompts(8)
    model.train()
    model.transformer.h[1].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    sampler = TransformersSampler(model, SPECIAL, options())
    one, same, other = (sampler.generate(prompts, num_samples=2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert [completion.ids for completion in one] == [completion.ids for completion in same]
    assert all(np.array_equal(a.logps, b.logps) for a, b in zip(one, same, strict=True))
    assert [completion.ids for completion in one] != [completion.ids for completion in other]
    check_logps(model.eval(), prompts, one, num_samples=2)  # no dropout


def test_everything_is_restored_after_an_error(tiny_model, make_prompts):
    model = tiny_model().train()
    own, state = model.generation_config, torch.get_rng_state()

    def broken(part, args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        TransformersSampler(model, SPECIAL, options()).generate(make_prompts(3), seed=1)
    handle.remove()
    assert model.generation_config is own
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_models_and_functions_that_give_one(tiny_model, make_prompts):
    model, prompts = tiny_model(), make_prompts(6)
    expected = [
        completion.ids for completion in TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    ]
    given = []

    def policy():
        given.append(1)
        return fuse_head(model)

    sampler = TransformersSampler(policy, SPECIAL, options())
    assert not given
    completions = sampler.generate(prompts, seed=1)
    assert [completion.ids for completion in completions] == expected
    assert is_fused(model)
    sampler.sync(model)
    gap = sampler_gap(completions, [scores.logps for scores in score_completions(model, prompts, completions)])
    assert gap["sampling/sampling_logp_difference/max"] < 1e-4


def test_adapters(tiny_model, make_prompts, check_logps):
    prompts = make_prompts(6)
    base = [c.ids for c in TransformersSampler(tiny_model(), SPECIAL, options()).generate(prompts, seed=1)]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(tiny_model(), config).train()
    sampler = TransformersSampler(model, SPECIAL, options())
    completions = sampler.generate(prompts, seed=1)
    assert [completion.ids for completion in completions] != base
    with model.disable_adapter():
        assert [completion.ids for completion in sampler.generate(prompts, seed=1)] == base
    check_logps(model.eval(), prompts, completions)
    prompt_tuned = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="adapter 'default' is PROMPT_TUNING"):
        TransformersSampler(prompt_tuned, SPECIAL, options()).generate(prompts, seed=1)


def test_autocast_is_the_one_asked_for(tiny_model, make_prompts):
    model, prompts = tiny_model(), make_prompts(6)
    plain = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    with torch.autocast("cpu", torch.bfloat16):  # a trainer's own must not leak in
        again = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    assert all(np.array_equal(a.logps, b.logps) for a, b in zip(plain, again, strict=True))
    half = TransformersSampler(model, SPECIAL, options(), autocast=torch.bfloat16).generate(prompts, seed=1)
    scores = score_completions(model, prompts, half, autocast=torch.bfloat16)
    near = sampler_gap(half, [row.logps for row in scores])["sampling/sampling_logp_difference/mean"]
    far = sampler_gap(half, [row.logps for row in score_completions(model, prompts, half)])
    assert 1e-5 < near < 0.1
    assert far["sampling/sampling_logp_difference/mean"] > 1e-3


@pytest.mark.parametrize("pad", [None, 0, 30, 31, 10**9])
def test_padding_is_never_seen(tiny_model, make_prompts, pad):
    model, prompts = tiny_model(), make_prompts(6)
    model.generation_config.pad_token_id = None
    expected = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    found = TransformersSampler(model, (pad, [2]), options()).generate(prompts, seed=1)
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[3], [4, 31]], {}, "prompt 1: token id 31 is outside the model's vocabulary of 31"),
        ([[-1, 40]], {}, "prompt 0: token id -1 is outside the model's vocabulary of 31"),
        ([[3]], {"stop_token_ids": (31,)}, r"stop_token_ids \(31,\) are not all below the vocabulary's 31"),
        ([[3] * 117], {}, r"prompt 0: 117 tokens and max_new_tokens=12 are more than the 128 positions of GPT2"),
    ],
)
def test_what_a_model_does_not_have(tiny_model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        TransformersSampler(tiny_model("gpt2"), SPECIAL, options(**settings)).generate(prompts, seed=1)


def test_the_last_position_is_used_and_rope_has_none(tiny_model):
    completions = TransformersSampler(tiny_model("gpt2", eos_token_id=None), (0, []), options()).generate(
        [[3] * 116], seed=1
    )
    assert len(completions[0].ids) == 12
    TransformersSampler(tiny_model(max_position_embeddings=8), (0, []), options()).generate([[3] * 9], seed=1)


def test_arguments_that_make_no_sense(tiny_model):
    with pytest.raises(ValueError, match="batch_tokens and batch_size must be positive, got 0 and None"):
        TransformersSampler(tiny_model(), SPECIAL, options(), batch_tokens=0)
    with pytest.raises(ValueError, match="expected a transformers causal language model"):
        TransformersSampler(nn.Linear(2, 2), SPECIAL, options()).generate([[3]], seed=1)


def test_a_real_checkpoint(shared_dir, check_logps):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_dir / "models" / "hh-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Human: What is two plus two? Assistant:", "Human: Hello", "Human: " + "one two three " * 20]
    prompts = tokenizer(texts)["input_ids"]
    sampler = TransformersSampler(model, tokenizer, options(max_new_tokens=24, temperature=0.7))
    assert tokenizer.eos_token_id in sampler.stop_ids(model)
    completions = sampler.generate(prompts, num_samples=2, seed=1)
    check_logps(model, prompts, completions, num_samples=2, temperature=0.7)
    scores = score_completions(model, prompts, completions, temperature=0.7)
    gap = sampler_gap(completions, [row.logps for row in scores])
    assert gap["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("continuous_batching", [False, True])
def test_on_a_gpu(tiny_model, make_prompts, continuous_batching):
    model, prompts = tiny_model().to("cuda"), make_prompts(9)
    state = torch.cuda.get_rng_state()
    sampler = TransformersSampler(model, SPECIAL, options(), continuous_batching=continuous_batching)
    one, same = (sampler.generate(prompts, num_samples=2, seed=1) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [completion.ids for completion in one] == [completion.ids for completion in same]
    scores = score_completions(model, prompts, one)
    gap = sampler_gap(one, [row.logps for row in scores])
    assert gap["sampling/sampling_logp_difference/max"] < 2e-2
