"""Sequences that are scored together: in every layout the log-probs of each alone."""

import gzip
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.models import enable_segments
from fastalign.models.attention import uses_segments
from fastalign.reference import ReferenceCache, ReferenceModel, score
from fastalign.reference.batches import PromptNotes
from fastalign.reference.scoring import ModelScorer
from fastalign.reference.sequences import TokenSequence


@pytest.mark.parametrize("convert", [list, np.array], ids=["list", "array"])
def test_equal_prompts_have_equal_numbers(convert):
    sequences = [TokenSequence(convert(ids), start) for ids, start in (([1, 2, 3], 2), ([1, 2, 4, 5], 2), ([1, 3], 1))]
    notes = PromptNotes(sequences)
    assert [start for _, start in notes] == [2, 2, 1]
    first, second, third = notes.prompts.tolist()
    assert first == second != third


# ---- with models


def responses(seed: int = 0) -> list[TokenSequence]:
    """Of eight prompts one to four responses each, some of which begin alike."""
    rng = np.random.default_rng(seed)
    made = []
    for group in range(8):
        prompt = rng.integers(3, 61, rng.integers(1, 12)).tolist()
        begin = rng.integers(3, 61, group % 3).tolist()
        for _ in range(1 + group % 4):
            made.append(TokenSequence(prompt + begin + rng.integers(3, 61, rng.integers(1, 9)).tolist(), len(prompt)))
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_all_layouts_give_the_same_log_probs(tiny_model, naive_logps, kind):
    model, sequences = tiny_model(kind), responses()
    expected = naive_logps(model, sequences)
    forwards = {}
    for layout in ("padded", "packed", "shared"):
        seen = []
        handle = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        scorer = ModelScorer(model, token_layout=layout, entropy=True)
        for budget in (40, 10_000):
            with scorer:  # probes are not counted
                seen.clear()
                assert scorer.token_layout == layout
                found = scorer.score_all(sequences, batch_tokens=budget)
                assert max(seen) <= budget
                forwards[layout, budget] = sum(seen)
            for scores, row in zip(found, expected, strict=True):
                np.testing.assert_allclose(scores.logps, row, rtol=0, atol=2e-5)
                assert (scores.entropy > 0).all()
        handle.remove()
        assert not uses_segments(model)  # as it was
    for budget in (40, 10_000):
        assert forwards["padded", budget] > forwards["packed", budget] > forwards["shared", budget]


def test_a_model_that_takes_no_packed_batch_is_scored_padded(tiny_model, naive_logps, monkeypatch):
    model, sequences = tiny_model(), responses()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with ModelScorer(model) as scorer:
        assert scorer.token_layout == "padded"
    for row, other in zip(score(model, sequences), naive_logps(model, sequences), strict=True):
        np.testing.assert_allclose(row, other, rtol=0, atol=2e-5)


def test_a_cache_is_built_of_shared_prompts(tiny_model, naive_logps, tmp_path):
    """The prompt of each pair goes through once, the identity is that of a model by itself."""
    model, sequences = tiny_model(), responses()
    reference = ReferenceModel.from_model(model)
    digest, seen = reference.digest(), []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    cache = ReferenceCache.build(tmp_path, reference, sequences, progress=False)
    handle.remove()
    assert seen[-1] < 0.8 * sum(len(ids) for ids, _ in sequences)
    for row, other in zip(cache.lookup(sequences), naive_logps(model, sequences), strict=True):
        np.testing.assert_allclose(row, other, rtol=0, atol=2e-5)
    enable_segments(model)  # as a policy in training is
    assert ReferenceModel.from_model(model).digest() == digest == cache.reference


def test_the_reference_of_an_adapter_is_the_policys_own_weights(tiny_model, naive_logps):
    """No second model: the base under the adapter is scored, wherever it is in training."""
    model, sequences = tiny_model(), responses()
    expected = naive_logps(model, sequences)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    enable_segments(policy)
    weights = {id(p) for p in policy.parameters()}
    with ReferenceModel.from_model(policy).scorer() as scorer:
        assert {id(p) for p in scorer.model.parameters()} == weights
        rows = scorer(sequences)
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, other, rtol=0, atol=2e-5)
    assert uses_segments(policy)  # it was on before


def test_real_pairs(shared_dir):
    """Prompts of 100 and more tokens, float32: packed and shared to 1e-5 of padded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_dir / "models" / "hh-tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = []
    with gzip.open(shared_dir / "data" / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as file:
        for line, _ in zip(file, range(12), strict=False):
            row = json.loads(line)
            cut = row["chosen"].rindex("\n\nAssistant:")
            prompt = tokenizer(row["chosen"][:cut], add_special_tokens=False)["input_ids"][-200:]
            for side in ("chosen", "rejected"):
                answer = tokenizer(row[side][row[side].rindex("\n\nAssistant:") :], add_special_tokens=False)[
                    "input_ids"
                ]
                sequences.append(TokenSequence(prompt + answer[:150], len(prompt)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {
        layout: ModelScorer(model, token_layout=layout).score_all(sequences, batch_tokens=1024)
        for layout in ("padded", "packed", "shared")
    }
    for layout in ("packed", "shared"):
        for scores, padded in zip(found[layout], found["padded"], strict=True):
            np.testing.assert_allclose(scores.logps, padded.logps, rtol=1e-5, atol=2e-5)
            assert scores.logps.sum() == pytest.approx(padded.logps.sum(), rel=1e-5)
