"""A scorer with known answers, sequences, small models, and ways to damage files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from fastalign.reference import ReferenceCache, TokenSequence

torch.set_num_threads(1)


class SyntheticScorer:
    """log p of token t = −(Σ of the ids up to t, mod 997)/8 − start: exact in float32, different for every prefix."""

    def __init__(self) -> None:
        self.calls: list[list[TokenSequence]] = []

    def __call__(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        self.calls.append(list(sequences))
        return [self.logps(sequence) for sequence in sequences]

    @staticmethod
    def logps(sequence: TokenSequence) -> np.ndarray:
        ids = np.asarray(sequence[0], np.int64)
        return (-(ids.cumsum() % 997) / 8 - sequence[1])[sequence[1] :].astype(np.float32)

    def assert_right(self, cache: ReferenceCache, sequences: list[TokenSequence]) -> None:
        """The cache gives, bit for bit, what this scorer computes."""
        for sequence, row in zip(sequences, cache.lookup(sequences), strict=True):
            assert row.dtype == np.float32
            assert np.array_equal(row, self.logps(sequence))

    @property
    def scored(self) -> list[TokenSequence]:
        return [sequence for call in self.calls for sequence in call]


@pytest.fixture(autouse=True, scope="session")
def no_fsync():
    """Syncs cost seconds on a busy disk, and no test here cuts the power; test_files.py checks their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def scorer() -> SyntheticScorer:
    return SyntheticScorer()


@pytest.fixture(scope="session")
def new_scorer() -> type[SyntheticScorer]:
    """For tests under hypothesis, which want a fresh one for every example."""
    return SyntheticScorer


@pytest.fixture(scope="session")
def digest() -> str:
    return "0123456789abcdef" * 4


@pytest.fixture(scope="session")
def make_sequences() -> Callable[..., list[TokenSequence]]:
    def make(count: int, seed: int = 0, vocabulary: int = 50, longest: int = 24) -> list[TokenSequence]:
        """Distinct sequences of 2 … longest tokens."""
        from fastalign.reference import (
            TokenSequence,
        )  # not above: transformers must see the settings of tests/conftest.py

        rng = random.Random(seed)
        made: dict[tuple[int, ...], TokenSequence] = {}
        while len(made) < count:
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(2, longest))]
            made[tuple(ids)] = TokenSequence(ids, rng.randrange(1, len(ids)))
        return list(made.values())

    return make


@pytest.fixture(scope="session")
def flip_bit() -> Callable[[Path, int], None]:
    def flip(path: Path, bit: int) -> None:
        with open(path, "r+b") as file:  # in place: file systems sync a file that was truncated and written anew
            position = bit // 8 % path.stat().st_size
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return flip


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """Randomly initialised causal LMs of a few thousand parameters, in evaluation mode; equal seeds, equal weights."""

    def make(
        kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
    ) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
        if kind == "gpt2":
            sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(kind, **{**sizes, **special, **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():  # sharper than the usual initialisation, so that mistakes show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def naive_logps() -> Callable[..., list[np.ndarray]]:
    """One sequence at a time, no padding: float64 log_softmax of the model's own logits."""

    def compute(model: torch.nn.Module, sequences: list[TokenSequence], temperature: float = 1.0) -> list[np.ndarray]:
        rows = []
        for ids, start in sequences:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double() / temperature
            picked = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(list(ids)[1:])[:, None])[:, 0]
            rows.append(picked[start - 1 :].numpy())
        return rows

    return compute
