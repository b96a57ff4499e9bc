"""Tiny random models of the families that transformers knows, and the definition of a head's logits."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from fastalign.models import Head

torch.set_num_threads(1)
V = 53
DECODER = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {**DECODER, "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.01}

FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "llama_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, final_logit_softcapping=3.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, final_logit_softcapping=5.0)),
    "gemma3_uncapped": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**DECODER, logit_scale=0.0625)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**DECODER, logits_scaling=8.0)),
    "phi_bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**{**DECODER, "num_key_value_heads": 4})),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16)),
}  # fmt: skip


class Zoo:
    families = FAMILIES
    V = V
    decoder = DECODER

    @staticmethod
    def make(family: str) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        with torch.no_grad():  # random biases and norms: the initial zeros and ones would hide them
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name or "ln_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    @staticmethod
    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        ids[1, 5:], mask[1, 5:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}

    @staticmethod
    def logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
        z = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
        return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap


@pytest.fixture
def zoo() -> type[Zoo]:
    return Zoo


def loaded(name: str):
    """A module of this folder: test files are no package, so they cannot import it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kit():
    return loaded("layout_kit")


@pytest.fixture(scope="session")
def attend():
    return loaded("attention_kit")
