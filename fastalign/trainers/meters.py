"""Metrics between two log lines: summed on the device, over micro-batches and processes, and fetched once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastalign.losses import summarize
from fastalign.types import Metric


class Meter:
    """Adds up `Metric`s. One update costs two small kernels; `values` costs the one transfer to the host."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # names -> (2, names): totals, weights

    def __bool__(self) -> bool:
        return bool(self._sums)

    def update(self, metrics: Mapping[str, Metric]) -> None:
        """Add detached metrics of one batch. Batches that report other names are kept apart and merged in `values`."""
        if not metrics:
            return
        names = tuple(metrics)
        totals = [metric.total for metric in metrics.values()]
        weights = [metric.weight for metric in metrics.values()]
        # float64: a large evaluation adds up millions of nats. (MPS has no float64.)
        wide = torch.float32 if totals[0].device.type == "mps" else torch.float64
        sums = torch.stack([*totals, *weights]).detach().to(wide).view(2, -1)
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums

    def values(self, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[dict[str, float], dict[str, Metric]]:
        """(final values by name, the merged sums behind them as host tensors).

        reduce: sums a tensor over processes. Every process must have seen the same sets of names. A correlation that
        is undefined, because something did not vary, is left out.
        """
        merged: dict[str, Metric] = {}
        for names, sums in self._sums.items():
            host = (sums if reduce is None else reduce(sums)).cpu()
            for name, total, weight in zip(names, host[0], host[1], strict=True):
                metric = Metric(total, weight)
                merged[name] = merged[name].merge(metric) if name in merged else metric
        final = {name: float(value) for name, value in summarize(merged).items()}
        return {name: value for name, value in final.items() if name in merged or not math.isnan(value)}, merged

    def clear(self) -> None:
        self._sums.clear()


def standard_errors(sums: Mapping[str, Metric]) -> dict[str, float]:
    """Standard errors of the mean over pairs for accuracy and margin, from the sums of a preference loss's metrics.

    accuracy   sqrt(p(1 − p)/(n − 1))        margin   sqrt((E[m²] − E[m]²)/(n − 1))
    """
    accuracy, square = sums.get("rewards/accuracies"), sums.get("length/margin_correlation/_xx")
    margins = sums.get("rewards/margins")
    errors: dict[str, float] = {}
    if accuracy is not None and accuracy.weight > 1:
        p, n = float(accuracy.value), float(accuracy.weight)
        errors["rewards/accuracies_se"] = (max(p * (1 - p), 0.0) / (n - 1)) ** 0.5
        if margins is not None and square is not None:
            variance = float(square.value) - float(margins.value) ** 2
            errors["rewards/margins_se"] = (max(variance, 0.0) / (n - 1)) ** 0.5
    return errors
