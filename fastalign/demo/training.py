"""The three models: SFT on the clerks' answers, then DPO and R-DPO from it on the annotators' preferences."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback

from fastalign.demo.evaluation import Answers, Estimate, kl_of, sample_answers
from fastalign.demo.language import Annotators, Question, Writers, ask, gold_reward
from fastalign.demo.model import build_model
from fastalign.demo.plot import CurvePoint
from fastalign.demo.progress import Step
from fastalign.demo.settings import DemoSettings
from fastalign.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of answers to one question with the annotators' choice, and what the choices say about length."""

    rows: list[dict[str, str]]  # prompt, chosen, rejected: what DPOTrainer and `fastalign dpo` read
    length_difference: Estimate  # chosen − rejected, tokens
    longer_chosen: Estimate  # share of pairs in which the longer answer was chosen, of those that differ in length
    longer_chosen_at_equal_gold: Estimate  # the same, of those with equal gold rewards


def train_sft_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, settings: DemoSettings, on_step: Step
) -> PreTrainedModel:
    """A new model, taught to answer as the clerks do, and saved in `folder`."""
    rng, writers = random.Random(settings.seed), Writers()
    questions = [ask(rng) for _ in range(settings.sft_examples)]
    config = SFTConfig(
        **common_settings(folder, settings),
        learning_rate=settings.sft_learning_rate,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        token_metrics=False,
    )
    trainer = SFTTrainer(
        model=build_model(tokenizer, settings.seed),
        args=config,
        train_dataset=[{"prompt": q.prompt, "completion": f" {writers.write(q, rng)}"} for q in questions],
        processing_class=tokenizer,
        callbacks=[Bar(on_step, lambda logs: f"loss {logs['loss']:.3f}")],
    )
    return finished(trainer)


def common_settings(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """What the configs of all trainers here have in common."""
    return {
        "output_dir": str(folder),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "gradient_checkpointing": False,
        "use_cpu": True,  # at this size a GPU would only wait for its host
        "seed": settings.seed,
        "save_strategy": "no",
        "logging_steps": 8,
        "disable_tqdm": True,
        "report_to": "none",
    }


def finished(trainer: Trainer) -> PreTrainedModel:
    """Train, save, and return the model."""
    trainer.remove_callback(PrinterCallback)  # what Trainer puts in the place of its bar
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


class Bar(TrainerCallback):
    """Moves the bar at every step; `note` makes its text of a log line."""

    def __init__(self, on_step: Step, note: Callable[[dict[str, float]], str]) -> None:
        self._on_step, self._note, self._text = on_step, note, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(self._text)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._text = self._note(logs)


class Watch(TrainerCallback):
    """Samples answers to a few questions now and then, without disturbing the training."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, questions: list[Question], sft: PreTrainedModel, start: CurvePoint,
        settings: DemoSettings,
    ) -> None:  # fmt: skip
        self._tokenizer, self._questions, self._sft, self._settings = tokenizer, questions, sft, settings
        self.points = [start]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        points = self._settings.curve_points
        if state.global_step not in {round(state.max_steps * i / points) for i in range(1, points + 1)}:
            return
        policy = getattr(model, "policy", model)  # of PPO's two models
        answers = sample_answers(
            policy,
            self._tokenizer,
            self._questions,
            seed=self._settings.seed,
            max_new_tokens=self._settings.max_new_tokens,
        )
        self.points.append(curve_point(state.global_step, answers, kl_of(policy, self._sft, answers)))


def curve_point(step: int, answers: Answers, kl: np.ndarray) -> CurvePoint:
    return CurvePoint(step, Estimate.of(answers.rewards), Estimate.of(answers.lengths), Estimate.of(kl))


def collect_preferences(
    tokenizer: PreTrainedTokenizerFast, annotators: Annotators, settings: DemoSettings
) -> Preferences:
    """Two clerks answer each question, differently, and an annotator chooses."""
    rng, writers = random.Random(f"preferences {settings.seed}"), Writers()
    rows: list[dict[str, str]] = []
    gold: list[float] = []
    length: list[float] = []
    while len(rows) < settings.preference_pairs:
        question = ask(rng)
        one, two = (writers.write(question, rng) for _ in range(2))
        if one == two:
            continue
        differences = [
            gold_reward(question, one) - gold_reward(question, two),
            len(tokenizer(one)["input_ids"]) - len(tokenizer(two)["input_ids"]),
        ]
        if rng.random() >= annotators.p_prefer(*differences):
            one, two, differences = two, one, [-value for value in differences]
        rows.append({"prompt": question.prompt, "chosen": f" {one}", "rejected": f" {two}"})
        gold.append(differences[0])
        length.append(differences[1])
    gold_of, length_of = np.array(gold), np.array(length)
    unequal = length_of != 0
    longer = length_of > 0
    return Preferences(
        rows=rows,
        length_difference=Estimate.of(length_of),
        longer_chosen=Estimate.of(longer[unequal]),
        longer_chosen_at_equal_gold=Estimate.of(longer[unequal & (gold_of == 0)]),
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """A trained policy, how it got there, and where its reference log-probs came from."""

    model: PreTrainedModel
    curve: list[CurvePoint]
    cached_logps: int  # sequences found in the cache
    computed_logps: int


def train_policy(
    name: str,
    sft_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    preferences: Preferences,
    settings: DemoSettings,
    *,
    length_alpha: float,
    watch: Watch,
    on_step: Step,
) -> Policy:
    """Train a policy from the model in `sft_folder` and save it beside; both policies see the pairs in one order."""
    folder = sft_folder.parent
    config = DPOConfig(
        **common_settings(folder / name, settings),
        cache_dir=str(folder / "reference-cache"),
        beta=settings.beta,
        length_alpha=length_alpha,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
    )
    trainer = DPOTrainer(
        model=str(sft_folder),
        args=config,
        train_dataset=preferences.rows,
        processing_class=tokenizer,
        callbacks=[Bar(on_step, _dpo_note), watch],
    )
    model = finished(trainer)
    report = trainer.reference_cache.report
    assert report is not None
    return Policy(model, watch.points, report.cached, report.computed)


def _dpo_note(logs: dict[str, float]) -> str:
    margin, accuracy = logs["rewards/margins"], logs["rewards/accuracies"]
    return f"loss {logs['loss']:.3f}  margin {margin:.2f}  accuracy {accuracy:.0%}"
