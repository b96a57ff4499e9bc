from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastalign.reference import TokenSequence, score
from fastalign.reference.scoring import ModelScorer, adapter_state

HEADS = {
    "llama": {},
    "gpt2": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def assert_close(rows, expected, tolerance=2e-5):
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, other, rtol=0, atol=tolerance)


@pytest.fixture
def sequences(make_sequences):
    return make_sequences(12, longest=20)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_each_sequence_alone(tiny_model, naive_logps, sequences, kind, temperature):
    model = tiny_model(kind, **HEADS[kind])
    expected = naive_logps(model, sequences, temperature)
    for batch_tokens in (1, 60, 10_000):
        rows = score(model, sequences, temperature=temperature, batch_tokens=batch_tokens)
        assert {row.dtype for row in rows} == {np.dtype(np.float32)}
        assert_close(rows, expected)


def test_the_results_are_in_the_order_given(tiny_model, sequences):
    model = tiny_model()
    forwards, backwards = score(model, sequences), score(model, sequences[::-1])
    assert_close(forwards, backwards[::-1])
    assert [len(row) for row in forwards] == [len(ids) - start for ids, start in sequences]
    assert score(model, []) == []


def test_figures_of_a_peer(shared_dir):
    """Reference log-probs of real preferences as TRL's batch gives them, in float64 from float32 logits."""
    from transformers import AutoModelForCausalLM

    golden = json.loads((shared_dir / "golden" / "trl_dpo.json").read_text())
    batch, expected = golden["batch"], np.array(golden["reference_per_token_logps"])
    model = AutoModelForCausalLM.from_pretrained(shared_dir / "models" / "hh-tiny", dtype=torch.float32)
    sequences, wanted = [], []
    for ids, attended, completion, row in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], expected, strict=True
    ):
        length, start = sum(attended), completion.index(1)
        sequences.append(TokenSequence(ids[:length], start))
        wanted.append(row[start - 1 : length - 1])
    for row, other in zip(score(model, sequences, batch_tokens=3000), wanted, strict=True):
        np.testing.assert_allclose(row, other, rtol=1e-5, atol=3e-5)


def test_autocast_is_the_one_asked_for(tiny_model, sequences):
    model = tiny_model()
    full, half = score(model, sequences), score(model, sequences, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # a trainer's own must not leak into what is cached
        assert_close(score(model, sequences), full, 0)
        assert_close(score(model, sequences, autocast=torch.bfloat16), half, 0)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(full, half, strict=True))
    assert 1e-4 < difference < 0.5


def test_16_bit_models(tiny_model, naive_logps, sequences):
    model = tiny_model(dtype=torch.bfloat16)
    assert_close(score(model, sequences), naive_logps(model.float(), sequences), 0.3)


def test_the_model_comes_back_as_it_was(tiny_model, sequences):
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    members = set(vars(model))
    rows = score(model, sequences)
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == members
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(score(model.eval(), sequences), rows, 0)  # dropout was off


def test_the_model_comes_back_as_it_was_after_an_error(tiny_model, sequences):
    model = tiny_model().train()

    def broken(module, args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        score(model, sequences)
    handle.remove()
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model)


def test_no_random_number_is_drawn(tiny_model, sequences):
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, args, output: output + torch.rand(()) * 0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    score(model, sequences)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_kept(tiny_model, sequences):
    model = tiny_model()
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with torch.enable_grad():
        score(model, sequences)
    assert seen
    assert not any(seen)


def test_a_model_that_is_fused_already_stays_so(tiny_model, sequences):
    from fastalign.models import fuse_head
    from fastalign.models.causal import is_fused

    model = fuse_head(tiny_model())
    score(model, sequences)
    assert is_fused(model)


def test_wrapped_models(tiny_model, sequences, tmp_path):
    import torch.distributed as dist

    expected = score(tiny_model(), sequences)
    assert_close(score(torch.compile(tiny_model()), sequences), expected)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert_close(score(nn.parallel.DistributedDataParallel(tiny_model()), sequences), expected)
    finally:
        dist.destroy_process_group()


def lora(model, seed=0, **changes):
    config = {"r": 2, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3, **changes}
    model = get_peft_model(model, LoraConfig(**config))
    randomise(model, "default", seed)
    return model


def randomise(model, adapter, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize(
    "changes", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=["lora", "saved"]
)
def test_adapters_off_and_on(tiny_model, naive_logps, sequences, changes):
    base = naive_logps(tiny_model(), sequences)
    model = lora(tiny_model(), **changes).train()
    assert_close(score(model, sequences), base)
    own = score(model, sequences, adapter="default")
    assert_close(own, naive_logps(model.eval(), sequences))
    assert max(float(np.abs(a - b).max()) for a, b in zip(own, base, strict=True)) > 0.1


def test_the_references_adapter_beside_the_policys(tiny_model, naive_logps, sequences):
    """Different layers each, the policy's active: afterwards everything about it is as before."""
    model = lora(tiny_model())
    expected = naive_logps(model.eval(), sequences)
    model.add_adapter("policy", LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["norm"]))
    model.set_adapter("policy")
    randomise(model, "policy", 5)
    policy = naive_logps(model, sequences)
    frozen = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)  # which PEFT would not do, nor undo
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(wanted.values())
    assert_close(score(model, sequences, adapter="default"), expected)
    assert_close(score(model, sequences), naive_logps(tiny_model(), sequences))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert model.active_adapters == ["policy"]
    assert_close(naive_logps(model, sequences), policy, 0)


def test_adapters_that_were_off_stay_off(tiny_model, naive_logps, sequences):
    model = lora(tiny_model())
    with model.disable_adapter():
        own = score(model, sequences, adapter="default")
        assert_close(naive_logps(model, sequences), naive_logps(tiny_model(), sequences))
    assert_close(own, naive_logps(model.eval(), sequences))


def test_other_ways_to_adapt(tiny_model, naive_logps, sequences):
    expected = naive_logps(tiny_model(), sequences)
    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert_close(score(prompt, sequences), expected)
    injected = tiny_model()
    injected.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    changed = naive_logps(injected, sequences)
    assert_close(score(injected, sequences), expected)
    assert_close(naive_logps(injected, sequences), changed, 0)


def test_adapter_state_restores_after_an_error(tiny_model):
    model = lora(tiny_model())
    wanted = [parameter.requires_grad for parameter in model.parameters()]

    def fail():
        with adapter_state(model, None):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def longrope(tiny_model, **changes):
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 7.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10.0, "original_max_position_embeddings": 10, **factors}
    sizes = {"max_position_embeddings": 40, "original_max_position_embeddings": 10, "rope_parameters": rope}
    return tiny_model("phi3", **sizes, **changes)


def test_longrope_forwards_do_not_mix_short_and_long(tiny_model, naive_logps):
    """The model takes its long frequencies if one sequence of the batch is long: a short one must not get them."""
    model = longrope(tiny_model)
    sequences = [TokenSequence(list(range(3, 3 + length)), 1) for length in (5, 10, 11, 20, 8)]
    expected = naive_logps(model, sequences)
    assert_close(score(model, sequences), expected)
    assert_close(score(model, sequences[:2]), expected[:2])
    with ModelScorer(model) as scorer:
        assert_close([scores.logps for scores in scorer._score(sequences[2:4])], expected[2:4])
        mixed = [scores.logps for scores in scorer._score(sequences)]
    assert max(float(np.abs(a - b).max()) for a, b in zip(mixed, expected, strict=True)) > 1e-2


def test_longrope_digest_does_not_depend_on_the_last_forward(tiny_model):
    from fastalign.reference import ReferenceModel

    model = longrope(tiny_model)
    before = ReferenceModel.from_model(model).digest()
    score(model, [TokenSequence(list(range(3, 23)), 1)])
    assert not torch.equal(model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq)
    assert ReferenceModel.from_model(model).digest() == before


def test_dynamic_rope_beyond_its_context_is_refused(tiny_model, naive_logps):
    rope = {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}
    model = tiny_model(max_position_embeddings=12, rope_parameters=rope)
    within = [TokenSequence(list(range(3, 3 + length)), 1) for length in (5, 12)]
    assert_close(score(model, within), naive_logps(model, within))
    with pytest.raises(ValueError, match=r"a sequence has 13 tokens; with dynamic RoPE, positions beyond 12"):
        score(model, [TokenSequence(list(range(3, 16)), 1)])


@pytest.mark.parametrize("token", [61, -1])
def test_tokens_outside_the_vocabulary(tiny_model, token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the model's vocabulary of 61"):
        score(tiny_model(), [TokenSequence([1, token, 2], 1)])


def test_models_that_cannot_be_scored(tiny_model):
    with pytest.raises(ValueError, match="expected a transformers causal language model"):
        score(nn.Linear(2, 2), [TokenSequence([1, 2], 1)])
    with pytest.raises(ValueError, match="adapter='x' was given, but LlamaForCausalLM is not a PeftModel"):
        score(tiny_model(), [TokenSequence([1, 2], 1)], adapter="x")


def test_a_completion_that_starts_nowhere(tiny_model):
    with pytest.raises(ValueError, match=r"sequence 0: completion_start must lie in 1 … 2 for 3 tokens, got 0"):
        score(tiny_model(), [TokenSequence([1, 2, 3], 0)])


@pytest.mark.gpu
def test_on_a_gpu(tiny_model, naive_logps, sequences):
    model = tiny_model()
    expected = naive_logps(model, sequences)
    state = torch.cuda.get_rng_state()
    rows = score(model.to("cuda"), sequences)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_close(rows, expected, 2e-3)
