"""How the output of an elementwise kernel may overlap its input."""

from torch import Tensor


def narrow_alias(tile: Tensor, out: Tensor) -> bool:
    """Whether `out` is a narrower view over the rows of `tile`. ValueError for any other overlap but identity."""
    if out.device != tile.device or not _overlap(tile, out):
        return False
    same_start = out.data_ptr() == tile.data_ptr()
    if same_start and out.dtype == tile.dtype and out.stride() == tile.stride():
        return False
    same_pitch = out.stride(0) * out.element_size() == tile.stride(0) * tile.element_size() or tile.shape[0] == 1
    if same_start and same_pitch and tile.stride(1) == out.stride(1) == 1 and out.element_size() < tile.element_size():
        return True
    raise ValueError(
        f"out {out.dtype} with strides {tuple(out.stride())} overlaps tile {tile.dtype} with strides "
        f"{tuple(tile.stride())}; it may be the tile itself, a narrower view with the tile's address and row pitch and "
        "column stride 1, or other memory"
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the byte ranges that two non-empty tensors span meet."""
    spans = []
    for x in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
