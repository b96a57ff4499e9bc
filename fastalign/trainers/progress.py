"""The progress bar: loss, margin, accuracy, score, KL, tokens/s, padding and sharing beside step and time left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

# label: the metrics that it stands for, of which a trainer's first is shown, and its format in the bar
_SHOWN = {
    "loss": (("loss",), "{:.4f}"),
    "margin": (("rewards/margins", "margin"), "{:.3f}"),
    "accuracy": (("rewards/accuracies", "accuracy", "mean_token_accuracy"), "{:.3f}"),
    "correlation": (("label_correlation",), "{:.3f}"),
    "score": (("objective/scores",), "{:.3f}"),
    "KL": (("objective/kl",), "{:.3f}"),
    "tokens/s": (("tokens_per_second",), "{:,.0f}"),
    "padding": (("padding_waste",), "{:.0%}"),
    "sharing": (("sharing_ratio",), "{:.2f}x"),
}
_ALWAYS = ("loss", "objective/scores")  # one of them is in every evaluation: PPO's has no loss


class MetricsProgress(ProgressCallback):
    """On a terminal the bar carries the latest figures; elsewhere (a log file) each log is one short line."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {}
            for label, (names, form) in _SHOWN.items():
                if (name := _first(names, logs)) is not None:
                    shown[label] = form.format(logs[name])
            if sys.stderr.isatty():
                self.training_bar.set_postfix(shown)
            else:
                figures = ", ".join(f"{label} {value}" for label, value in shown.items())
                self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {figures}", file=sys.stderr)
        elif any(name.startswith("eval_") for name in logs):
            self.training_bar.write(evaluation_line(state.global_step, logs), file=sys.stderr)


def evaluation_line(step: int, logs: dict[str, Any]) -> str:
    """One line of an evaluation: loss, accuracy, ..., with their standard errors where they are known."""
    prefix = next(name.removesuffix(end) for name in logs for end in _ALWAYS if name.endswith(f"_{end}"))
    found = []
    for label in ("loss", "accuracy", "margin", "correlation", "score", "KL"):
        if (name := _first([f"{prefix}{name}" for name in _SHOWN[label][0]], logs)) is not None:
            error = logs.get(f"{name}_se")
            found.append(f"{label} {logs[name]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return f"{prefix.rstrip('_')} at step {step}: " + ", ".join(found)


def _first(names: Sequence[str], logs: dict[str, Any]) -> str | None:
    return next((name for name in names if logs.get(name) is not None), None)
