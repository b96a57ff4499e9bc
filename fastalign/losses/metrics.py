"""Metrics that add up: sums on the device, made into numbers once, when they are logged.

A mean is one `Metric(total, weight)`. A correlation is not a mean, but it is a function of five of them; those travel
under names that end in `/_x` … `/_xy` and `summarize` turns them into the one number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign.types import Metric

_MOMENTS = ("_x", "_y", "_xx", "_yy", "_xy")


def mean_metric(values: Tensor) -> Metric:
    """The mean of `values` (any shape, float) as a sum and a count, both detached, 0-dim and of the values' dtype."""
    values = values.detach()
    return Metric(values.sum(), values.new_full((), values.numel()))


def correlation_metrics(name: str, x: Tensor, y: Tensor, mask: Tensor | None = None) -> dict[str, Metric]:
    """What `summarize` needs to give Pearson's correlation of x and y (same shape, float) under `name`.

    mask: bool, where they count; x and y are finite outside it.
    """
    x, y = x.detach(), y.detach()
    moments = (x, y, x * x, y * y, x * y)
    if mask is None:
        return {f"{name}/{key}": mean_metric(value) for key, value in zip(_MOMENTS, moments, strict=True)}
    count = mask.sum().to(x.dtype)
    return {f"{name}/{key}": Metric((value * mask).sum(), count) for key, value in zip(_MOMENTS, moments, strict=True)}


def merge_metrics(*parts: Mapping[str, Metric]) -> dict[str, Metric]:
    """Metrics of several micro-batches as those of the whole. A name may be missing from some of the parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def summarize(metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
    """Merged metrics as final values: 0-dim tensors on the metrics' device (no host sync), by name.

    A correlation is nan where one of its variables does not vary: a single pair, or responses all of one length.
    """
    values: dict[str, Tensor] = {}
    for key, metric in metrics.items():
        name, _, part = key.rpartition("/")
        if part not in _MOMENTS:
            values[key] = metric.value
        elif part == _MOMENTS[-1]:
            values[name] = _correlation(*(metrics[f"{name}/{moment}"].value for moment in _MOMENTS))
    return values


def _correlation(x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    var_x, var_y = xx - x * x, yy - y * y
    noise = 8 * torch.finfo(xx.dtype).eps  # what the subtractions leave of a variable that is constant
    varies = (var_x > noise * xx) & (var_y > noise * yy)
    correlation = (xy - x * y) / torch.where(varies, var_x * var_y, 1.0).sqrt()
    return torch.where(varies, correlation.clamp(-1.0, 1.0), torch.nan)
