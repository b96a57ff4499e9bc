import random

import numpy as np
import pytest

from fastalign.demo.language import Annotators, gold_reward
from fastalign.demo.rlhf import ANSWERS_PER_RANKING, collect_rankings, judge_reward_model
from fastalign.demo.settings import DemoSettings


def collected(tokenizer, annotators, questions=200, **settings):
    return collect_rankings(tokenizer, annotators, DemoSettings(ranked_questions=questions, **settings))


def test_rows_rank_different_answers(tokenizer):
    rows = collected(tokenizer, Annotators(), 50)
    assert len(rows) == 50
    for row in rows:
        assert len(set(row["completions"])) == ANSWERS_PER_RANKING
        assert sorted(row["rank"]) == list(range(1, ANSWERS_PER_RANKING + 1))
    assert rows == collected(tokenizer, Annotators(), 50) != collected(tokenizer, Annotators(), 50, seed=1)


def test_any_two_answers_are_ranked_as_annotators_prefer_them():
    """Gumbel noise on the worth of each answer: every pair's order follows Bradley and Terry's odds."""
    annotators, rng = Annotators(gold_weight=2.0, length_bias=0.1), random.Random(0)
    gold, lengths, draws = [0.5, 0.0, -0.5], [10, 20, 12], 20_000
    ranks = np.array([annotators.rank(gold, lengths, rng) for _ in range(draws)])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        p = annotators.p_prefer(gold[a] - gold[b], lengths[a] - lengths[b])
        assert (ranks[:, a] < ranks[:, b]).mean() == pytest.approx(p, abs=4 * (p * (1 - p) / draws) ** 0.5)


def test_annotators_without_noise_rank_by_gold(tokenizer):
    from fastalign.demo.language import ARTICLES, Question

    for row in collected(tokenizer, Annotators(gold_weight=1e6, length_bias=0.0), 50):
        article = next(name for name in ARTICLES if f" {name}?" in row["prompt"])
        details = tuple(detail for detail in ("aisle", "price", "day") if detail in row["prompt"].split(" of ")[0])
        gold = [gold_reward(Question(article, details), answer.strip()) for answer in row["completions"]]
        assert [gold[i] for i in np.argsort(row["rank"])] == sorted(gold, reverse=True)


def test_a_judge_is_compared_with_annotators_and_gold(tokenizer, monkeypatch):
    """One who scores by gold alone is always right about gold, and as often about annotators without a bias as their
    noise allows; one who tosses a coin is right half the time.
    """
    from fastalign.demo import rlhf
    from fastalign.demo.language import Question

    def gold_scores(model, sequences):
        scores = []
        for ids, start in sequences:
            prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:], skip_special_tokens=True)
            details = tuple(d for d in ("aisle", "price", "day") if d in prompt.split(" of ")[0])
            article = prompt.split(" of ")[1].split("?")[0]
            scores.append(gold_reward(Question(article, details), answer.strip()))
        return np.array(scores, np.float32)

    fair, settings = Annotators(length_bias=0.0), DemoSettings()
    monkeypatch.setattr(rlhf, "score_sequences", gold_scores)
    judged = judge_reward_model(None, tokenizer, fair, settings)
    assert judged.gold.mean == 1.0
    differing = judged.annotators.mean  # ties of gold reward are judged against a coin
    assert differing == pytest.approx(judged.possible, abs=0.1)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(rlhf, "score_sequences", lambda model, sequences: rng.normal(size=len(sequences)))
    tossed = judge_reward_model(None, tokenizer, fair, settings)
    assert tossed.gold.mean == pytest.approx(0.5, abs=0.08)
    assert tossed.annotators.mean == pytest.approx(0.5, abs=0.08)
