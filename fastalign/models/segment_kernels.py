"""Which kernel attends within segments on a GPU: the first that takes what a layer asks for and proves it in a trial.

    FlashAttention       where it is installed; 16 bits
    torch's varlen_attn  16 bits, without a softcap
    FlexAttention        any precision, softcap, window and size, if it can be compiled

Where none does, SDPA or the eager function is called for each segment. What was chosen, and why not another one, is
logged once for each kind of layer.
"""

from __future__ import annotations

import functools
import logging
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign.models import flex_attention, varlen_attention
from fastalign.models.segments import Segments
from fastalign.models.trials import in_own_thread

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
"""Types of device whose layers may be taken by a kernel."""

_NARROW = (torch.bfloat16, torch.float16)
_LARGEST_VARLEN = 256
_SMALLEST_FLEX = 16
_TRIALS = (((70, 90, 33, 150), (-1, 0, 0, -1)), ((129, 7, 200, 60, 90), (1, -1, -1, 2, 2)))
"""Lengths and prefixes of segments; two of them, as FlexAttention compiles for any length only at the second one."""
_TOLERANCE = 2e-2  # of the largest value: a wrong mask is off by far more, a 16-bit or TF32 product by less


class Layer(NamedTuple):
    """What a layer asks for. window: None where no segment reaches beyond it."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    dropout: float = 0.0


class Kernel(NamedTuple):
    """refuses(layer): why it does not take one, or None. run(flat, segments, layer): (N, heads, D)."""

    refuses: Callable[[Layer], str | None]
    run: Callable[[list[Tensor], Segments, Layer], Tensor]


def layer_of(flat: list[Tensor], segments: Segments, window: int | None, **asked: Any) -> Layer:
    """flat: query (B·T, heads, D), key and value (B·T, key heads, D)."""
    query, key, value = flat
    if window is not None and segments.longest_keys <= window:
        window = None
    return Layer(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2], value.shape[2], window, **asked
    )


@functools.cache
def tell(how: str) -> None:
    """Say it once."""
    logger.info("attention of packed batches by %s", how)


@functools.cache
def choose(layer: Layer) -> str | None:
    """The name of the kernel in KERNELS, or None."""
    reasons: list[str] = []
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(layer)
        if reason is None:
            reason = failure(kernel, layer)
            if reason is not None:
                logger.warning("attention of packed batches without %s, whose trial failed: %s", name, reason)
        if reason is None:
            tell(f"{name} ({'; '.join([_words(layer), *reasons])})")
            return name
        reasons.append(f"not {name}: {reason}")
    tell(f"a call a segment ({'; '.join([_words(layer), *reasons])})")
    return None


def _words(layer: Layer) -> str:
    extras = {"window": layer.window, "softcap": layer.softcap, "dropout": layer.dropout}
    told = [f"{name} {value}" for name, value in extras.items() if value]
    return ", ".join([_name(layer.dtype), f"heads of {layer.size}", *told])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def failure(kernel: Kernel, layer: Layer) -> str | None:
    """Why a kernel is not to be relied on: what it raised, or that it computes something else. None: it is right."""
    try:
        in_own_thread(functools.partial(_try, kernel, layer))
    except Exception as error:  # a missing compiler, an old GPU, another version of a package, …
        return textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder=" …")
    return None


def _try(kernel: Kernel, layer: Layer) -> None:
    """Raise AssertionError unless outputs and gradients are those of a plain softmax in float32."""
    window = None if layer.window is None else min(layer.window, 50)
    layer = layer._replace(window=window, dropout=0.0)
    with torch.cuda.device(layer.device) if layer.device.type == "cuda" else nullcontext():
        for lengths, prefixes in _TRIALS:
            _try_on(kernel, layer, Segments(np.array([lengths]), sum(lengths), prefixes=np.array(prefixes)))


def _try_on(kernel: Kernel, layer: Layer, segments: Segments) -> None:
    tokens = segments.shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(layer.heads, layer.size), (layer.key_heads, layer.size), (layer.key_heads, layer.value_size)]
    inputs = [torch.randn(tokens, *shape, generator=generator).to(layer.device, layer.dtype) for shape in shapes]
    weights = torch.randn(tokens, layer.heads, layer.value_size, generator=generator).to(layer.device)
    found = []
    for function in (lambda given: kernel.run(given, segments, layer), lambda given: plainly(given, segments, layer)):
        given = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        output = function(given)
        found.append([output, *torch.autograd.grad((output.float() * weights).sum(), given)])
    for what, ours, wanted in zip(("output", "query", "key", "value"), *found, strict=True):
        ours, wanted = ours.detach().float(), wanted.detach().float()
        error = float((ours - wanted).abs().max() / wanted.abs().max())
        if not error <= _TOLERANCE:
            name = what if what == "output" else f"gradient of the {what}"
            raise AssertionError(f"the {name} is off by {error:.2g} of its largest value")


def plainly(flat: list[Tensor], segments: Segments, layer: Layer) -> Tensor:
    """(N, heads, D) by definition, in float32, under a mask of all tokens by all tokens: for few of them."""
    number, before, place = segments.columns()
    index = np.arange(len(number))
    seen = (number[:, None] == number) & (index <= index[:, None]) | (before[:, None] == number)
    if layer.window is not None:
        seen &= place[:, None] - place < layer.window
    query, key, value = (tensor.float().transpose(0, 1) for tensor in flat)
    key, value = (tensor.repeat_interleave(layer.heads // layer.key_heads, dim=0) for tensor in (key, value))
    scores = query @ key.transpose(1, 2) * (layer.size**-0.5 if layer.scaling is None else layer.scaling)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~torch.from_numpy(seen).to(layer.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


# The kernels ----------------------------------------------------------------------------------------------------------


def _flash_refuses(layer: Layer) -> str | None:
    if not varlen_attention.flash_packages():
        return "it is not installed"
    return _varlen_shapes(layer)


def _flash(flat: list[Tensor], segments: Segments, layer: Layer) -> Tensor:
    return varlen_attention.installed_flash(
        varlen_attention.flash_packages()[0], flat, segments, sliding_window=layer.window, softcap=layer.softcap,
        scaling=layer.scaling, dropout=layer.dropout,
    )  # fmt: skip


def _varlen_refuses(layer: Layer) -> str | None:
    if "window_size" not in varlen_attention.varlen_parameters():
        return f"torch {torch.__version__} has none with a causal mask for fewer queries than keys"
    if torch.version.cuda is None:
        return "it needs CUDA"
    if layer.softcap is not None or layer.dropout:
        return f"it has no {'softcap' if layer.softcap is not None else 'dropout'}"
    return _varlen_shapes(layer)


def _varlen_shapes(layer: Layer) -> str | None:
    if layer.dtype not in _NARROW:
        return f"it takes no {_name(layer.dtype)}"
    if layer.size != layer.value_size or layer.size % 8 or layer.size > _LARGEST_VARLEN:
        return f"heads of {layer.size} ({layer.value_size} for values)"
    return None


def _varlen(flat: list[Tensor], segments: Segments, layer: Layer) -> Tensor:
    return varlen_attention.varlen(flat, segments, window=layer.window, scaling=layer.scaling)


def _flex_refuses(layer: Layer) -> str | None:
    if layer.device.type == "cpu":
        return "it has no backward on a CPU"
    if layer.dtype not in (torch.float32, *_NARROW):
        return f"it takes no {_name(layer.dtype)}"
    if layer.dropout:
        return "it has no dropout"
    if min(layer.size, layer.value_size) < _SMALLEST_FLEX:
        return f"heads of {layer.size} ({layer.value_size} for values)"
    return None


def _flex(flat: list[Tensor], segments: Segments, layer: Layer) -> Tensor:
    positions = segments.varlen(flat[0].device).positions
    query, key, value = flat if positions is None else [tensor.index_select(0, positions) for tensor in flat]
    return flex_attention.attend(
        query, key, value, segments, window=layer.window, softcap=layer.softcap, scaling=layer.scaling
    )


KERNELS = {
    "FlashAttention": Kernel(_flash_refuses, _flash),
    "torch's varlen_attn": Kernel(_varlen_refuses, _varlen),
    "FlexAttention": Kernel(_flex_refuses, _flex),
}
