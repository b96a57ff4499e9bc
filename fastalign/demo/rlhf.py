"""The other way from annotators to a policy: a reward model of their rankings, and PPO on what it says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastalign.demo.evaluation import Estimate
from fastalign.demo.language import Annotators, Question, Writers, ask, gold_reward
from fastalign.demo.progress import Step
from fastalign.demo.settings import DemoSettings
from fastalign.demo.training import Bar, Watch, common_settings, finished
from fastalign.models import score_sequences
from fastalign.reference import TokenSequence
from fastalign.trainers import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer

ANSWERS_PER_RANKING = 4
EASY_SHARE = 0.25  # of the rankings, the first ones
HELD_OUT_PAIRS = 4096


@dataclass(frozen=True, slots=True)
class RewardModelScore:
    """How a reward model judges pairs of answers to questions it was not trained on."""

    annotators: Estimate  # share of pairs in which it prefers the answer that an annotator chose
    possible: float  # the same of a judge who knows the annotators' odds: what their noise leaves
    gold: Estimate  # share of pairs with different gold rewards in which it prefers the better answer


def collect_rankings(
    tokenizer: PreTrainedTokenizerFast, annotators: Annotators, settings: DemoSettings
) -> list[dict[str, Any]]:
    """Rows prompt, completions, rank: four clerks' answers to a question, all different, ranked by an annotator.

    A share of questions on a single detail comes first: what is true of an article is learned there several times
    sooner than from answers in which several facts are weighed against each other.
    """
    rng, writers = random.Random(f"rankings {settings.seed}"), Writers()
    rows: list[dict[str, Any]] = []
    while len(rows) < settings.ranked_questions:
        question = ask(rng)
        if len(question.details) > 1 and len(rows) < EASY_SHARE * settings.ranked_questions:
            continue
        answers = _answers(question, writers, rng, ANSWERS_PER_RANKING)
        if answers is not None:
            gold, lengths = _worth(tokenizer, question, answers)
            rank = annotators.rank(gold, lengths, rng)
            rows.append({"prompt": question.prompt, "completions": [f" {a}" for a in answers], "rank": rank})
    return rows


def _answers(question: Question, writers: Writers, rng: random.Random, count: int) -> list[str] | None:
    answers = [writers.write(question, rng) for _ in range(count)]
    return answers if len(set(answers)) == count else None


def _worth(tokenizer: PreTrainedTokenizerFast, question: Question, answers: list[str]) -> tuple[list[float], list[int]]:
    """(gold rewards, lengths in tokens)."""
    return [gold_reward(question, a) for a in answers], [len(tokenizer(f" {a}")["input_ids"]) for a in answers]


def reward_batch_size(settings: DemoSettings) -> int:
    """Lists of a step: half of the other trainers' examples, each holding several answers."""
    return max(settings.batch_size // 2, 1)


def train_reward_model(
    sft_folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], settings: DemoSettings,
    on_step: Step,
) -> PreTrainedModel:  # fmt: skip
    """A reward model on the trunk of the SFT model, saved beside it."""
    config = RewardConfig(
        **common_settings(sft_folder.parent / "reward-model", settings),
        learning_rate=settings.reward_learning_rate,
        adam_beta2=0.98,
        per_device_train_batch_size=reward_batch_size(settings),
        num_train_epochs=1,
        micro_batch_tokens=8192,
        train_sampling_strategy="sequential",  # easy questions first
        normalize_rewards="mean",
    )
    trainer = RewardTrainer(
        model=str(sft_folder),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Bar(on_step, lambda logs: f"loss {logs['loss']:.3f}  accuracy {logs['accuracy']:.0%}")],
    )
    return finished(trainer)


def judge_reward_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, annotators: Annotators, settings: DemoSettings
) -> RewardModelScore:
    """Compare it with annotators and gold rewards on new pairs."""
    rng, writers = random.Random(f"held out {settings.seed}"), Writers()
    sequences: list[TokenSequence] = []
    gold: list[float] = []
    odds: list[float] = []
    while len(odds) < HELD_OUT_PAIRS:
        question = ask(rng)
        answers = _answers(question, writers, rng, 2)
        if answers is None:
            continue
        prompt = tokenizer(question.prompt)["input_ids"]
        for answer in answers:
            ids = tokenizer(f" {answer}")["input_ids"]
            sequences.append(TokenSequence([*prompt, *ids, tokenizer.eos_token_id], len(prompt)))
        (gold_a, gold_b), (length_a, length_b) = _worth(tokenizer, question, answers)
        gold.append(gold_a - gold_b)
        odds.append(annotators.p_prefer(gold_a - gold_b, length_a - length_b))
    rewards = score_sequences(model, sequences).reshape(-1, 2)
    prefers_first = rewards[:, 0] > rewards[:, 1]
    chosen_first = np.array([rng.random() < p for p in odds])
    differs = np.array(gold) != 0
    return RewardModelScore(
        annotators=Estimate.of(prefers_first == chosen_first),
        possible=float(np.mean([max(p, 1 - p) for p in odds])),
        gold=Estimate.of((prefers_first == (np.array(gold) > 0))[differs]),
    )


def train_ppo(
    sft_folder: Path, tokenizer: PreTrainedTokenizerFast, reward_model: PreTrainedModel, settings: DemoSettings,
    watch: Watch, on_step: Step,
) -> tuple[PreTrainedModel, list[float]]:  # fmt: skip
    """(the policy, saved beside the SFT model; the KL of every phase, in nats an answer)."""
    rng = random.Random(f"prompts {settings.seed}")
    config = PPOConfig(
        **common_settings(sft_folder.parent / "ppo", settings) | {"logging_steps": 1, "lr_scheduler_type": "linear"},
        learning_rate=settings.ppo_learning_rate,
        max_steps=settings.ppo_steps,
        per_device_train_batch_size=-(-settings.ppo_batch_size // 4),
        num_mini_batches=4,
        num_ppo_epochs=3,
        response_length=settings.max_new_tokens,
        kl_coef=0.3,
        kl_controller="adaptive",
        target_kl=settings.target_kl,
        kl_horizon=2000,
        micro_batch_tokens=8192,
    )
    trainer = PPOTrainer(
        config,
        tokenizer,
        str(sft_folder),
        reward_model=reward_model,
        train_dataset=[{"prompt": ask(rng).prompt} for _ in range(settings.ppo_steps * settings.ppo_batch_size)],
        callbacks=[Bar(on_step, _ppo_note), watch],
    )
    finished(trainer)
    kl = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    return trainer.actor_critic.policy.eval(), kl


def _ppo_note(logs: dict[str, float]) -> str:
    return f"reward {logs['objective/scores']:.2f}  KL {logs['objective/kl']:.2f}"
