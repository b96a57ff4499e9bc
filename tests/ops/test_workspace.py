"""Buffers are shared by name, and the largest outlives its call until it is given back."""

from __future__ import annotations

import torch

from fastalign.ops import free_workspace
from fastalign.ops.workspace import Workspace

CPU = torch.device("cpu")


def test_a_name_is_one_memory():
    workspace = Workspace(CPU)
    large = workspace.buffer("rows", (8, 4), torch.float32)
    small = workspace.buffer("rows", (2, 3), torch.float32)
    assert large.data_ptr() == small.data_ptr()
    assert small.is_contiguous()
    assert workspace.buffer("rows", (8, 4), torch.bfloat16).data_ptr() != large.data_ptr()
    assert workspace.buffer("rows", (9, 4), torch.float32).shape == (9, 4)


def test_the_next_call_takes_the_tile_over():
    free_workspace()
    first = Workspace(CPU)
    address = first.buffer("tile", (64, 512), torch.float32).data_ptr()
    first.release()
    assert Workspace(CPU).buffer("tile", (64, 511), torch.float32).data_ptr() == address


def test_a_tile_that_does_not_fit_is_let_go():
    free_workspace()
    first = Workspace(CPU)
    kept = first.buffer("tile", (64, 512), torch.float32)
    first.release()
    other = Workspace(CPU).buffer("tile", (64, 513), torch.float32)
    assert other.data_ptr() != kept.data_ptr()
    assert other.shape == (64, 513)


def test_what_is_given_back_is_not_handed_on():
    first = Workspace(CPU)
    kept = first.buffer("tile", (64, 512), torch.float32)
    first.release()
    free_workspace()
    assert Workspace(CPU).buffer("tile", (64, 512), torch.float32).data_ptr() != kept.data_ptr()
