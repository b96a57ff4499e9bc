import json

import pytest

from fastalign.demo.evaluation import Estimate
from fastalign.demo.language import Annotators, gold_reward, split_sentences
from fastalign.demo.settings import DemoSettings
from fastalign.demo.training import collect_preferences


def collected(tokenizer, annotators, pairs=2000, **settings):
    return collect_preferences(tokenizer, annotators, DemoSettings(preference_pairs=pairs, **settings))


def test_rows_are_pairs_of_different_answers(tokenizer):
    preferences = collected(tokenizer, Annotators(), pairs=100)
    assert len(preferences.rows) == 100
    for row in preferences.rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["chosen"] != row["rejected"]
        assert all(split_sentences(row[side]) for side in ("chosen", "rejected"))
        assert row["chosen"].startswith(" ")  # the boundary's space belongs to the answer
    again = collected(tokenizer, Annotators(), pairs=100)
    other = collected(tokenizer, Annotators(), pairs=100, seed=1)
    assert preferences.rows == again.rows != other.rows


def test_without_a_bias_length_explains_nothing(tokenizer):
    """Among answers of equal gold reward the longer one wins half the time; with the bias, more."""
    fair = collected(tokenizer, Annotators(length_bias=0.0)).longer_chosen_at_equal_gold
    biased = collected(tokenizer, Annotators(length_bias=0.06)).longer_chosen_at_equal_gold
    assert abs(fair.mean - 0.5) < 4 * fair.stderr
    assert biased.mean - 0.5 > 4 * biased.stderr


def test_length_statistics_are_those_of_the_rows(tokenizer):
    preferences = collected(tokenizer, Annotators(), pairs=300)
    differences = []
    for row in preferences.rows:
        chosen, rejected = (len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected"))
        differences.append(chosen - rejected)
    assert preferences.length_difference.mean == pytest.approx(sum(differences) / 300)
    longer = [difference > 0 for difference in differences if difference]
    assert preferences.longer_chosen.mean == pytest.approx(sum(longer) / len(longer))
    assert isinstance(preferences.longer_chosen, Estimate)


def test_determined_annotators_choose_by_gold(tokenizer):
    from fastalign.demo.language import ARTICLES, Question

    preferences = collected(tokenizer, Annotators(gold_weight=1000.0, length_bias=0.0), pairs=100)
    for row in preferences.rows:
        article = next(name for name in ARTICLES if f" {name}?" in row["prompt"])
        details = tuple(detail for detail in ("aisle", "price", "day") if detail in row["prompt"].split(" of ")[0])
        question = Question(article, details)
        assert question.prompt == row["prompt"]
        assert gold_reward(question, row["chosen"]) >= gold_reward(question, row["rejected"])


def test_the_saved_preferences_are_the_ones_trained_on(tiny_demo):
    result, _ = tiny_demo
    lines = (result.report.parent / "preferences.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.preferences.rows
