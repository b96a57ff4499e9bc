import copy
import math

import numpy as np
import pytest
import torch

from fastalign.demo.evaluation import Answers, Estimate, sample_answers, score_policy
from fastalign.demo.language import FACTS, FILLERS, SENTENCES, Annotators, Question
from fastalign.reference import TokenSequence


def test_estimate():
    assert Estimate.of(np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert Estimate.of(np.array([True, False, False, True])).mean == 0.5
    assert Estimate.of(np.array([2.0])).mean == 2.0
    assert math.isnan(Estimate.of(np.array([2.0])).stderr)
    assert math.isnan(Estimate.of(np.array([])).mean)


def test_answers_are_what_follows_the_prompt(model, tokenizer, questions):
    answers = sample_answers(model, tokenizer, questions, seed=0, max_new_tokens=40, batch_size=3)
    assert len(answers.texts) == len(answers.sequences) == len(answers.finished) == len(questions)
    for question, text, (ids, start), ended in zip(
        questions, answers.texts, answers.sequences, answers.finished, strict=True
    ):
        assert ids[:start] == tokenizer(question.prompt)["input_ids"]
        answer = ids[start:]
        assert tokenizer.decode(answer, skip_special_tokens=True) == text
        assert (answer[-1] == tokenizer.eos_token_id) == ended
        assert tokenizer.eos_token_id not in answer[:-1]
        assert ended or len(answer) == 40
    assert answers.lengths.tolist() == [len(ids) - start for ids, start in answers.sequences]
    assert 0 < answers.finished.sum() < len(questions)  # an untrained model: both cases are there


def test_sampling_depends_on_the_seed_and_disturbs_nothing(model, tokenizer, questions):
    model.train()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, same, other = (sample_answers(model, tokenizer, questions, seed=seed, max_new_tokens=10) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert one.sequences == same.sequences
    assert one.sequences != other.sequences


def test_samples_follow_the_models_distribution(model, tokenizer):
    """First tokens of many answers to one question against the model's own probabilities: temperature 1, no cut."""
    question = Question("tea", ("price",))
    answers = sample_answers(model, tokenizer, [question] * 4000, seed=0, max_new_tokens=1)
    first = torch.tensor([ids[start] for ids, start in answers.sequences])
    counts = torch.bincount(first, minlength=len(tokenizer)).double()
    with torch.no_grad():
        prompt = torch.tensor([tokenizer(question.prompt)["input_ids"]])
        p = model(input_ids=prompt).logits[0, -1].double().softmax(0)
    chi_square = ((counts - 4000 * p) ** 2 / (4000 * p)).sum().item()
    freedom = len(tokenizer) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def naive_logp(model, ids, start):
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(start, len(ids)))


def test_score_against_naive_figures(model, tokenizer, questions):
    sft = model
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.lm_head.weight += 0.05 * torch.randn(policy.lm_head.weight.shape, generator=torch.manual_seed(0))
    annotators = Annotators()
    baseline = sample_answers(sft, tokenizer, questions, seed=0, max_new_tokens=20)
    answers = sample_answers(policy, tokenizer, questions, seed=1, max_new_tokens=20)
    score = score_policy("DPO", policy, answers, sft=sft, baseline=baseline, annotators=annotators)
    kl = [naive_logp(policy, ids, start) - naive_logp(sft, ids, start) for ids, start in answers.sequences]
    assert score.kl == pytest.approx(Estimate.of(np.array(kl)), abs=1e-4)
    assert score.length == Estimate.of(answers.lengths)
    assert score.gold == Estimate.of(answers.rewards)
    assert score.cut_off.mean == 1 - answers.finished.mean()
    preferred = [
        annotators.p_prefer(g, n)
        for g, n in zip(answers.rewards - baseline.rewards, answers.lengths - baseline.lengths, strict=True)
    ]
    assert score.annotator_wins == pytest.approx(Estimate.of(np.array(preferred)))


def answers_of(texts):
    """Answers with these texts to a question about tea, without a model behind them."""
    question = Question("tea", ("aisle",))
    sequences = [TokenSequence([1, 2, *range(3, 3 + len(text.split()))], 2) for text in texts]
    return Answers(
        questions=[question] * len(texts), sequences=sequences, texts=texts, finished=np.ones(len(texts), bool)
    )


def test_wins_go_by_gold_alone_and_ties_are_halves(model):
    right = FACTS["tea"]["aisle"]
    wrong = next(sentence for sentence in SENTENCES["aisle"] if sentence != right)
    baseline = answers_of([wrong, right, FILLERS[0], right])
    longer = answers_of([right, f"{right} {FILLERS[0]}", wrong, right])
    score = score_policy("DPO", model, longer, sft=model, baseline=baseline, annotators=Annotators(0.0, 1.0))
    assert score.wins is not None
    assert score.wins.mean == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert score.annotator_wins is not None  # these go by length alone
    sigmoid = 1 / (1 + np.exp(-(longer.lengths - baseline.lengths)))
    assert score.annotator_wins.mean == pytest.approx(sigmoid.mean())


def test_the_sft_model_is_not_compared_with_itself(model, tokenizer, questions):
    answers = sample_answers(model, tokenizer, questions, seed=0, max_new_tokens=5)
    score = score_policy("SFT", model, answers, sft=model, baseline=answers, annotators=Annotators())
    assert score.wins is None
    assert score.annotator_wins is None
    assert score.kl == (0.0, 0.0)
