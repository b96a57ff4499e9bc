from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from fastalign.rollouts import SamplingOptions, TransformersSampler
from fastalign.rollouts import transformers_sampler as module
from fastalign.rollouts.generation import SampledLogps, ignored_settings

SPECIAL = (0, [2])


def options(**changes):
    return SamplingOptions(**{"max_new_tokens": 12, **changes})


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of a larger statistic, cells with an expectation below 5 taken together."""
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts.double(), expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def cut(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Probabilities with everything off beyond the k likeliest, and the smallest set that holds p."""
    p, order = logits.softmax(0).sort(descending=True)
    if top_k:
        p[top_k:] = 0
        p = p / p.sum()
    p[(p.cumsum(0) - p) >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 7}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}],
    ids=str,
)
def test_frequencies_are_those_of_the_softmax(tiny_model, next_logits, settings):
    """First tokens, and second ones after the commonest first: the padded prompt and the cache."""
    model = tiny_model(scale=0.1, eos_token_id=None)
    prompts, n = [[5, 6, 7], [8] * 20], 3000
    temperature, cuts = settings.get("temperature", 1.0), {k: v for k, v in settings.items() if k != "temperature"}
    sampler = TransformersSampler(model, (0, []), options(max_new_tokens=2, **settings), batch_tokens=10**6)
    completions = sampler.generate(prompts, num_samples=n, seed=3)
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([completion.ids for completion in completions[index * n : (index + 1) * n]])
        first = cut(next_logits(model, prompt) / temperature, **cuts)
        assert chi_square_p(ids[:, 0].bincount(minlength=31), first * n) > 1e-3
        common = int(first.argmax())
        seconds = ids[ids[:, 0] == common, 1]
        second = cut(next_logits(model, [*prompt, common]) / temperature, **cuts)
        assert chi_square_p(seconds.bincount(minlength=31), second * len(seconds)) > 1e-3
        for completion in completions[index * n : index * n + 50]:  # and the sampler says what it drew from
            np.testing.assert_allclose(completion.logps[0], float(first[completion.ids[0]].log()), rtol=0, atol=1e-4)


def test_the_chi_square_test_can_fail(tiny_model, next_logits):
    model, n = tiny_model(), 3000
    sampler = TransformersSampler(model, (0, []), options(max_new_tokens=1, temperature=0.75))
    ids = torch.tensor([completion.ids[0] for completion in sampler.generate([[5, 6, 7]], num_samples=n, seed=3)])
    assert chi_square_p(ids.bincount(minlength=31), next_logits(model, [5, 6, 7]).softmax(0) * n) < 1e-6


def test_no_stop_token_before_min_new_tokens(tiny_model, make_prompts, next_logits):
    model, prompts = tiny_model(scale=0.02), make_prompts(12)
    sampler = TransformersSampler(model, (0, [2, 3, 4, 5, 6]), options(min_new_tokens=6))
    completions = sampler.generate(prompts, num_samples=3, seed=1)
    assert min(len(completion.ids) for completion in completions) == 7  # the stop token comes after them
    logits = next_logits(model, prompts[0])
    logits[2:7] = -torch.inf
    expected = float(logits.log_softmax(0)[completions[0].ids[0]])
    assert completions[0].logps[0] == pytest.approx(expected, abs=1e-4)


TRAPS = {
    "temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.1, "repetition_penalty": 100.0,
    "no_repeat_ngram_size": 1, "bad_words_ids": [[7], [8, 9]], "forced_bos_token_id": 4, "forced_eos_token_id": 6,
    "suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [10], "renormalize_logits": True, "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5, "sequence_bias": [[[12], 50.0]], "exponential_decay_length_penalty": [1, 5.0],
    "min_length": 100, "min_new_tokens": 11, "num_beams": 3, "guidance_scale": 3.0, "top_h": 0.1,
    "invented_yesterday": 7,
}  # fmt: skip


def test_the_models_own_settings_are_ignored_and_named_once(tiny_model, make_prompts, check_logps, caplog):
    model, prompts = tiny_model(), make_prompts(8)
    expected = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    assert not caplog.records
    for name, value in TRAPS.items():
        setattr(model.generation_config, name, value)
    own, stored = model.generation_config, model.generation_config.to_dict()
    sampler = TransformersSampler(model, SPECIAL, options())
    for _ in range(2):
        completions = sampler.generate(prompts, seed=1)
        assert [completion.ids for completion in completions] == [completion.ids for completion in expected]
    check_logps(model, prompts, completions)
    (record,) = (record for record in caplog.records if record.name.startswith("fastalign"))
    named = {part.split("=")[0] for part in record.getMessage().split("ignored: ")[1].split(", ")}
    assert set(TRAPS) <= named
    assert "top_k=1" in record.getMessage()
    assert model.generation_config is own
    assert own.to_dict() == stored


def test_scores_of_one_step_are_held(tiny_model, make_prompts, monkeypatch):
    alive, most = [], []

    class Watched(module.SampledLogps):
        def __call__(self, input_ids, scores):
            alive.append(weakref.ref(scores))
            result = super().__call__(input_ids, scores)
            most.append(sum(reference() is not None for reference in alive))
            return result

    monkeypatch.setattr(module, "SampledLogps", Watched)
    TransformersSampler(tiny_model(eos_token_id=None), (0, []), options()).generate(make_prompts(4), seed=1)
    assert len(most) == 12
    assert max(most) == 2  # the last step's, which transformers names until the new ones are there, and the new ones
    assert not any(reference() is not None for reference in alive)


def test_what_is_ignored():
    assert ignored_settings(GenerationConfig()) == {}
    harmless = {"eos_token_id": [1, 2], "pad_token_id": 0, "max_length": 99, "do_sample": True, "use_cache": False}
    harmless |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.0}
    assert ignored_settings(GenerationConfig(**harmless)) == {}
    assert ignored_settings(GenerationConfig(do_sample=True, top_k=50, min_p=0.1)) == {"top_k": 50, "min_p": 0.1}


def test_how_tokens_are_computed_is_taken_over(tiny_model, make_prompts, check_logps):
    """A static cache, say: the same tokens, otherwise computed."""
    model, prompts = tiny_model(), make_prompts(6)
    expected = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    model.generation_config.cache_implementation = "static"
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda part, args, kwargs: seen.append(type(kwargs["past_key_values"]).__name__), with_kwargs=True
    )
    completions = TransformersSampler(model, SPECIAL, options()).generate(prompts, seed=1)
    handle.remove()
    assert set(seen) == {"StaticCache"}
    assert [completion.ids for completion in completions] == [completion.ids for completion in expected]
    check_logps(model, prompts, completions)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_distribution_that_is_none_is_drawn_from_all_the_same(bad):
    """A draw from it would end the process's use of a GPU; the token's log-prob says that it was none."""
    recorder, scores = SampledLogps(), torch.randn(3, 5)
    scores[1] = bad
    scores[1, 2] = torch.nan if bad is torch.nan else bad
    given = recorder(torch.zeros(3, 1, dtype=torch.int64), scores.clone())
    assert given.softmax(dim=1).isfinite().all()
    assert torch.equal(given[[0, 2]], scores[[0, 2]])
    tokens = torch.multinomial(given.softmax(dim=1), 1)
    logps = recorder.finish(tokens)[:, 0]
    assert logps.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(logps[0], scores[0].log_softmax(0)[tokens[0, 0]])
