"""The three models: SFT on the clerks' answers, then DPO and R-DPO from it on the annotators' preferences."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from fastalign.demo.evaluation import Answers, Estimate, sample_answers
from fastalign.demo.language import Annotators, Question, Writers, ask, gold_reward
from fastalign.demo.model import build_model
from fastalign.demo.plot import CurvePoint
from fastalign.demo.progress import Step
from fastalign.demo.settings import DemoSettings
from fastalign.demo.sft import train_sft
from fastalign.reference import TokenSequence
from fastalign.trainers import DPOConfig, DPOTrainer


@dataclass(frozen=True, slots=True)
class Preferences:
    """Pairs of answers to one question with the annotators' choice, and what the choices say about length."""

    rows: list[dict[str, str]]  # prompt, chosen, rejected: what DPOTrainer and `fastalign dpo` read
    length_difference: Estimate  # chosen − rejected, tokens
    longer_chosen: Estimate  # share of pairs in which the longer answer was chosen, of those that differ in length
    longer_chosen_at_equal_gold: Estimate  # the same, of those with equal gold rewards


def train_sft_model(tokenizer: PreTrainedTokenizerFast, settings: DemoSettings, on_step: Step) -> PreTrainedModel:
    """A new model, taught to answer as the clerks do."""
    rng, writers = random.Random(settings.seed), Writers()
    sequences = []
    for _ in range(settings.sft_examples):
        question = ask(rng)
        prompt = tokenizer(question.prompt)["input_ids"]
        answer = tokenizer(f" {writers.write(question, rng)}")["input_ids"]
        sequences.append(TokenSequence(prompt + answer + [tokenizer.eos_token_id], len(prompt)))
    model = build_model(tokenizer, settings.seed)
    train_sft(
        model,
        sequences,
        batch_size=settings.batch_size,
        learning_rate=settings.sft_learning_rate,
        seed=settings.seed,
        on_step=on_step,
    )
    return model


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
    start: CurvePoint,
    curve_questions: list[Question],
    on_step: Step,
) -> Policy:
    """Train a policy from the model in `sft_folder` and save it beside; both policies see the pairs in one order."""
    folder = sft_folder.parent
    config = DPOConfig(
        output_dir=str(folder / name),
        cache_dir=str(folder / "reference-cache"),
        beta=settings.beta,
        length_alpha=length_alpha,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        gradient_checkpointing=False,
        use_cpu=True,  # at this size a GPU would only wait for its host
        seed=settings.seed,
        save_strategy="no",
        logging_steps=8,
        disable_tqdm=True,
        report_to="none",
    )
    callback = _Watch(tokenizer, curve_questions, start, settings, on_step)
    trainer = DPOTrainer(
        model=str(sft_folder),
        args=config,
        train_dataset=preferences.rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # what Trainer puts in the place of its bar
    trainer.train()
    trainer.save_model()
    report = trainer.reference_cache.report
    assert report is not None
    return Policy(trainer.model.eval(), callback.points, report.cached, report.computed)


class _Watch(TrainerCallback):
    """Moves the bar, and samples answers to a few questions now and then, without disturbing the training."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        questions: list[Question],
        start: CurvePoint,
        settings: DemoSettings,
        on_step: Step,
    ) -> None:
        self._tokenizer, self._questions, self._settings, self._on_step = tokenizer, questions, settings, on_step
        self._note = ""
        self.points = [start]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._on_step(self._note)
        points = self._settings.curve_points
        if state.global_step in {round(state.max_steps * i / points) for i in range(1, points + 1)}:
            answers = sample_answers(
                model,
                self._tokenizer,
                self._questions,
                seed=self._settings.seed,
                max_new_tokens=self._settings.max_new_tokens,
            )
            self.points.append(curve_point(state.global_step, answers))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            margin, accuracy = logs["rewards/margins"], logs["rewards/accuracies"]
            self._note = f"loss {logs['loss']:.3f}  margin {margin:.2f}  accuracy {accuracy:.0%}"


def curve_point(step: int, answers: Answers) -> CurvePoint:
    return CurvePoint(step, Estimate.of(answers.rewards), Estimate.of(answers.lengths))
