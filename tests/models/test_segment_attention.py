"""Attention within segments and to their prefixes against its definition; kernels by what they are handed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastalign.models import segment_attention as kernels
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segments import Segments

torch.set_num_threads(1)
LENGTHS, WIDTH = np.array([[5, 1, 3], [7, 0, 0], [2, 9, 0]]), 11
PREFIXES = np.array([-1, 0, 0, -1, 3, -1])  # a prefix of several, and one from another row
FUNCTIONS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}


class Layer(nn.Module):
    """What transformers' attention functions read of an attention module."""

    num_key_value_groups, is_causal, head_dim = 2, True, 8


def make(kind: str) -> Segments:
    return {
        "apart": lambda: Segments(LENGTHS, WIDTH),
        "prefixed": lambda: Segments(LENGTHS, WIDTH, prefixes=PREFIXES),
        "full rows": lambda: Segments(np.array([[5, 6], [11, 0], [2, 9]]), WIDTH),
        "full and prefixed": lambda: Segments(
            np.array([[5, 6], [11, 0], [2, 9]]), WIDTH, prefixes=np.array([-1, 0, -1, 2, -1])
        ),
    }[kind]()


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, WIDTH, 8) for heads in (4, 2, 2)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """A softmax over the keys of one's prefix and of one's own segment, up to oneself, within the window."""
    out = torch.zeros(3 * WIDTH, 4, 8, dtype=q.dtype)
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    spans = [range(s, s + n) for s, n in zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)]
    for span, prefix in zip(spans, segments.prefixes, strict=True):
        before = [] if prefix < 0 else list(spans[prefix])
        for t in span:
            seen = (before + list(span)[: t - span.start + 1])[-(window or 10**6) :]
            for head in range(4):
                scores = flat_k[seen, head // 2] @ flat_q[t, head] * 8**-0.5
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                out[t, head] = scores.softmax(0) @ flat_v[seen, head // 2]
    return out.unflatten(0, (3, WIDTH))


def by_boundaries(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None) -> Tensor:
    """(N, heads, D): what a variable-length kernel computes, its causal mask ending in the lower right corner."""
    parts = []
    for q0, q1, k0, k1 in zip(*(cu.tolist()[i:][: len(cu) - 1] for cu in (cu_q, cu_k) for i in (0, 1)), strict=True):
        own = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril_((k1 - k0) - (q1 - q0))
        out = nn.functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def with_gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("kind", ["apart", "prefixed"])
@pytest.mark.parametrize("former", FUNCTIONS)
@pytest.mark.parametrize("window", [None, 3, 6, 100])
def test_a_segment_attends_to_itself_and_its_prefix(former, window, kind, block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    inputs, segments = tensors(), make(kind)
    got = segment_attention(
        Layer(), *inputs, segments, former, FUNCTIONS[former], sliding_window=window, scaling=8**-0.5
    )
    assert got.shape == (3, WIDTH, 4, 8)
    expected = with_gradients(by_definition(*inputs, segments, window=window), inputs)
    # transformers' eager softmax is taken in float32
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if former == "sdpa" else {"rtol": 1e-5, "atol": 1e-6}
    for ours, wanted in zip(with_gradients(got, inputs), expected, strict=True):
        torch.testing.assert_close(ours, wanted, **tolerance)


def test_long_segments_are_taken_in_blocks_that_fit_the_window(monkeypatch):
    """What no query of a block can see is not computed: with a window, work grows with the length alone."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    sizes = []

    def function(module, query, key, value, mask, **kwargs):
        sizes.append((query.shape[2], key.shape[2], mask.shape))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    segments = Segments(np.array([[3, 10]]), 13, prefixes=np.array([-1, 0]))
    q, k, v = (torch.randn(1, heads, 13, 8) for heads in (4, 2, 2))
    segment_attention(Layer(), q, k, v, segments, "eager", function, sliding_window=5)
    assert sizes == [
        (3, 3, (1, 1, 3, 3)), (4, 7, (1, 1, 4, 7)), (4, 8, (1, 1, 4, 8)), (2, 6, (1, 1, 2, 6))
    ]  # fmt: skip


def test_no_mask_is_larger_than_a_block_of_queries():
    segments = Segments(np.array([[700, 900, 30]]), 1630, prefixes=np.array([-1, 0, 0]))
    plan = kernels._plan(segments, None, "sdpa")
    band = kernels._band(plan, None, "sdpa", torch.zeros(1))
    assert band.mask.shape == (512, 700 + 512 + 512)
    assert [[(call.stop - call.start, call.diagonal) for call in calls] for _, calls in plan] == [
        [(700, None)], [(512, 700), (388, 1212)], [(30, 700)]
    ]  # fmt: skip


def test_a_softcap_reaches_the_eager_function():
    inputs, segments = tensors(), make("prefixed")
    got = segment_attention(Layer(), *inputs, segments, "eager", eager_attention_forward, scaling=8**-0.5, softcap=0.5)
    torch.testing.assert_close(got, by_definition(*inputs, segments, softcap=0.5), rtol=1e-6, atol=1e-7)


def test_what_sdpa_cannot_do_is_left_to_transformers_to_refuse():
    with pytest.raises(ValueError, match="does not support `softcap`"):
        segment_attention(Layer(), *tensors(), make("apart"), "sdpa", sdpa_attention_forward, softcap=0.5)


def test_bfloat16_under_autocast():
    inputs, segments = tensors(torch.float32), make("prefixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = segment_attention(Layer(), *inputs, segments, "sdpa", sdpa_attention_forward)
    expected = by_definition(*(x.bfloat16().float() for x in inputs), segments)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)


def test_padding_gives_zeros_and_no_gradient():
    q, k, v = tensors()
    got = segment_attention(Layer(), q, k, v, make("prefixed"), "sdpa", sdpa_attention_forward)
    padding = torch.from_numpy(np.arange(WIDTH) >= LENGTHS.sum(1)[:, None])
    assert not got[padding].any()
    (grad,) = torch.autograd.grad(got.sum(), k)
    assert not grad.transpose(1, 2)[padding].any()


def test_what_it_cannot_do_is_refused():
    q, k, v = tensors()
    encoder = Layer()
    encoder.is_causal = False
    with pytest.raises(ValueError, match="Layer does not attend causally"):
        segment_attention(encoder, q, k, v, make("apart"), "sdpa", sdpa_attention_forward)
    with pytest.raises(ValueError, match="packed batches take no cache"):
        segment_attention(Layer(), q[:, :, :1], k, v, make("apart"), "sdpa", sdpa_attention_forward)


# Kernels that need a GPU, by what they are handed ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "longest_k"), [("apart", 9), ("prefixed", 9), ("full and prefixed", 13)])
def test_flash_attention_is_handed_the_boundaries_of_one_row(kind, longest_k):
    def flash(module, query, key, value, attention_mask, *, scaling, sliding_window, cu_seq_lens_q, cu_seq_lens_k,
              max_length_q, max_length_k, dropout):  # fmt: skip
        assert attention_mask is None
        assert (max_length_q, max_length_k) == (int(segments.lengths.max()), longest_k)
        assert (sliding_window, dropout) == (4096, 0.1)
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return by_boundaries(*flat, cu_seq_lens_q, cu_seq_lens_k, scaling)[None], None

    inputs, segments = tensors(), make(kind)
    got = segment_attention(
        Layer(), *inputs, segments, "flash_attention_2", flash, sliding_window=4096, scaling=8**-0.5, dropout=0.1
    )
    expected = with_gradients(by_definition(*inputs, segments), inputs)
    for ours, wanted in zip(with_gradients(got, inputs), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kind", ["apart", "prefixed", "full rows", "full and prefixed"])
def test_torchs_kernel_is_handed_tokens_without_padding(monkeypatch, kind):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((len(query), len(key), max_q, max_k, window_size, enable_gqa))
        return by_boundaries(query, key, value, cu_seq_q, cu_seq_k, scale)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(kernels, "_takes_varlen", lambda *args, **kwargs: True)
    inputs, segments = tensors(), make(kind)
    got = segment_attention(Layer(), *inputs, segments, "sdpa", sdpa_attention_forward, scaling=8**-0.5)
    torch.testing.assert_close(got, by_definition(*inputs, segments))
    sizes = {
        "apart": (27, 27, 9, 9), "prefixed": (27, 27 + 5 + 5 + 7, 9, 9), "full rows": (33, 33, 11, 11),
        "full and prefixed": (33, 33 + 5 + 11, 11, 13),
    }  # fmt: skip
    assert calls == [(*sizes[kind], (-1, 0), True)]


def test_when_torchs_kernel_is_taken(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    class OnGpu:
        """A tensor's description: no GPU is needed to decide."""

        def __init__(self, dtype=torch.bfloat16, size=64, device="cuda"):
            self.dtype, self.shape, self.device = dtype, (33, 4, size), torch.device(device)

    def taken(former="sdpa", dropout=0.0, window=None, tensor=None, kind="apart", **kwargs):
        flat = [tensor or OnGpu()] * 3
        return kernels._takes_varlen(flat, make(kind), former, sliding_window=window, dropout=dropout, **kwargs)

    assert taken()
    assert taken(window=9, softcap=None)
    assert taken(window=13, kind="full and prefixed")
    for other in (
        {"former": "eager"}, {"dropout": 0.1}, {"window": 8}, {"softcap": 5.0}, {"s_aux": object()},
        {"tensor": OnGpu(torch.float32)}, {"tensor": OnGpu(size=60)}, {"tensor": OnGpu(device="cpu")},
        {"tensor": OnGpu(size=512)}, {"window": 12, "kind": "full and prefixed"},
    ):  # fmt: skip
        assert not taken(**other), other


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["apart", "prefixed", "full and prefixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(kind, dtype):
    """bfloat16 takes torch's variable-length kernel, float32 SDPA segment by segment."""
    inputs = tuple(x.detach().to("cuda", dtype).requires_grad_() for x in tensors())
    segments = make(kind)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in inputs]
    assert kernels._takes_varlen(flat, segments, "sdpa", sliding_window=None) == (dtype == torch.bfloat16)
    got = segment_attention(Layer(), *inputs, segments, "sdpa", sdpa_attention_forward, scaling=8**-0.5)
    rounded = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    expected = by_definition(*rounded, segments)
    grads = torch.autograd.grad((got.cpu().double() * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), rounded)
    for ours, theirs in zip((got, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, **tolerance)
