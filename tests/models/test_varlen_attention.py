"""Variable-length kernels by what they are handed: plain functions of their interface stand in for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import nn
from torch.nn.attention import varlen as torch_varlen

from fastalign.data import PreferenceCollator
from fastalign.models import enable_segments, fuse_head, segment_kernels, varlen_attention
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segment_kernels import KERNELS, layer_of
from fastalign.models.varlen_attention import Under, scattered

torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "longest_k"), [("apart", 9), ("prefixed", 9), ("full and prefixed", 13)])
def test_flash_attention_is_handed_the_boundaries_of_one_row(attend, kind, longest_k):
    def flash(module, query, key, value, attention_mask, *, scaling, sliding_window, cu_seq_lens_q, cu_seq_lens_k,
              max_length_q, max_length_k, dropout):  # fmt: skip
        assert attention_mask is None
        assert (max_length_q, max_length_k) == (int(segments.lengths.max()), longest_k)
        assert (sliding_window, dropout) == (4096, 0.1)
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend.by_boundaries(*flat, cu_seq_lens_q, cu_seq_lens_k, scaling)[None], None

    inputs, segments = attend.tensors(), attend.make(kind)
    got = segment_attention(
        attend.Layer(), *inputs, segments, "flash_attention_2", flash, sliding_window=4096, scaling=8**-0.5, dropout=0.1
    )
    expected = attend.with_gradients(attend.by_definition(*inputs, segments), inputs)
    for ours, wanted in zip(attend.with_gradients(got, inputs), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.fixture
def package(attend, monkeypatch):
    """In place of flash_attn: its functions by definition. Has the names under which transformers asked for it."""
    asked, calls = [], []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert causal
        assert not dropout_p
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == tuple(int(cu.diff().max()) for cu in (cu_seqlens_q, cu_seqlens_k))
        assert cu_seqlens_q[-1] == len(q)
        assert cu_seqlens_k[-1] == len(k) == len(v)
        calls.append((len(q), len(k)))
        return attend.by_boundaries(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left=window_size[0], softcap=softcap
        )

    def flash_attn_func(q, k, v, causal=False, **kwargs):
        rows = [
            flash_attn_varlen_func(*own, *(torch.tensor([0, len(x)], dtype=torch.int32) for x in own[:2]),
                                   len(own[0]), len(own[1]), causal=causal, **kwargs)
            for own in zip(q, k, v, strict=True)
        ]  # fmt: skip
        return torch.stack(rows)

    def load(implementation, *args, **kwargs):
        asked.append(implementation)
        return flash_attn_func, flash_attn_varlen_func, None, None, None

    monkeypatch.setattr(flash_utils, "_lazy_imports", load)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return SimpleNamespace(asked=asked, calls=calls)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_a_model_that_uses_flash_attention(kit, package, name):
    """Through transformers' function, windows and softcap included: each layout, a single sequence, and generation."""
    kind, config, extra = kit.MODELS[name]
    torch.manual_seed(0)
    model = kit.in_own_dtype(kind(config(**(kit.SIZES | extra))).double())
    batch = PreferenceCollator(0)(kit.pairs())
    prompt = batch["input_ids"][:1, :9]
    own = kit.alone(model, batch)  # by transformers' own sdpa or eager function
    expected, said = (
        (own.detach(), kit.gradients(model, own)),
        model.generate(prompt, max_new_tokens=6, do_sample=False),
    )
    model.config._attn_implementation = "flash_attention_2"
    fuse_head(enable_segments(model))
    tolerance = 1e-5 if name in kit.IN_FLOAT32 else 1e-10
    for mode in ("padded", "packed", "shared"):
        package.calls.clear()
        layout = kit.check_equal(model, batch, expected, mode, tolerance)
        if mode == "shared":  # a prefix's keys come again before each segment that continues it
            again = int(layout.segments.prefix_lengths.sum())
            assert package.calls == [(layout.computed, layout.computed + again)] * 2
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).tolist() == said.tolist()
    assert package.asked == ["flash_attention_2"]


@pytest.mark.parametrize("kind", ["apart", "prefixed", "full and prefixed"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (4, 2.0)])
def test_an_installed_package_serves_other_models(attend, package, monkeypatch, kind, window, softcap):
    monkeypatch.setattr(varlen_attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(varlen_attention, "is_flash_attn_3_available", lambda: True)
    inputs, segments = attend.tensors(), attend.make(kind)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in inputs]
    layer = layer_of(flat, segments, window, softcap=softcap)
    got = scattered(KERNELS["FlashAttention"].run(flat, segments, layer), segments)
    expected = attend.by_definition(*inputs, segments, window=window, softcap=softcap)
    for ours, wanted in zip(
        attend.with_gradients(got, inputs), attend.with_gradients(expected, inputs), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, wanted)
    assert package.asked == ["flash_attention_3"]  # the newer one


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["apart", "prefixed", "full rows", "full and prefixed"])
def test_torchs_kernel_is_handed_tokens_without_padding(attend, monkeypatch, kind, window, grouped):
    """And keys of a prefix before those of what continues it; a torch whose kernel knows no enable_gqa included."""
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **extras):
        calls.append((len(query), len(key), max_q, max_k, window_size, extras))
        return attend.by_boundaries(query, key, value, cu_seq_q, cu_seq_k, scale, left=window_size[0])

    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    names = {"window_size", "scale"} | ({"enable_gqa"} if grouped else set())
    monkeypatch.setattr(varlen_attention, "varlen_parameters", lambda: frozenset(names))
    inputs, segments = attend.tensors(), attend.make(kind)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in inputs]
    layer = layer_of(flat, segments, window, scaling=8**-0.5)
    got = scattered(KERNELS["torch's varlen_attn"].run(flat, segments, layer), segments)
    expected = attend.by_definition(*inputs, segments, window=window)
    for ours, wanted in zip(
        attend.with_gradients(got, inputs), attend.with_gradients(expected, inputs), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, wanted)
    sizes = {
        "apart": (27, 27, 9, 9), "prefixed": (27, 27 + 5 + 5 + 7, 9, 9), "full rows": (33, 33, 11, 11),
        "full and prefixed": (33, 33 + 5 + 11, 11, 13),
    }  # fmt: skip
    left = -1 if window is None else window - 1
    assert calls == [(*sizes[kind], (left, 0), {"enable_gqa": True} if grouped else {})]


def test_torchs_kernel_has_the_interface_that_is_used():
    assert {"window_size", "scale"} <= varlen_attention.varlen_parameters()
    assert segment_kernels.KERNELS["torch's varlen_attn"].refuses is not None


def test_a_module_under_its_former_name():
    module = nn.Linear(2, 3)
    module.config = SimpleNamespace(_attn_implementation="ours", head_dim=4)
    under = Under(module, "flash_attention_2")
    assert under.config._attn_implementation == "flash_attention_2"
    assert under.config.head_dim == 4
    assert not hasattr(under.config, "_is_quantized")
    assert under.weight is module.weight
    assert module.config._attn_implementation == "ours"
