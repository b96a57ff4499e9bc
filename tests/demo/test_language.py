import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastalign.demo.language import (
    ARTICLES,
    FACTS,
    FILLERS,
    SENTENCES,
    Annotators,
    Question,
    Writers,
    ask,
    gold_reward,
    judge_sentence,
    split_sentences,
    vocabulary,
)

TEA = Question("tea", ("aisle", "price"))
TRUE = FACTS["tea"]


def false(detail):
    return next(sentence for sentence in SENTENCES[detail] if sentence != TRUE[detail])


def test_prompts_read_as_questions():
    assert Question("tea", ("aisle",)).prompt == "Shopper: aisle of tea? Clerk:"
    assert Question("tea", ("aisle", "price")).prompt == "Shopper: aisle and price of tea? Clerk:"
    assert Question("tea", ("aisle", "price", "day")).prompt == "Shopper: aisle, price and day of tea? Clerk:"


def test_every_article_has_one_true_sentence_a_detail():
    assert set(FACTS) == set(ARTICLES)
    for facts in FACTS.values():
        assert set(facts) == set(SENTENCES)
        assert all(facts[detail] in SENTENCES[detail] for detail in SENTENCES)
    for detail in SENTENCES:  # articles must differ, or there is nothing to learn about them
        assert len({facts[detail] for facts in FACTS.values()}) >= 4


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ([TRUE["aisle"], TRUE["price"]], 1.0),
        ([TRUE["price"], TRUE["aisle"]], 1.0),
        ([TRUE["aisle"]], 0.5),
        ([TRUE["aisle"], false("price")], 0.0),
        ([false("aisle"), false("price")], -1.0),
        ([FILLERS[0]], 0.0),
        ([TRUE["aisle"], TRUE["aisle"], TRUE["price"]], 1.0),  # a repetition earns nothing
        ([TRUE["aisle"], false("aisle"), TRUE["price"]], 0.0),  # a contradiction is wrong
        ([TRUE["aisle"], TRUE["price"], TRUE["day"]], 1.0),  # true and not asked for
        ([TRUE["aisle"], TRUE["price"], false("day")], 0.5),  # false and not asked for
        ([TRUE["aisle"], TRUE["price"].removesuffix(".")], 0.5),  # cut off
        (["It is in aisle nine."], 0.0),  # not of this language
        ([], 0.0),
    ],
)
def test_gold_reward(answer, reward):
    assert gold_reward(TEA, " ".join(answer)) == reward


@given(seed=st.integers(0, 10_000), fillers=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(FILLERS))))
def test_gold_reward_does_not_depend_on_chatter(seed, fillers):
    rng = random.Random(seed)
    question = ask(rng)
    sentences = split_sentences(Writers().write(question, rng))
    reward = gold_reward(question, " ".join(sentences))
    for position, filler in fillers:
        sentences.insert(position, filler)
    assert gold_reward(question, " ".join(sentences)) == reward
    assert -3 <= reward <= 1


@given(st.integers(0, 10_000))
def test_split_sentences_loses_nothing(seed):
    rng = random.Random(seed)
    text = Writers().write(ask(rng), rng)
    assert " ".join(split_sentences(text)) == text
    cut = text[: rng.randrange(len(text))].rstrip()
    assert " ".join(split_sentences(cut)) == cut


def test_judge_sentence():
    assert judge_sentence(TEA, TRUE["aisle"]) == "right"
    assert judge_sentence(TEA, false("day")) == "wrong"
    assert judge_sentence(TEA, FILLERS[2]) == judge_sentence(TEA, "It is in") == "filler"


def test_clerks_write_as_their_probabilities_say():
    rng, writers = random.Random(0), Writers(p_mention=0.8, p_right=0.6, p_filler=0.25)
    question = Question("salt", ("aisle", "price", "day"))
    sentences = [split_sentences(writers.write(question, rng)) for _ in range(4000)]
    counts = {"right": 0, "wrong": 0, "filler": 0}
    for answer in sentences:
        assert answer
        for sentence in answer:
            counts[judge_sentence(question, sentence)] += 1
    per_answer = {verdict: count / 4000 for verdict, count in counts.items()}
    # four places to chat, each with a geometric number of fillers: p/(1 − p); an empty answer gets one instead
    expected = {"right": 3 * 0.8 * 0.6, "wrong": 3 * 0.8 * 0.4, "filler": 4 / 3}
    assert per_answer == pytest.approx(expected, abs=0.08)


def test_chatting_says_nothing_about_being_right():
    rng = random.Random(1)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(6000):
        question = Question("tea", ("aisle",))
        answer = Writers(p_mention=1.0).write(question, rng)
        rewards[len(split_sentences(answer)) > 1].append(gold_reward(question, answer))
    means = [sum(values) / len(values) for values in rewards.values()]
    assert means[0] == pytest.approx(means[1], abs=0.08)


@given(gold=st.integers(-6, 6), length=st.integers(-10_000, 10_000))
def test_annotators_are_bradley_terry(gold, length):
    annotators = Annotators(gold_weight=3.0, length_bias=0.5)
    gold = gold / 2
    there, back = annotators.p_prefer(gold, length), annotators.p_prefer(-gold, -length)
    assert there + back == pytest.approx(1)
    assert 0 <= there <= 1
    assert (there >= 0.5) == (3 * gold + 0.5 * length >= 0)


def test_annotators_probability():
    assert Annotators(gold_weight=2.0, length_bias=0.1).p_prefer(0.5, 10) == pytest.approx(0.880797, abs=1e-6)


def test_vocabulary_covers_the_language():
    words = vocabulary()
    assert words == sorted(set(words))
    assert {"Shopper", "Clerk", "tea", "and", "seven", "Monday", "nine"} <= set(words)
    assert not any(mark in word for word in words for mark in ".,:? ")
