"""Answers sampled from a policy, and what they are worth: means over questions, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastalign.demo.language import Annotators, Question, gold_reward
from fastalign.reference import TokenSequence, score
from fastalign.rollouts import SamplingOptions, TransformersSampler


class Estimate(NamedTuple):
    """A mean over independent draws and its standard error; nan where there are too few of them."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        values = np.asarray(values, np.float64)
        mean = float(values.mean()) if len(values) else math.nan
        return cls(mean, float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One sampled answer to each question."""

    questions: list[Question]
    sequences: list[TokenSequence]  # prompt and answer, no padding
    texts: list[str]
    finished: np.ndarray  # (Q,) bool: ended by itself, before the limit on new tokens

    @property
    def lengths(self) -> np.ndarray:
        """(Q,) answer tokens, the end-of-sequence token included."""
        return np.array([len(ids) - start for ids, start in self.sequences])

    @property
    def rewards(self) -> np.ndarray:
        """(Q,) gold rewards."""
        return np.array([gold_reward(q, text) for q, text in zip(self.questions, self.texts, strict=True)])


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    seed: int,
    max_new_tokens: int = 128,
    batch_size: int = 256,
) -> Answers:
    """One answer to each question at temperature 1.

    Depends on the arguments alone; torch's global random state and the model's mode are left as found.
    """
    sampler = TransformersSampler(
        model, tokenizer, SamplingOptions(max_new_tokens=max_new_tokens), batch_size=batch_size
    )
    prompts = [tokenizer(question.prompt)["input_ids"] for question in questions]
    completions = sampler.generate(prompts, seed=seed)
    return Answers(
        questions=list(questions),
        sequences=[TokenSequence(p + c.ids, len(p)) for p, c in zip(prompts, completions, strict=True)],
        texts=[tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions],
        finished=np.array([c.finished for c in completions]),
    )


def kl_of(model: PreTrainedModel, sft: PreTrainedModel, answers: Answers) -> np.ndarray:
    """(Q,) Σ_t log π(y_t) − log π_SFT(y_t) in nats, whose mean is KL(π‖π_SFT) if the answers are π's own."""
    if model is sft:
        return np.zeros(len(answers.lengths))
    log_ratios = zip(score(model, answers.sequences), score(sft, answers.sequences), strict=True)
    return np.array([float(np.sum(ours - theirs, dtype=np.float64)) for ours, theirs in log_ratios])


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    """A row of the table. The last two are None for the SFT model, with which the others are compared."""

    name: str
    gold: Estimate
    length: Estimate  # tokens
    cut_off: Estimate  # share of answers that hit the limit on new tokens
    kl: Estimate  # KL(policy ‖ SFT) in nats an answer, Monte Carlo
    wins: Estimate | None = None  # share of questions with a higher gold reward than the SFT model's, ties half
    annotator_wins: Estimate | None = None  # probability that an annotator prefers the answer to the SFT model's


def score_policy(
    name: str,
    model: PreTrainedModel,
    answers: Answers,
    *,
    sft: PreTrainedModel,
    baseline: Answers,
    annotators: Annotators,
) -> PolicyScore:
    """Score `answers`, sampled from `model`, against `baseline`, the SFT model's to the same questions.

    KL is unbiased because the answers are π's own; see `kl_of`.
    """
    rewards, lengths = answers.rewards, answers.lengths
    wins = preferred = None
    if answers is not baseline:
        wins = Estimate.of(np.where(rewards == baseline.rewards, 0.5, rewards > baseline.rewards))
        differences = zip(rewards - baseline.rewards, lengths - baseline.lengths, strict=True)
        preferred = Estimate.of(np.array([annotators.p_prefer(gold, length) for gold, length in differences]))
    return PolicyScore(
        name=name,
        gold=Estimate.of(rewards),
        length=Estimate.of(lengths),
        cut_off=Estimate.of(~answers.finished),
        kl=Estimate.of(kl_of(model, sft, answers)),
        wins=wins,
        annotator_wins=preferred,
    )
