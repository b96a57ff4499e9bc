"""Models without weights: precision, adapters, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import MixtralConfig, Qwen3MoeConfig, T5Config

from fastalign.planning.models import ModelSettings, layout_of, meta_model


def test_an_adapter_trains_in_float32_over_a_frozen_base(llama):
    settings = ModelSettings(dtype=torch.bfloat16, adapter=LoraConfig(task_type="CAUSAL_LM", r=4))
    model = meta_model(llama, settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("pure", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_precision_of_weights_that_train(llama, pure, expected):
    model = meta_model(llama, ModelSettings(dtype=torch.bfloat16, pure_16bit=pure))
    assert {p.dtype for p in model.parameters()} == {expected}


def test_the_config_stays_as_it_is(llama):
    before = llama.to_dict()
    meta_model(llama, ModelSettings(scalar=True, attn_implementation="eager"))
    assert llama.to_dict() == before


@pytest.mark.parametrize("made", [MixtralConfig, Qwen3MoeConfig])
def test_mixtures_of_experts_are_refused_by_name(made):
    with pytest.raises(ValueError, match=f"{made.model_type} is a mixture of [0-9]+ experts"):
        meta_model(made(), ModelSettings())


def test_other_models_are_refused(llama):
    with pytest.raises(ValueError, match="encoder-decoder"):
        meta_model(T5Config(), ModelSettings())
    llama.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ValueError, match="quantised"):
        meta_model(llama, ModelSettings())


def test_layouts_that_a_class_allows(config):
    assert layout_of(meta_model(config, ModelSettings()), "auto") == "shared"
    assert layout_of(meta_model(config, ModelSettings()), "packed") == "packed"
