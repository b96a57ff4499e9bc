"""Attention to a prefix and oneself against torch's function on the keys of both, and what it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastalign.models import cpu_attention
from fastalign.models.cpu_attention import attend_to_prefix, takes
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segments import Segments

torch.set_num_threads(1)


def inputs(own: int, prefix: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, own, 4, 8), *[(1, n, 2, 8) for n in (prefix, prefix, own, own)]]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def lower_right(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, columns), float("-inf"), dtype=dtype).triu(columns - rows + 1)[None, None]


def by_torch(q, prefix_k, prefix_v, k, v, mask, scale=None):
    keys, values = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((prefix_k, k), (prefix_v, v)))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )  # fmt: skip
    return out.transpose(1, 2)


def ours(q, prefix_k, prefix_v, k, v, mask, scale=None):
    return attend_to_prefix(q, (prefix_k, prefix_v), (k, v), mask, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "scale", "expanded"), [(7, None, False), (7, 0.3, True), (1, 0.3, False)])
def test_it_equals_torchs_function(own, scale, expanded, dtype):
    """Gradients too, also where the incoming one is a number repeated."""
    tensors = inputs(own, dtype=dtype)
    mask = None if own == 1 else lower_right(own, 5 + own, dtype)
    found = []
    for function in (ours, by_torch):
        output = function(*tensors, mask, scale)
        assert output.shape == (1, own, 4, 8)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        loss = output.sum() if expanded else (output * weights).sum()
        found.append((output, *torch.autograd.grad(loss, tensors)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


def test_gradients_are_those_of_the_definition():
    tensors = inputs(3)
    mask = lower_right(3, 8, torch.float64)
    torch.autograd.gradcheck(lambda *given: ours(*given, mask, 0.3), tensors)


def test_no_copy_of_the_prefix_is_kept():
    tensors = inputs(own=2, prefix=1000, dtype=torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def kept(function) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function(*tensors, None)
        assert output.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in known)

    copies = 2 * 1002 * 2 * 8 * 4
    assert kept(by_torch) >= copies
    assert kept(ours) < copies / 50


def test_what_it_takes():
    q, _, _, k, v = (tensor.detach() for tensor in inputs(3, dtype=torch.float32))
    assert takes(q, k, v)
    assert not takes(q, k.double(), v)
    assert not takes(q, k, v[..., :4])
    assert not takes(*(tensor.to("meta") for tensor in (q, k, v)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes(q, k, v)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not takes(q, k, v)


@pytest.fixture
def untried():
    """As in a new process, before and after."""
    cpu_attention.works.cache_clear()
    yield
    cpu_attention.works.cache_clear()


def missing(*args, **kwargs):
    raise AttributeError("'_OpNamespace' 'aten' object has no attribute '_scaled_dot_product_flash_attention_for_cpu'")


def called_otherwise(query, key, value, *, dropout_p=0.0, is_causal=False, attn_mask=None):
    raise TypeError("unexpected keyword argument 'scale'")


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CHANGES = {
    "no forward": ("_forward", missing, "has no attribute"),
    "no backward": ("_backward", missing, "has no attribute"),
    "another signature": ("_forward", called_otherwise, "unexpected keyword"),
    "more outputs": ("_forward", lambda *args, **kwargs: (*FORWARD(*args, **kwargs), None), "too many values"),
    "another meaning": ("_backward", lambda *args, **kwargs: BACKWARD(*args, **kwargs | {"scale": 0.5}), "not close"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_torch_falls_back_to_the_public_function(change, untried, monkeypatch, caplog):
    """And says so once; attention and its gradients stay what they are, checkpointed or not."""
    name, function, message = CHANGES[change]
    monkeypatch.setattr(cpu_attention, name, function)
    segments = Segments(np.array([[5, 3, 2]]), 10, prefixes=np.array([-1, 0, 0]))
    q, k, v = (torch.randn(1, heads, 10, 8, requires_grad=True) for heads in (4, 2, 2))
    whole = torch.randn(1, 10, 4, 8)

    def attention(q, k, v):
        return segment_attention(torch.nn.Module(), q, k, v, segments, "sdpa", sdpa_attention_forward, is_causal=True)

    output = checkpoint(attention, q, k, v, use_reentrant=False)
    got = (output, *torch.autograd.grad((output * whole).sum(), (q, k, v)))
    assert not cpu_attention.works()
    assert caplog.text.count("keeps a copy of each prefix") == 1
    assert message in caplog.text
    monkeypatch.undo()
    cpu_attention.works.cache_clear()
    output = attention(q, k, v)
    expected = (output, *torch.autograd.grad((output * whole).sum(), (q, k, v)))
    assert cpu_attention.works()
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
