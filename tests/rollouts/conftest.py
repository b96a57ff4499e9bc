"""Tiny random models with distributions that are far from flat, prompts, and the definition of a log-prob."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
V = 31
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
GPT2_SIZES = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    def make(kind: str = "llama", seed: int = 0, scale: float = 0.2, **changes: object) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = GPT2_SIZES if kind == "gpt2" else SIZES
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(kind, **{**sizes, **special, **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[list[int]]]:
    def make(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
        """Of very different lengths, 1 and `longest` among them."""
        rng = random.Random(seed)
        lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count))][:count]
        return [[rng.randrange(3, V) for _ in range(length)] for length in lengths]

    return make


@pytest.fixture(scope="session")
def next_logits() -> Callable[..., torch.Tensor]:
    """(V,) float64 after one sequence, without padding and without a cache."""

    def compute(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()

    return compute


@pytest.fixture(scope="session")
def naive_logps() -> Callable[..., np.ndarray]:
    """float64 log-probs of a completion's tokens, from the model's own logits of that sequence alone."""

    def compute(model: torch.nn.Module, prompt: list[int], ids: list[int], temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double() / temperature
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
        return picked[:, 0].numpy()

    return compute


@pytest.fixture(scope="session")
def check_logps(naive_logps) -> Callable[..., None]:
    def check(model, prompts, completions, num_samples=1, temperature=1.0) -> None:
        """The sampler's log-probs are those of each sequence alone."""
        assert len(completions) == len(prompts) * num_samples
        for index, completion in enumerate(completions):
            assert completion.logps.dtype == np.float32
            expected = naive_logps(model, prompts[index // num_samples], completion.ids, temperature)
            np.testing.assert_allclose(completion.logps, expected, rtol=0, atol=1e-4)

    return check
