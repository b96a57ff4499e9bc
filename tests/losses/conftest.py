"""The grid of variants and options, made from DPO_LOSSES, and batches to try them on."""

from __future__ import annotations

import pytest
import torch

from fastalign.losses import DPO_LOSSES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `options` runs for every variant, plain and with each option that the variant honours."""
    if "options" not in metafunc.fixturenames:
        return
    grid = []
    for name, variant in DPO_LOSSES.items():
        grid.append(pytest.param({"loss_type": name}, id=name))
        for option, value in (("label_smoothing", 0.1), ("length_alpha", 0.03)):
            if getattr(variant, f"accepts_{option}"):
                grid.append(pytest.param({"loss_type": name, option: value}, id=f"{name}-{option}"))
    metafunc.parametrize("options", grid)


@pytest.fixture(scope="session")
def make_batch():
    """A function to four (P,) log-prob tensors and the lengths, as (positional arguments, keyword arguments)."""

    def make(pairs=6, seed=0, dtype=torch.float64, scale=8.0):
        generator = torch.Generator().manual_seed(seed)
        logps = [-40 + scale * torch.randn(pairs, generator=generator, dtype=dtype) for _ in range(4)]
        lengths = [torch.randint(1, 30, (pairs,), generator=generator) for _ in range(2)]
        return logps, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}

    return make
