"""A recorded phase: what is in memory when completions are sampled, scored and trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from fastalign.planning import HeadSettings, ModelSettings, OptimizerSettings, parts_of
from fastalign.planning.phases import PhaseModels, SampledBatch, record_phase

POLICY = ModelSettings(checkpointing=False, layout="packed")
CRITIC = replace(POLICY, scalar=True)
FROZEN = replace(POLICY, dtype=torch.bfloat16, pure_16bit=True)
SAMPLED = SampledBatch(rows=4, prompt_tokens=12, new_tokens=3)


@pytest.fixture
def phase(llama, make_piece):
    def recorded(sampled: SampledBatch = SAMPLED, scored_pairs: int = 2, device: str = "cpu", **models):
        models.setdefault("policy", (llama, POLICY))
        return record_phase(
            PhaseModels(**models), [[make_piece()]], sampled=sampled, scored=make_piece(scored_pairs),
            head=HeadSettings(device_type=device), optimizer=OptimizerSettings(cls=torch.optim.AdamW),
        )  # fmt: skip

    return recorded


def cache_bytes(config, sampled: SampledBatch) -> int:
    """Keys and values of all tokens but the last, float32."""
    tokens = sampled.prompt_tokens + sampled.new_tokens - 1
    return 2 * 4 * sampled.rows * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_the_cache_holds_keys_and_values_of_every_token(phase, llama):
    """Where completions are many, sampling is the peak, and the cache what dominates it."""
    sampled = SampledBatch(rows=256, prompt_tokens=2, new_tokens=120)
    record = phase(sampled)
    parts = parts_of(record, "cuda")
    assert max(record.peaks, key=lambda name: record.peaks[name]) == "sampling"
    layers = llama.num_hidden_layers
    # one layer's old keys and values are still there while its new ones are put together
    assert cache_bytes(llama, sampled) * 0.98 <= parts["cache"] <= cache_bytes(llama, sampled) * (1 + 1 / layers)
    few = phase(replace(sampled, rows=16))
    assert few.peaks["sampling"] < 0.2 * record.peaks["sampling"]
    assert few.peaks["update"] == record.peaks["update"]


def test_work_of_sampling_is_that_of_all_tokens(phase, llama):
    """2 a parameter and token, and attention over what is there at the end."""
    sampled = replace(SAMPLED, new_tokens=40)
    record = phase(sampled)
    tokens = sampled.rows * (sampled.prompt_tokens + sampled.new_tokens - 1)
    layers = record.parameters - 2 * llama.vocab_size * llama.hidden_size
    head = 2 * llama.vocab_size * llama.hidden_size * sampled.rows * sampled.new_tokens
    seen = sampled.prompt_tokens**2 + (sampled.new_tokens - 1) * (sampled.prompt_tokens + sampled.new_tokens)
    attention = 4 * llama.hidden_size * llama.num_hidden_layers * sampled.rows * seen
    assert record.flops["sampling"] == pytest.approx(2 * layers * tokens + head + attention, rel=0.03)


def test_every_model_is_a_part_of_its_own(phase, llama):
    alone = parts_of(phase(), "cuda")
    assert not {"critic", "reference", "rewards"} & set(alone)
    record = phase(
        critic=(llama, CRITIC), reference=(llama, POLICY), with_reference=True,
        rewards=[(llama, replace(FROZEN, scalar=True))] * 2,
    )  # fmt: skip
    parts = parts_of(record, "cuda")
    trunk = record.parameters // 2
    assert parts["weights"] == alone["weights"]
    assert parts["reference"] == pytest.approx(parts["weights"], rel=0.01)
    assert parts["rewards"] == pytest.approx(2 * parts["critic"] / 2, rel=0.01)  # two, in half the bytes
    assert parts["critic"] == pytest.approx(4 * trunk, rel=0.3)
    assert parts["optimizer"] > 1.5 * alone["optimizer"]


def test_what_does_not_train_has_no_gradients(phase, llama):
    with_reference = phase(reference=(llama, POLICY), with_reference=True)
    assert with_reference.trainable == with_reference.parameters == phase().parameters


def test_an_adapter_is_its_own_reference(phase, llama):
    """Scoring the reference is one more forward, and no more memory."""
    adapter = replace(POLICY, adapter=LoraConfig(task_type="CAUSAL_LM", r=4))
    without, with_it = (phase(policy=(llama, adapter), with_reference=flag) for flag in (False, True))
    assert with_it.peaks == without.peaks
    assert with_it.flops["scoring"] == pytest.approx(2 * without.flops["scoring"], rel=0.01)
    assert with_it.flops["forward"] == without.flops["forward"]


def test_a_value_head_reads_the_policys_trunk(phase, llama):
    plain, headed = phase(), phase(value_head=True)
    assert headed.parameters == plain.parameters + llama.hidden_size + 1
    assert headed.flops["forward"] == pytest.approx(plain.flops["forward"], rel=0.01)


def test_scoring_many_completions_can_be_the_peak(phase):
    record = phase(scored_pairs=200)
    assert max(record.peaks, key=lambda name: record.peaks[name]) == "scoring"
    assert parts_of(record, "cuda")["activations"] > 0


def test_every_family_is_sampled_from(config, phase):
    record = phase(policy=(config, replace(POLICY, checkpointing=True)))
    assert record.peaks["sampling"] > parts_of(record, "cuda")["weights"]
    assert record.flops["sampling"] > 0


def test_the_later_phase_ends_as_it_began(phase, llama):
    record = phase(critic=(llama, CRITIC))
    assert sum(event.size for event in record.later if event.storage >= 0) == 0
