"""Choice of backend: explicit requests are honoured or refused with the reason."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops import backends


def test_every_backend_is_listed_with_a_reason_or_none():
    found = backends.available()
    assert tuple(found) == ("torch", "cpu", "triton", "cuda") == backends.BACKENDS
    assert found["torch"] is None
    assert all(reason is None or len(reason) > 10 for reason in found.values())


def test_auto_prefers_the_compiled_kernels_on_the_cpu():
    expected = "cpu" if backends.available()["cpu"] is None else "torch"
    assert backends.resolve("auto", torch.zeros(1)).name == expected
    assert backends.resolve("auto", torch.zeros(1, dtype=torch.float64)).name == "torch"


def test_what_cannot_run_says_why():
    if backends.available()["triton"] is None:
        pytest.skip("Triton is usable here")
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: .*(CUDA|triton)"):
        backends.resolve("triton", torch.zeros(1))


def test_the_cuda_backend_is_named_or_not_taken():
    """auto prefers Triton; by name it is refused on a CPU tensor, with a way to get it."""
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run: .*(CUDA|triton)"):
        backends.resolve("cuda", torch.zeros(1))
