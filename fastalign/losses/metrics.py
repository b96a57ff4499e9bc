"""Metrics that add up: sums on the device, made into numbers once, when they are logged.

A mean is one `Metric(total, weight)`. A correlation, a standard deviation, an explained variance and the standard error
of a ratio are not means, but functions of some; those travel under names that end in `/_x` … and `summarize` turns them
into the one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastalign.types import Metric

_MOMENTS = ("_x", "_y", "_xx", "_yy", "_xy")
_DEVIATION = ("_m", "_mm")  # means of m, m²
_EXPLAINED = ("_e", "_ee", "_r", "_rr")  # of what is left, of what is to be explained, and of their squares
_RATIO = ("_num", "_den", "_nn", "_nd", "_dd")  # of numerators, denominators, their squares and product


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


def deviation_metrics(name: str, x: Tensor, mask: Tensor | None = None) -> dict[str, Metric]:
    """What `summarize` needs to give the standard deviation (uncorrected) of x under `name`, in float64.

    mask: bool, where x counts; it is finite outside. nan of nothing.
    """
    return _means(name, _DEVIATION, x.detach().double(), mask)


def explained_variance_metrics(
    name: str, values: Tensor, returns: Tensor, mask: Tensor | None = None
) -> dict[str, Metric]:
    """What `summarize` needs to give 1 − Var(returns − values)/Var(returns) under `name`, in float64.

    1 is a perfect critic, 0 one that knows no more than a constant; nan where returns do not vary.
    """
    left, whole = (returns - values).detach().double(), returns.detach().double()
    return _means(name, _EXPLAINED[:2], left, mask) | _means(name, _EXPLAINED[2:], whole, mask)


def ratio_metrics(name: str, numerators: Tensor, denominators: Tensor) -> dict[str, Metric]:
    """`name`, Σ numerators / Σ denominators over groups (G,), and what `summarize` needs to give its standard error as
    `{name}_se`, in float64.

    Groups are what is independent, their parts are not: comparisons within one list share responses. With A = Σx/Σn the
    error is √(Σ(x − A·n)² · G/(G − 1)) / Σn (Cochran 1977 eq. 6.13), nan of fewer than two groups.
    """
    x, n = numerators.detach().double(), denominators.detach().double()
    moments = zip(_RATIO, (x, n, x * x, x * n, n * n), strict=True)
    return {name: Metric(x.sum(), n.sum())} | {f"{name}_se/{key}": mean_metric(value) for key, value in moments}


def _means(name: str, keys: tuple[str, ...], x: Tensor, mask: Tensor | None) -> dict[str, Metric]:
    weights = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    moments = (x, x * x)
    return {f"{name}/{key}": Metric((m * weights).sum(), weights.sum()) for key, m in zip(keys, moments, strict=True)}


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
    finished: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
        _MOMENTS[-1]: (_MOMENTS, _correlation), _DEVIATION[-1]: (_DEVIATION, _deviation),
        _EXPLAINED[-1]: (_EXPLAINED, _explained), _RATIO[-1]: (_RATIO, _ratio_error),
    }  # fmt: skip
    hidden = {*_MOMENTS, *_DEVIATION, *_EXPLAINED, *_RATIO}
    values: dict[str, Tensor] = {}
    for key, metric in metrics.items():
        name, _, part = key.rpartition("/")
        if part not in hidden:
            values[key] = metric.value
        elif part in finished:
            keys, function = finished[part]
            parts = [metrics[f"{name}/{moment}"] for moment in keys]
            counts = {"count": parts[0].weight} if function is _ratio_error else {}
            values[name] = function(*(metric.value for metric in parts), **counts)
    return values


def _ratio_error(x: Tensor, n: Tensor, xx: Tensor, xn: Tensor, nn: Tensor, count: Tensor) -> Tensor:
    ratio = x / n
    variance = (xx - 2 * ratio * xn + ratio * ratio * nn).clamp(min=0)
    return torch.where(count > 1, (variance / (count - 1).clamp(min=1)).sqrt() / n, torch.nan)


def _deviation(m: Tensor, mm: Tensor) -> Tensor:
    variance = mm - m * m
    noise = 8 * torch.finfo(mm.dtype).eps  # what the subtraction leaves of a constant
    return torch.where(variance <= noise * mm, 0.0, variance).sqrt()


def _explained(e: Tensor, ee: Tensor, r: Tensor, rr: Tensor) -> Tensor:
    left, whole = ee - e * e, rr - r * r
    varies = whole > 8 * torch.finfo(rr.dtype).eps * rr
    return torch.where(varies, 1 - left / torch.where(varies, whole, 1.0), torch.nan)


def _correlation(x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    var_x, var_y = xx - x * x, yy - y * y
    noise = 8 * torch.finfo(xx.dtype).eps  # what the subtractions leave of a variable that is constant
    varies = (var_x > noise * xx) & (var_y > noise * yy)
    correlation = (xy - x * y) / torch.where(varies, var_x * var_y, 1.0).sqrt()
    return torch.where(varies, correlation.clamp(-1.0, 1.0), torch.nan)
