"""Configs of small models of the families that plans are made for, and batches for them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16}),
    "gpt2": ("GPT2Config", {"num_key_value_heads": None, "intermediate_size": None}),
}


def make_config(family: str) -> Any:
    name, own = FAMILIES[family]
    sizes = {key: value for key, value in (SIZES | own).items() if value is not None}
    config = getattr(transformers, name)(**sizes)
    config.pad_token_id = 0
    return config


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def config(family: str) -> Any:
    return make_config(family)


@pytest.fixture
def llama() -> Any:
    return make_config("llama")


@pytest.fixture
def make_piece():
    """From numbers of pairs, prompt and response tokens to a batch of PreferenceCollator."""
    from fastalign.data import PreferenceCollator

    def make(pairs: int = 2, prompt: int = 12, response: int = 20) -> dict[str, Any]:
        example = {"prompt_ids": [1] * prompt, "chosen_ids": [2] * response, "rejected_ids": [3] * response}
        return PreferenceCollator(0)([example] * pairs)

    return make
