"""FlexAttention over segments: what is seen, which blocks that takes, and what a CPU can show of the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from fastalign.models import flex_attention
from fastalign.models.flex_attention import BLOCK, block_mask, needed_blocks
from fastalign.models.segment_kernels import Layer, plainly
from fastalign.models.segments import Segments

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
WINDOWS = st.sampled_from([None, 1, 7, 100, 128, 129, 300, 5000])


@st.composite
def segments_of(draw, longest=400):
    """Groups with and without a prefix, in any order, prefixes behind what continues them included."""
    lengths, prefixes = [], []
    for _ in range(draw(st.integers(1, 4))):
        members = draw(st.integers(0, 3))
        prefix = len(lengths)
        lengths += [draw(st.integers(1, longest)) for _ in range(1 + members)]
        prefixes += [-1] + [prefix] * members
    order = np.array(draw(st.permutations(range(len(lengths)))))
    where = np.argsort(order)
    moved = [-1 if prefixes[i] < 0 else int(where[prefixes[i]]) for i in order]
    return Segments(np.array(lengths)[order][None], sum(lengths), prefixes=np.array(moved))


def seen_tokens(segments: Segments, window: int | None) -> np.ndarray:
    """(N, N) bool, token by token: the keys of one's prefix and one's own up to oneself, of those the last `window`."""
    ends = np.cumsum(segments.lengths)
    spans = [list(range(end - n, end)) for end, n in zip(ends.tolist(), segments.lengths.tolist(), strict=True)]
    seen = np.zeros((ends[-1], ends[-1]), bool)
    for span, prefix in zip(spans, segments.prefixes.tolist(), strict=True):
        before = spans[prefix] if prefix >= 0 else []
        for i, token in enumerate(span):
            keys = before + span[: i + 1]
            seen[token, keys if window is None else keys[-window:]] = True
    return seen


@settings(max_examples=60, deadline=None)
@given(segments_of(), WINDOWS)
def test_the_blocks_are_those_that_are_needed(segments, window):
    """No block is missing, none is computed in vain, and one that needs no mask indeed needs none."""
    seen = seen_tokens(segments, window)
    needed, whole = needed_blocks(segments, window)
    starts = np.arange(0, len(seen), BLOCK)
    some = np.logical_or.reduceat(np.logical_or.reduceat(seen, starts, axis=0), starts, axis=1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(seen, starts, axis=0), starts, axis=1)
    np.testing.assert_array_equal(needed, some)
    assert not (whole & ~every).any()


def test_long_segments_have_blocks_without_a_mask():
    needed, whole = needed_blocks(Segments(np.array([[512, 640]]), 1152, prefixes=np.array([-1, 0])), None)
    assert whole[8].tolist() == [True] * 8 + [
        False
    ]  # the last queries: all of the prefix, their own up to the diagonal
    assert needed.sum() - whole.sum() == 9
    _, near = needed_blocks(Segments(np.array([[512, 640]]), 1152, prefixes=np.array([-1, 0])), 300)
    assert near[8].tolist() == [False] * 7 + [True, False]


@settings(max_examples=30, deadline=None)
@given(segments_of(longest=90), WINDOWS)
def test_what_is_seen(segments, window):
    mask, seen = block_mask(segments, window, torch.device("cpu")), seen_tokens(segments, window)
    index = torch.arange(len(seen))
    got = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    np.testing.assert_array_equal(got.numpy(), seen)
    assert mask.shape == (1, 1, *seen.shape)
    needed, whole = needed_blocks(segments, window)
    lists = (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
    for (counts, which), blocks in zip(lists, (needed & ~whole, whole), strict=True):
        for row, (count, own) in enumerate(zip(counts[0, 0].tolist(), which[0, 0].tolist(), strict=True)):
            assert own[:count] == np.flatnonzero(blocks[row]).tolist()


def test_a_layout_has_one_block_mask_for_each_window(monkeypatch):
    made = []
    monkeypatch.setattr(flex_attention, "block_mask", lambda *args: made.append(args[1]) or block_mask(*args))
    segments = Segments(np.array([[3, 4]]), 7)
    tensors = [torch.randn(7, heads, 16) for heads in (4, 2, 2)]
    for window in (None, 2, None, 2):
        flex_attention.attend(*tensors, segments, window=window, softcap=None, scaling=None, compiled=False)
    assert made == [None, 2]


KINDS = {"prefixes": ([70, 90, 33, 20], [-1, 0, 0, -1], 4), "behind": ([20, 150, 40], [1, -1, 1], 2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_output_and_gradients_of_pytorchs_dense_version(kind, window, softcap, monkeypatch):
    """It runs on a CPU, backward too: only FlexAttention's front refuses that, for the sake of the compiled kernel."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    lengths, prefixes, heads = KINDS[kind]
    segments = Segments(np.array([lengths]), sum(lengths), prefixes=np.array(prefixes))
    layer = Layer(torch.device("cpu"), torch.float32, heads, 2, 16, 16, window, softcap, 0.3)
    torch.manual_seed(0)
    tensors = [torch.randn(sum(lengths), own, 16, requires_grad=True) for own in (heads, 2, 2)]
    weights = torch.randn(sum(lengths), heads, 16)
    ours = flex_attention.attend(*tensors, segments, window=window, softcap=softcap, scaling=0.3, compiled=False)
    plain = plainly(tensors, segments, layer)
    found = [(out, *torch.autograd.grad((out * weights).sum(), tensors)) for out in (ours, plain)]
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_compiled_for_any_number_of_tokens():
    """By the C++ compiler, which reads the lists of blocks as a GPU's kernel does; forward alone."""
    rng = np.random.default_rng(0)
    layer = Layer(torch.device("cpu"), torch.float32, 4, 2, 16, 16, scaling=0.25)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for lengths, prefixes in (
            ([300, 90, 33], [-1, 0, 0]), ([129, 7, 500, 60, 90], [1, -1, -1, 2, 2]), ([900, 1], [-1, 0]),
            (rng.integers(1, 200, 20).tolist(), [-1] * 20), ([40, 8, 8], [-1, 0, 0]),
        ):  # fmt: skip
            segments = Segments(np.array([lengths]), sum(lengths), prefixes=np.array(prefixes))
            tensors = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2)]
            got = flex_attention.attend(*tensors, segments, window=None, softcap=None, scaling=0.25)
            torch.testing.assert_close(got, plainly(tensors, segments, layer), rtol=1e-5, atol=1e-5)
