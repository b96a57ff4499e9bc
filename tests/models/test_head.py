"""The head of a model: its settings in every family, and adapters on it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.models.causal import attach_head, find_head, fuse_head


def lora(model, **kwargs):
    torch.manual_seed(2)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **kwargs))
    return peft_model.eval()


def test_settings_of_the_families(zoo):
    assert find_head(zoo.make("gemma2")).softcap == 3.0
    assert find_head(zoo.make("cohere")).logit_scale == 0.0625
    assert find_head(zoo.make("granite")).logit_scale == 0.125
    assert find_head(zoo.make("phi_bias")).bias is not None
    tied = zoo.make("llama_tied")
    assert find_head(tied).weight is tied.get_input_embeddings().weight
    plain = find_head(zoo.make("gpt2"))
    assert (plain.logit_scale, plain.softcap, plain.bias) == (1.0, None, None)
    assert plain.options == {"bias": None, "logit_scale": 1.0, "softcap": None}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "lora_dropout": 0.5},
    ],
    ids=["body", "head", "modules_to_save", "dropout"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_peft(zoo, family, kwargs):
    model = lora(zoo.make(family), **kwargs)
    if "modules_to_save" in kwargs:
        with torch.no_grad():
            model.get_base_model().get_output_embeddings().weight.mul_(1.5)
    fuse_head(model)
    expected = model(**zoo.batch()).logits
    torch.testing.assert_close(model(**zoo.batch(), head_fn=zoo.logits), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = model(**zoo.batch()).logits
        torch.testing.assert_close(model(**zoo.batch(), head_fn=zoo.logits), base, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 1e-3


def test_lora_on_the_head_gets_its_gradients(zoo):
    model = lora(zoo.make("llama"), target_modules=["lm_head"])
    fuse_head(model)
    model(**zoo.batch()).logits.sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2
    model.zero_grad()
    model(**zoo.batch(), head_fn=lambda hidden, head: zoo.logits(hidden, head).sin().sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None


def test_dropout_on_the_heads_adapter_is_active_in_training(zoo):
    model = fuse_head(lora(zoo.make("llama"), target_modules=["lm_head"], lora_dropout=0.5).train())
    torch.manual_seed(3)
    expected = model(**zoo.batch()).logits
    torch.manual_seed(3)
    torch.testing.assert_close(model(**zoo.batch(), head_fn=zoo.logits), expected, rtol=1e-5, atol=1e-5)


def test_merged_adapter_on_the_head(zoo):
    model = fuse_head(lora(zoo.make("llama"), target_modules=["lm_head"]))
    expected = model(**zoo.batch()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**zoo.batch(), head_fn=zoo.logits), expected, rtol=1e-4, atol=1e-5)


def test_dora_on_the_head_is_refused_by_name(zoo):
    with pytest.raises(ValueError, match="variant"):
        fuse_head(lora(zoo.make("llama"), target_modules=["lm_head"], use_dora=True))


def test_attach_head_returns_what_it_was_given_without_an_adapter(zoo):
    model = zoo.make("llama")
    hidden = torch.randn(2, 3, 32)
    same, head = attach_head(model, hidden)
    assert same is hidden
    assert head.weight is model.lm_head.weight
