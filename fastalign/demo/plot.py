"""The figure of the demonstration: length and reward during training, reward against KL, and final lengths."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastalign.demo.evaluation import Estimate

COLOURS = {"SFT": "#7a7f87", "DPO": "#d1640b", "R-DPO": "#1f6fb2", "PPO": "#2b8a57"}


class CurvePoint(NamedTuple):
    """What a policy's answers were like after `step` steps of its training."""

    step: int
    gold: Estimate
    length: Estimate
    kl: Estimate  # KL(policy ‖ SFT) in nats an answer


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def draw(
    curves: Mapping[str, Sequence[CurvePoint]], lengths: Mapping[str, np.ndarray], sft: CurvePoint, png: Path
) -> str:
    """Write the figure to `png` and return it as SVG text. Needs matplotlib; opens no window and keeps its settings.

    curves: policy -> its points, in order. lengths: model -> (Q,) answer lengths in tokens. sft: the SFT model's.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global figure, no window system

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastalign",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        (length_axes, gold_axes), (plane_axes, spread_axes) = figure.subplots(2, 2)
        _curves(length_axes, curves, "length", sft)
        length_axes.set(title="Mean answer length", xlabel="% of training", ylabel="tokens", ylim=(0, None))
        _curves(gold_axes, curves, "gold", sft)
        gold_axes.set(title="Gold reward", xlabel="% of training", ylim=(None, 1))
        _plane(plane_axes, curves)
        plane_axes.set(title="Reward and KL", xlabel="KL(policy ‖ SFT), nats an answer", ylabel="gold reward")
        _spread(spread_axes, lengths)
        spread_axes.set(title="Length of the final answers", xlabel="tokens", ylabel="share of answers")
        length_axes.legend(frameon=False)
        figure.savefig(png, dpi=150)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    return text[text.index("<svg") :]


def _curves(axes: Any, curves: Mapping[str, Sequence[CurvePoint]], quantity: str, sft: CurvePoint) -> None:
    """A line a policy with a band of two standard errors, and a dashed line for the SFT model."""
    axes.axhline(getattr(sft, quantity).mean, color=COLOURS["SFT"], linestyle="--", linewidth=1.3, label="SFT")
    for name, points in curves.items():
        steps = [100 * point.step / max(points[-1].step, 1) for point in points]
        means = np.array([getattr(point, quantity).mean for point in points])
        errors = 2 * np.array([getattr(point, quantity).stderr for point in points])
        axes.plot(steps, means, color=COLOURS[name], marker="o", markersize=3.5, linewidth=1.8, label=name)
        axes.fill_between(steps, means - errors, means + errors, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.grid(axis="y", alpha=0.25)


def _plane(axes: Any, curves: Mapping[str, Sequence[CurvePoint]]) -> None:
    """The way of each policy from the SFT model, which is at KL 0; the last point is the largest."""
    for name, points in curves.items():
        kl, gold = [point.kl.mean for point in points], [point.gold.mean for point in points]
        axes.plot(kl, gold, color=COLOURS[name], marker="o", markersize=3, linewidth=1.3, label=name)
        axes.plot(kl[-1:], gold[-1:], color=COLOURS[name], marker="o", markersize=8)
    axes.set(xlim=(0, None), ylim=(None, 1))
    axes.grid(alpha=0.25)


def _spread(axes: Any, lengths: Mapping[str, np.ndarray]) -> None:
    edges = np.linspace(0, max(int(values.max()) for values in lengths.values()) + 1, 25)
    for name, values in lengths.items():
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=weights, histtype="step", color=COLOURS[name], linewidth=1.8, label=name)
