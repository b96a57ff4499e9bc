"""Attention to a prefix and oneself against torch's function on the keys of both, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalign.models.cpu_attention import attend_to_prefix, takes

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
