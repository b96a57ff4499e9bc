"""Per-sequence sums, padded and packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import backends, sequence_logps


@pytest.fixture(params=["torch", "triton"] if backends.interpreting() else ["torch"])
def backend(request):
    """Those that can serve CPU tensors in this process."""
    return request.param


def test_packed_equals_padded_and_a_loop(backend):
    check_lengths(backend)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=8), seed=st.integers(0, 99))
def check_lengths(backend, lengths, seed):
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(max(lengths), 1)
    padded = torch.randn(B, T, generator=g, dtype=torch.float32 if backend == "triton" else torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    packed = padded[mask].requires_grad_()
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    for reduction in ("sum", "mean"):
        expected = [
            row[:n].sum() / (max(n, 1) if reduction == "mean" else 1) for row, n in zip(padded, lengths, strict=True)
        ]
        expected = torch.stack(expected)
        torch.testing.assert_close(sequence_logps(padded, mask=mask, reduction=reduction, backend=backend), expected)
        out = sequence_logps(packed, cu_seqlens=cu, reduction=reduction, backend=backend)
        torch.testing.assert_close(out, expected)
        if packed.numel():
            (grad,) = torch.autograd.grad(out.sum(), packed)
            each = torch.ones(B) if reduction == "sum" else 1 / torch.tensor(lengths).clamp(min=1)
            torch.testing.assert_close(grad, each.to(grad.dtype).repeat_interleave(torch.tensor(lengths)))


def test_nan_under_the_mask_does_not_leak(backend):
    values = torch.tensor([[1.0, torch.nan], [2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    sums = sequence_logps(values, mask=mask, backend=backend)
    assert sums.tolist() == [1.0, 5.0]
    (grad,) = torch.autograd.grad(sums.sum(), values)
    assert grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(9, generator=g).requires_grad_()
    mask = torch.rand(9, generator=g) < 0.7 if masked else None
    offsets = torch.tensor([0, 4, 4, 9])
    torch.library.opcheck(torch.ops.fastalign.segment_sums, (values, mask, offsets, backend))
    sums = torch.randn(3, generator=g).requires_grad_()
    torch.library.opcheck(torch.ops.fastalign.spread_segments, (sums, mask, offsets, 9, backend))


def test_sums_are_differentiable_twice():
    """The two ops are each other's transpose."""
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    offsets, mask = torch.tensor([0, 2, 6]), torch.tensor([True, False, True, True, False, True])

    def sums(x):
        return torch.ops.fastalign.segment_sums(x, mask, offsets, "torch")[0].square()

    assert torch.autograd.gradcheck(sums, values)
    assert torch.autograd.gradgradcheck(sums, values)


def test_compiles_without_a_graph_break():
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    compiled = torch.compile(lambda x: sequence_logps(x, cu_seqlens=cu), fullgraph=True, backend="aot_eager")
    values = torch.randn(5, requires_grad=True)
    out = compiled(values)
    torch.testing.assert_close(out, sequence_logps(values, cu_seqlens=cu))
    (grad,) = torch.autograd.grad(out.square().sum(), values)
    assert grad.shape == (5,)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("reduction must be", {"reduction": "max"}),
        ("mask must be", {"mask": torch.ones(3, 2)}),
        (r"must be \(N,\) with cu_seqlens", {"cu_seqlens": torch.tensor([0, 2])}),
        ("backend must be 'auto', 'torch' or 'triton', got 'cpu'", {"backend": "cpu"}),
    ],
)
def test_bad_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        sequence_logps(torch.zeros(2, 3), **arguments)


@pytest.mark.parametrize("cu", [[0, 2, 9], [0, 2**62], [3, -(2**63), 5], [0, 4, 2, 5], [-7, 5]])
def test_boundaries_are_no_addresses_even_where_nobody_looks(monkeypatch, backend, cu):
    """As on an accelerator, where looking would wait for it: sums of something, of these tokens and no others."""
    values, cu_seqlens = torch.full((5,), 2.0, requires_grad=True), torch.tensor(cu)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to N = 5, got \["):
        sequence_logps(values, cu_seqlens=cu_seqlens, backend=backend)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    sums = sequence_logps(values, cu_seqlens=cu_seqlens, backend=backend)
    assert sums.shape == (len(cu) - 1,)
    assert set(sums.tolist()) <= {2.0 * n for n in range(6)}
