"""Attention within segments and to their prefixes, a call a segment, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastalign.models import segment_attention as kernels
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segments import Segments

torch.set_num_threads(1)
FUNCTIONS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}


@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("kind", ["apart", "prefixed"])
@pytest.mark.parametrize("former", FUNCTIONS)
@pytest.mark.parametrize("window", [None, 3, 6, 100])
def test_a_segment_attends_to_itself_and_its_prefix(attend, former, window, kind, block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    inputs, segments = attend.tensors(), attend.make(kind)
    got = segment_attention(
        attend.Layer(), *inputs, segments, former, FUNCTIONS[former], sliding_window=window, scaling=8**-0.5
    )
    assert got.shape == (3, attend.WIDTH, 4, 8)
    expected = attend.with_gradients(attend.by_definition(*inputs, segments, window=window), inputs)
    # transformers' eager softmax is taken in float32
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if former == "sdpa" else {"rtol": 1e-5, "atol": 1e-6}
    for ours, wanted in zip(attend.with_gradients(got, inputs), expected, strict=True):
        torch.testing.assert_close(ours, wanted, **tolerance)


def test_long_segments_are_taken_in_blocks_that_fit_the_window(attend, monkeypatch):
    """What no query of a block can see is not computed: with a window, work grows with the length alone."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    sizes = []

    def function(module, query, key, value, mask, **kwargs):
        sizes.append((query.shape[2], key.shape[2], mask.shape))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    segments = Segments(np.array([[3, 10]]), 13, prefixes=np.array([-1, 0]))
    q, k, v = (torch.randn(1, heads, 13, 8) for heads in (4, 2, 2))
    segment_attention(attend.Layer(), q, k, v, segments, "eager", function, sliding_window=5)
    assert sizes == [
        (3, 3, (1, 1, 3, 3)), (4, 7, (1, 1, 4, 7)), (4, 8, (1, 1, 4, 8)), (2, 6, (1, 1, 2, 6))
    ]  # fmt: skip


def test_no_mask_is_larger_than_a_block_of_queries(attend):
    segments = Segments(np.array([[700, 900, 30]]), 1630, prefixes=np.array([-1, 0, 0]))
    plan = kernels._plan(segments, None, "sdpa")
    band = kernels._band(plan, None, "sdpa", torch.zeros(1))
    assert band.mask.shape == (512, 700 + 512 + 512)
    assert [[(call.stop - call.start, call.diagonal) for call in calls] for _, calls in plan] == [
        [(700, None)], [(512, 700), (388, 1212)], [(30, 700)]
    ]  # fmt: skip


def test_a_softcap_reaches_the_eager_function(attend):
    inputs, segments = attend.tensors(), attend.make("prefixed")
    got = segment_attention(
        attend.Layer(), *inputs, segments, "eager", eager_attention_forward, scaling=8**-0.5, softcap=0.5
    )
    torch.testing.assert_close(got, attend.by_definition(*inputs, segments, softcap=0.5), rtol=1e-6, atol=1e-7)


def test_what_sdpa_cannot_do_is_left_to_transformers_to_refuse(attend):
    with pytest.raises(ValueError, match="does not support `softcap`"):
        segment_attention(
            attend.Layer(), *attend.tensors(), attend.make("apart"), "sdpa", sdpa_attention_forward, softcap=0.5
        )


def test_bfloat16_under_autocast(attend):
    inputs, segments = attend.tensors(torch.float32), attend.make("prefixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = segment_attention(attend.Layer(), *inputs, segments, "sdpa", sdpa_attention_forward)
    expected = attend.by_definition(*(x.bfloat16().float() for x in inputs), segments)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


def test_padding_gives_zeros_and_no_gradient(attend):
    q, k, v = attend.tensors()
    got = segment_attention(attend.Layer(), q, k, v, attend.make("prefixed"), "sdpa", sdpa_attention_forward)
    padding = torch.from_numpy(np.arange(attend.WIDTH) >= attend.LENGTHS.sum(1)[:, None])
    assert not got[padding].any()
    (grad,) = torch.autograd.grad(got.sum(), k)
    assert not grad.transpose(1, 2)[padding].any()


def test_what_it_cannot_do_is_refused(attend):
    q, k, v = attend.tensors()
    encoder = attend.Layer()
    encoder.is_causal = False
    with pytest.raises(ValueError, match="Layer does not attend causally"):
        segment_attention(encoder, q, k, v, attend.make("apart"), "sdpa", sdpa_attention_forward)
    with pytest.raises(ValueError, match="packed batches take no cache"):
        segment_attention(attend.Layer(), q[:, :, :1], k, v, attend.make("apart"), "sdpa", sdpa_attention_forward)
