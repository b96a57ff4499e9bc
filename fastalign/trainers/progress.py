"""The progress bar: loss, margin, accuracy and tokens/s beside the step and the time left."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class MetricsProgress(ProgressCallback):
    """On a terminal the bar carries the latest figures; elsewhere (a log file) each log is one short line."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {label: form.format(logs[name]) for name, (label, form) in _SHOWN.items() if name in logs}
            if sys.stderr.isatty():
                self.training_bar.set_postfix(shown)
            else:
                figures = ", ".join(f"{label} {value}" for label, value in shown.items())
                self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {figures}", file=sys.stderr)
        elif any(name.startswith("eval_") for name in logs):
            self.training_bar.write(evaluation_line(state.global_step, logs), file=sys.stderr)


def evaluation_line(step: int, logs: dict[str, Any]) -> str:
    """One line of an evaluation: loss, accuracy and margin with their standard errors."""
    prefix = next(name for name in logs if name.endswith("_loss")).removesuffix("loss")

    def figure(name: str) -> str | None:
        value, error = logs.get(f"{prefix}{name}"), logs.get(f"{prefix}{name}_se")
        return None if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    parts = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    found = {label: figure(name) for name, label in parts.items()}
    return f"{prefix.rstrip('_')} at step {step}: " + ", ".join(f"{k} {v}" for k, v in found.items() if v is not None)
