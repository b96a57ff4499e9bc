"""Rankings to a policy, in several ways: PRO on the lists, or DPO on pairs of the best answer against every other.

The same lists of four answers, ranked by the demonstration's annotators; the same SFT model, steps, lists a step,
optimizer and number of learning rates tried. Each way takes the learning rate that is best on validation questions,
over all seeds, and answers other questions with it. What counts is the gold reward, which no way sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastalign.data import lists_to_pairs
from fastalign.demo.evaluation import Answers, Estimate, kl_of, sample_answers
from fastalign.demo.experiment import one_thread
from fastalign.demo.language import Annotators, Question, ask
from fastalign.demo.model import build_tokenizer
from fastalign.demo.rlhf import ANSWERS_PER_RANKING, collect_rankings, reward_batch_size
from fastalign.demo.settings import DemoSettings
from fastalign.demo.training import common_settings, finished, train_sft_model
from fastalign.trainers import DPOConfig, DPOTrainer, PROConfig, PROTrainer

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Score:
    """A policy's answers to the questions of a seed."""

    way: str
    seed: int
    learning_rate: float
    gold: Estimate
    length: Estimate  # tokens
    kl: Estimate  # KL(policy ‖ SFT) of an answer, nats


@dataclass(frozen=True, slots=True)
class Comparison:
    """`tuning`: the validation questions of every seed, every way and learning rate. `scores`: the test questions of
    every seed, the SFT model first. `differences`: gold reward of a way less that of DPO, by way, of each seed over its
    questions, which are the same for all; `overall`: over the seeds.
    """

    tuning: list[Score]
    scores: list[Score]
    differences: dict[str, list[Estimate]]
    overall: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _dpo(sft: Path, rows: Rows, common: dict[str, Any], settings: DemoSettings) -> DPOTrainer:
    config = DPOConfig(
        **common,
        beta=settings.beta,
        cache_dir=str(sft.parent / "reference-cache"),
        per_device_train_batch_size=reward_batch_size(settings) * (ANSWERS_PER_RANKING - 1),
    )
    return DPOTrainer(str(sft), args=config, train_dataset=lists_to_pairs(rows, "best_rest"))


def _pro(sft: Path, rows: Rows, common: dict[str, Any], settings: DemoSettings) -> PROTrainer:
    config = PROConfig(**common, per_device_train_batch_size=reward_batch_size(settings))
    return PROTrainer(str(sft), args=config, train_dataset=rows)


def _relative_pro(sft: Path, rows: Rows, common: dict[str, Any], settings: DemoSettings) -> PROTrainer:
    config = PROConfig(
        **common,
        reference_free=False,
        beta=settings.beta,
        cache_dir=str(sft.parent / "reference-cache"),
        per_device_train_batch_size=reward_batch_size(settings),
    )
    return PROTrainer(str(sft), args=config, train_dataset=rows)


class Way(NamedTuple):
    """make: from the SFT model's folder, the lists and the common settings to a trainer. learning_rates: what is tried,
    around the best of a wider grid on one seed.
    """

    make: Callable[[Path, Rows, dict[str, Any], DemoSettings], DPOTrainer | PROTrainer]
    learning_rates: tuple[float, ...]


DPO = "DPO, best against rest"
WAYS = {
    DPO: Way(_dpo, (1.2e-3, 2.4e-3, 4.8e-3)),
    "PRO": Way(_pro, (2.4e-3, 4.8e-3, 9.6e-3)),
    "PRO, from the reference": Way(_relative_pro, (1.2e-3, 2.4e-3, 4.8e-3)),
}
"""What is compared: DPO at the demonstration's beta; PRO as published, mean log-probs with its SFT term; and PRO on the
rewards of DPO, at DPO's beta, which without ties is Plackett and Luce's model."""


def compare(
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] | None = None,
    **settings: Any,
) -> Comparison:
    """Train and score every way on every seed; see the module. One thread of the CPU.

    learning_rates: those of every way, if not its own. settings: fields of `DemoSettings`, of which `ranked_questions`
    is the number of lists and `questions` that of test questions; there are half as many for validation. Everything is
    written below output_dir.
    """
    if len(seeds) < 2:
        raise ValueError(f"seeds={seeds!r}: two are needed for a standard error")
    with one_thread():
        runs = [_Seed(Path(output_dir) / f"seed-{seed}", DemoSettings(seed=seed, **settings)) for seed in seeds]
        tuning = [
            run.score(name, rate, run.validation)[0]
            for run in runs
            for name, way in WAYS.items()
            for rate in learning_rates or way.learning_rates
        ]
        chosen = {way: best_rate([score for score in tuning if score.way == way]) for way in WAYS}
        scores: list[Score] = []
        gains: dict[str, list[np.ndarray]] = {way: [] for way in WAYS if way != DPO}
        for run in runs:
            found = {way: run.score(way, rate, run.test) for way, rate in chosen.items()}
            scores += [run.sft_score(), *(score for score, _ in found.values())]
            for way, gained in gains.items():
                gained.append(found[way][1].rewards - found[DPO][1].rewards)
    return Comparison(
        tuning=tuning,
        scores=scores,
        differences={way: [Estimate.of(gain) for gain in gained] for way, gained in gains.items()},
        overall={way: Estimate.of(np.array([gain.mean() for gain in gained])) for way, gained in gains.items()},
    )


def best_rate(scores: list[Score]) -> float:
    """The learning rate of the highest gold reward over all seeds."""
    gold: dict[float, list[float]] = {}
    for score in scores:
        gold.setdefault(score.learning_rate, []).append(score.gold.mean)
    return max(gold, key=lambda rate: sum(gold[rate]))


class _Seed:
    """The SFT model, the lists and the questions of one seed; a policy is trained once, whatever it is asked."""

    def __init__(self, folder: Path, settings: DemoSettings) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.sft = train_sft_model(folder / "sft", self.tokenizer, settings, lambda text: None)
        annotators = Annotators(settings.gold_weight, settings.length_bias)
        self.rows: Rows = collect_rankings(self.tokenizer, annotators, settings)
        rng = random.Random(f"listwise questions {settings.seed}")
        self.test = [ask(rng) for _ in range(settings.questions)]
        self.validation = [ask(rng) for _ in range(max(settings.questions // 2, 2))]
        self._policies: dict[tuple[str, float], PreTrainedModel] = {}

    def score(self, way: str, learning_rate: float, questions: list[Question]) -> tuple[Score, Answers]:
        return self._scored(way, learning_rate, self._policy(way, learning_rate), questions)

    def sft_score(self) -> Score:
        return self._scored("SFT", self.settings.sft_learning_rate, self.sft, self.test)[0]

    def _policy(self, way: str, learning_rate: float) -> PreTrainedModel:
        if (way, learning_rate) not in self._policies:
            folder = self.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{learning_rate:g}"
            common = common_settings(folder, self.settings) | {
                "learning_rate": learning_rate, "num_train_epochs": 1, "micro_batch_tokens": 8192, "max_length": None,
            }  # fmt: skip
            trainer = WAYS[way].make(self.folder / "sft", self.rows, common, self.settings)
            self._policies[way, learning_rate] = finished(trainer)
        return self._policies[way, learning_rate]

    def _scored(
        self, way: str, learning_rate: float, model: PreTrainedModel, questions: list[Question]
    ) -> tuple[Score, Answers]:
        answers = sample_answers(
            model, self.tokenizer, questions, seed=self.settings.seed, max_new_tokens=self.settings.max_new_tokens
        )
        estimates = [Estimate.of(x) for x in (answers.rewards, answers.lengths, kl_of(model, self.sft, answers))]
        return Score(way, self.settings.seed, learning_rate, *estimates), answers
