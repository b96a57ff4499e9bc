"""The fused cross-entropy is torch's."""

from __future__ import annotations

import pytest
import torch

from fastalign.linear import linear_cross_entropy


def build(B=10, T=9, H=16, V=120):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g).double().requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).double().requires_grad_()
    bias = torch.randn(V, generator=g).double().requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < 0.4] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("workspace_mb", [0.01, None])
def test_cross_entropy_is_torchs(workspace_mb):
    hidden, weight, bias, targets = build()
    logits = hidden @ weight.T + bias
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        out = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, workspace_mb=workspace_mb)
        torch.testing.assert_close(out.loss.flatten(), expected.flatten())
        leaves = [hidden, weight, bias]
        grads = torch.autograd.grad(out.loss.sum(), leaves)
        for mine, true in zip(grads, torch.autograd.grad(expected.sum(), leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(mine, true)
        torch.testing.assert_close(
            out.metrics["nll"].value,
            (expected.sum() / (1 if reduction == "mean" else (targets != -100).sum())).detach(),
        )


def test_cross_entropy_of_nothing_is_zero():
    hidden, weight, _, targets = build()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).loss
    assert loss.item() == 0
    loss.backward()
    assert not hidden.grad.any()
