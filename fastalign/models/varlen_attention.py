"""Variable-length kernels over segments: FlashAttention's, and the one that comes with torch.

Both take the tokens of one sequence after the other and the boundaries between them, of queries and of keys. The keys
of a segment that continues another one are that one's and its own; with fewer queries than keys the causal mask of both
ends in the lower right corner, as it has to be.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from fastalign.models.segments import Segments

Implementation = Callable[..., tuple[Tensor, Tensor | None]]


class Under:
    """An attention module as its implementation knew it before another one was put over: by its config's name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self.config = module, _Config(getattr(module, "config", None), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Config:
    def __init__(self, config: Any, name: str) -> None:
        self._config, self._attn_implementation = config, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def flash(module: Any, flat: list[Tensor], segments: Segments, implementation: Implementation, **kwargs: Any) -> Tensor:
    """(N, heads, D) by transformers' FlashAttention function, which takes the boundaries of a row (1, N)."""
    index = segments.varlen(flat[0].device)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in gathered(flat, segments))
    boundaries = {
        "cu_seq_lens_q": index.cu_seqlens, "cu_seq_lens_k": index.cu_seqlens_k, "max_length_q": index.longest,
        "max_length_k": index.longest_k,
    }  # fmt: skip
    return implementation(module, q, k, v, None, **(kwargs | boundaries))[0][0]


def flash_packages() -> list[str]:
    """Transformers' names of the FlashAttention packages that are installed, the newer first."""
    available = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    return [name for name, installed in available.items() if installed()]


def installed_flash(name: str, flat: list[Tensor], segments: Segments, **kwargs: Any) -> Tensor:
    """`flash` by a package of `flash_packages`, for a model that does not ask for it itself."""
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation=name))
    return flash(module, flat, segments, ALL_ATTENTION_FUNCTIONS[name], **kwargs)


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """What torch's kernel can be told: more, from one version to the next."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(flat: list[Tensor], segments: Segments, *, window: int | None, scaling: float | None) -> Tensor:
    """(N, heads, D) by torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    index = segments.varlen(flat[0].device)
    q, k, v = gathered(flat, segments)
    grouped: dict[str, Any] = {}
    if "enable_gqa" in varlen_parameters():
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    output = varlen_attn(
        q, k, v, index.cu_seqlens, index.cu_seqlens_k, index.longest, index.longest_k, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


def gathered(flat: list[Tensor], segments: Segments) -> list[Tensor]:
    """Queries without padding; keys and values of one segment after the other, each behind its prefix's."""
    index = segments.varlen(flat[0].device)
    positions = (index.positions, index.key_positions, index.key_positions)
    return [
        tensor.contiguous() if places is None else tensor.index_select(0, places)
        for tensor, places in zip(flat, positions, strict=True)
    ]


def scattered(output: Tensor, segments: Segments) -> Tensor:
    """(B, T, heads, D) of an output (N, heads, D), 0 in the padding."""
    positions = segments.varlen(output.device).positions
    if positions is not None:
        whole = output.new_zeros(segments.shape[0] * segments.shape[1], *output.shape[1:])
        output = whole.index_copy(0, positions, output)
    return output.unflatten(0, segments.shape)
