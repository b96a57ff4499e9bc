from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastalign.reference.identity import (
    complete_identity,
    differences,
    forward_config,
    identity_digest,
    model_identity,
    unwrap,
)


def digest_of(model, adapter=None, temperature=1.0, autocast=None) -> str:
    return identity_digest(complete_identity(model_identity(model, adapter), temperature, autocast))


def with_lora(model, seed=0, name="default", **changes):
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"], **changes})
    model = get_peft_model(model, config, adapter_name=name)
    fill(model, name, seed)
    return model


def fill(model, name, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.normal_(std=0.2)


IRRELEVANT = {
    "use_cache": False,
    "attention_dropout": 0.5,
    "pad_token_id": 7,
    "eos_token_id": [3, 4],
    "bos_token_id": None,
    "initializer_range": 0.5,
    "output_hidden_states": True,
    "architectures": ["Other"],
    "_name_or_path": "elsewhere",
    "transformers_version": "99.0",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "problem_type": "regression",
    "router_aux_loss_coef": 3.0,
    "resid_pdrop": 0.1,
    "encoder_layerdrop": 0.1,
    "unknown_and_unset": None,
}
RELEVANT = {
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "final_logit_softcapping": 30.0,
    "logits_scaling": 8.0,
    "token_dropout": True,
    "nobody_knows_what_this_does": 1,
    "quantization_config": {"bits": 4},
}


@pytest.mark.parametrize("field", IRRELEVANT)
def test_fields_that_no_log_prob_depends_on(tiny_model, field):
    config = tiny_model().config.to_dict()
    assert forward_config({**config, field: IRRELEVANT[field]}) == forward_config(config)
    nested = {**config, "text_config": {**config, field: IRRELEVANT[field]}}
    assert forward_config(nested) == forward_config({**config, "text_config": config})


@pytest.mark.parametrize("field", RELEVANT)
def test_fields_that_count_or_may_count(tiny_model, field):
    config = tiny_model().config.to_dict()
    assert forward_config({**config, field: RELEVANT[field]}) != forward_config(config)


def test_the_padding_id_counts_where_positions_come_from_it(tiny_model):
    llama = tiny_model().config.to_dict()
    roberta = {**llama, "model_type": "roberta"}
    assert forward_config({**llama, "pad_token_id": 5}) == forward_config(llama)
    assert forward_config({**roberta, "pad_token_id": 5}) != forward_config(roberta)


def test_config_values_become_plain_json():
    from enum import Enum

    class Kind(Enum):
        A = "a"

    config = {
        "limits": (0.0, float("inf")),
        "kind": Kind.A,
        "layers": {3, 1, 2},
        "dtype_of_router": torch.float32,
        5: "key",
    }
    assert forward_config(config) == {
        "limits": [0.0, "inf"],
        "kind": "a",
        "layers": [1, 2, 3],
        "dtype_of_router": "torch.float32",
        "5": "key",
    }
    identity_digest({"config": forward_config(config)})


def test_models_that_are_the_same_reference(tiny_model):
    """Fresh copies, a trainer's settings, dropout, modes, wrappers, requires_grad: one digest."""
    expected = digest_of(tiny_model())
    model = tiny_model(attention_dropout=0.3).train().requires_grad_(False)
    model.config.use_cache, model.config.pad_token_id = False, 9
    assert digest_of(model) == expected
    assert digest_of(torch.compile(model)) == expected
    assert unwrap(torch.compile(model)) is model


def test_models_that_are_other_references(tiny_model):
    changes = [{}, {"seed": 1}, {"dtype": torch.bfloat16}, {"rms_norm_eps": 0.1}, {"attn_implementation": "eager"}]
    changes += [{"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, {"tie_word_embeddings": True}]
    digests = [digest_of(tiny_model(**change)) for change in changes]
    digests += [digest_of(tiny_model(), temperature=0.7), digest_of(tiny_model(), autocast=torch.bfloat16)]
    digests += [digest_of(tiny_model(), autocast=torch.float16)]
    assert len(set(digests)) == len(digests)


def test_head_settings_are_in_the_identity(tiny_model):
    gemma = complete_identity(model_identity(tiny_model("gemma2", final_logit_softcapping=5.0), None), 0.5, None)
    assert gemma["head"] == {"softcap": 5.0, "logit_scale": 1.0, "temperature": 0.5}
    cohere = model_identity(tiny_model("cohere", logit_scale=0.25), None)
    assert cohere["head"] == {"softcap": None, "logit_scale": 0.25}


def test_the_policys_adapter_is_not_in_the_identity(tiny_model):
    expected = digest_of(tiny_model())
    for seed, changes in enumerate([{}, {"r": 4}, {"modules_to_save": ["norm"]}]):
        assert digest_of(with_lora(tiny_model(), seed, **changes)) == expected


def test_the_references_own_adapter_is(tiny_model):
    base = digest_of(tiny_model())
    sft = with_lora(tiny_model())
    expected = digest_of(sft, "default")
    others = [with_lora(tiny_model(), seed=1), with_lora(tiny_model(), r=4), with_lora(tiny_model(), lora_alpha=8)]
    others += [with_lora(tiny_model(), use_rslora=True), with_lora(tiny_model(), target_modules=["k_proj", "lm_head"])]
    digests = {base, expected, *(digest_of(other, "default") for other in others)}
    assert len(digests) == 7
    with torch.no_grad():
        sft.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert digest_of(sft, "default") not in digests


def test_the_adapters_name_and_the_policys_copy_do_not_count(tiny_model):
    """SFT with LoRA, then DPO from a copy of that adapter: the reference stays the SFT model."""
    expected = digest_of(with_lora(tiny_model()), "default")
    model = with_lora(tiny_model(), name="reference")
    model.add_adapter("policy", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1))
    model.set_adapter("policy")
    for seed in (0, 5):
        fill(model, "policy", seed)
        assert digest_of(model, "reference") == expected
    assert digest_of(model, "policy") != expected


def test_saved_modules_of_an_adapter_count(tiny_model):
    model = with_lora(tiny_model(), modules_to_save=["norm"])
    before = digest_of(model, "default")
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight.add_(1)
    assert digest_of(model, "default") != before
    assert digest_of(model) == digest_of(tiny_model())


def test_adapters_that_cannot_be(tiny_model):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="adapter='sft' was given, but LlamaForCausalLM is not a PeftModel"):
        model_identity(tiny_model(), "sft")
    with pytest.raises(ValueError, match="adapter='sft' is not in the model; it has default"):
        model_identity(with_lora(tiny_model()), "sft")
    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING, which adds tokens"):
        model_identity(prompt, "default")
    assert digest_of(prompt) == digest_of(tiny_model())
    with pytest.raises(ValueError, match="expected a transformers causal language model"):
        model_identity(nn.Linear(2, 2), None)


def test_differences_in_words():
    one = {"weights": "ab", "config": {"a": 1, "b": 2}, "adapter": None, "head": {"temperature": 1.0}}
    other = {
        "weights": "cd",
        "config": {"a": 1, "b": 3, "c": 4},
        "adapter": {"weights": "x"},
        "head": {"temperature": 1.0},
    }
    assert differences(one, other) == ["adapter", "config.b 2 → 3", "config.c None → 4", "weights"]
    assert differences(one, one) == []
