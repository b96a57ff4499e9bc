"""Attention within segments against attention over each sequence alone; kernels by what they are handed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastalign.models import attention
from fastalign.models.attention import segment_attention
from fastalign.models.packing import enable_segments
from fastalign.models.segments import Segments

torch.set_num_threads(1)
LENGTHS, WIDTH = np.array([[5, 1, 3], [7, 0, 0], [2, 9, 0]]), 11


class Layer(nn.Module):
    """What transformers' attention functions read of an attention module."""

    num_key_value_groups, is_causal, head_dim = 2, True, 8


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, WIDTH, 8) for heads in (4, 2, 2)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, softcap: float | None = None) -> Tensor:
    """The definition: a softmax over the keys of one's own segment, up to oneself, within the window."""
    out = torch.zeros(3, WIDTH, 4, 8, dtype=q.dtype)
    for row, lengths in enumerate(LENGTHS):
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
            for t in range(start, start + length):
                first = start if window is None else max(start, t - window + 1)
                for head in range(4):
                    keys, values = (x[row, head // 2, first : t + 1] for x in (k, v))
                    scores = keys @ q[row, head, t] * 8**-0.5
                    if softcap is not None:
                        scores = torch.tanh(scores / softcap) * softcap
                    out[row, t, head] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize("former", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_each_segment_attends_to_itself(former, window):
    q, k, v = tensors(torch.float64)
    function = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}[former]
    got = segment_attention(
        Layer(), q, k, v, Segments(LENGTHS, WIDTH), former, function, sliding_window=window, scaling=8**-0.5
    )
    expected = one_by_one(q, k, v, window=window)
    assert got.shape == (3, WIDTH, 4, 8)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # the eager softmax is taken in float32
    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((got * weights).sum(), (q, k, v))
    for grad, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_a_softcap_reaches_the_eager_function():
    q, k, v = tensors(torch.float64)
    got = segment_attention(
        Layer(), q, k, v, Segments(LENGTHS, WIDTH), "eager", eager_attention_forward, scaling=8**-0.5, softcap=0.5
    )
    torch.testing.assert_close(got, one_by_one(q, k, v, softcap=0.5), rtol=1e-6, atol=1e-7)


def test_padding_gives_zeros_and_no_gradient():
    q, k, v = tensors()
    got = segment_attention(Layer(), q, k, v, Segments(LENGTHS, WIDTH), "sdpa", sdpa_attention_forward)
    padding = torch.from_numpy(np.arange(WIDTH) >= LENGTHS.sum(1)[:, None])
    assert not got[padding].any()
    (grad,) = torch.autograd.grad(got.sum(), k)
    assert not grad.transpose(1, 2)[padding].any()


def test_what_it_cannot_do_is_refused():
    q, k, v = tensors()
    segments = Segments(LENGTHS, WIDTH)
    encoder = Layer()
    encoder.is_causal = False
    with pytest.raises(ValueError, match="Layer does not attend causally"):
        segment_attention(encoder, q, k, v, segments, "sdpa", sdpa_attention_forward)
    with pytest.raises(ValueError, match="packed batches take no cache"):
        segment_attention(Layer(), q[:, :, :1], k, v, segments, "sdpa", sdpa_attention_forward)


# Kernels that need a GPU, by what they are handed ---------------------------------------------------------------------


def by_boundaries(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """(N, heads, D): what a variable-length kernel computes."""
    parts = []
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        own = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(
            scaled_dot_product_attention(*own, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(parts)


def test_flash_attention_is_handed_the_boundaries_of_one_row(monkeypatch):
    def flash(module, query, key, value, attention_mask, *, scaling, sliding_window, cu_seq_lens_q, cu_seq_lens_k,
              max_length_q, max_length_k, dropout):  # fmt: skip
        assert attention_mask is None
        assert (max_length_q, max_length_k, sliding_window, dropout) == (9, 9, 4096, 0.1)
        assert cu_seq_lens_q is cu_seq_lens_k
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return by_boundaries(*flat, cu_seq_lens_q, scaling)[None], None

    q, k, v = tensors(torch.float64)
    got = segment_attention(
        Layer(), q, k, v, Segments(LENGTHS, WIDTH), "flash_attention_2", flash, sliding_window=4096, scaling=8**-0.5,
        dropout=0.1,
    )  # fmt: skip
    torch.testing.assert_close(got, one_by_one(q, k, v))


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_kernel_is_handed_tokens_without_padding(monkeypatch, padded):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((len(query), max_q, max_k, window_size, enable_gqa))
        return by_boundaries(query, key, value, cu_seq_q, scale)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_takes_varlen", lambda *args, **kwargs: True)
    q, k, v = tensors(torch.float64)
    segments = Segments(LENGTHS, WIDTH) if padded else Segments(np.array([[5, 6], [11, 0], [2, 9]]), WIDTH)
    got = segment_attention(Layer(), q, k, v, segments, "sdpa", sdpa_attention_forward, scaling=8**-0.5)
    monkeypatch.undo()
    want = segment_attention(Layer(), q, k, v, segments, "sdpa", sdpa_attention_forward, scaling=8**-0.5)
    torch.testing.assert_close(got, want)
    assert calls == [(27, 9, 9, (-1, 0), True) if padded else (33, 11, 11, (-1, 0), True)]


def test_when_torchs_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    segments = Segments(LENGTHS, WIDTH)

    class OnGpu:
        """A tensor's description: no GPU is needed to decide."""

        def __init__(self, dtype=torch.bfloat16, size=64, device="cuda"):
            self.dtype, self.shape, self.device = dtype, (33, 4, size), torch.device(device)

    def taken(former="sdpa", dropout=0.0, window=None, tensor=None, **kwargs):
        flat = [tensor or OnGpu()] * 3
        return attention._takes_varlen(flat, segments, former, sliding_window=window, dropout=dropout, **kwargs)

    assert taken()
    assert taken(window=9, softcap=None)
    for other in (
        {"former": "eager"}, {"dropout": 0.1}, {"window": 8}, {"softcap": 5.0}, {"s_aux": object()},
        {"tensor": OnGpu(torch.float32)}, {"tensor": OnGpu(size=60)}, {"tensor": OnGpu(device="cpu")},
        {"tensor": OnGpu(size=512)},
    ):  # fmt: skip
        assert not taken(**other), other


# In a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("former", ["sdpa", "eager"])
def test_calls_without_segments_are_the_former_ones(former):
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation=former,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # left padding, as generation has it
    sampled = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, **sampled)
    enable_segments(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(ids, attention_mask=mask, **sampled), generated)


def test_flex_attention_is_refused():
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = tf.LlamaForCausalLM(config)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*'sdpa', 'eager' and"):
        attention.install(model)
