from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fastalign.models.inference import evaluating, inference, refuse_token_adapters


def test_every_module_gets_its_own_mode_back(zoo):
    model = zoo.make("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes

    def fail():
        with evaluating(model):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model.modules()] == modes


def test_inference_leaves_no_trace(zoo):
    model = zoo.make("llama").train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), inference(model, torch.device("cpu")):
        torch.manual_seed(2)
        logits = model(**zoo.batch()).logits
        torch.rand(3)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    with inference(model, torch.device("cpu"), autocast=torch.bfloat16):
        assert model(**zoo.batch()).logits.dtype == torch.bfloat16


def test_adapters_that_look_at_token_positions_are_refused(zoo):
    refuse_token_adapters(zoo.make("llama"))
    refuse_token_adapters(get_peft_model(zoo.make("llama"), LoraConfig(r=2, target_modules=["q_proj"])))
    prompt = get_peft_model(zoo.make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="adapter 'default' is PROMPT_TUNING"):
        refuse_token_adapters(prompt)
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]}
    activated = get_peft_model(zoo.make("llama"), LoraConfig(r=2, **settings))
    with pytest.raises(ValueError, match="adapter 'default' is activated LoRA"):
        refuse_token_adapters(activated)
