"""PRO beside DPO on the same rankings: what is compared is comparable, and what it comes to."""

import time

import numpy as np
import pytest

from fastalign.demo.evaluation import Estimate
from fastalign.demo.listwise import DPO, WAYS, Score, _Seed, best_rate, compare
from fastalign.demo.settings import DemoSettings

TINY = {
    "sft_examples": 64, "preference_pairs": 64, "ranked_questions": 32, "batch_size": 16, "questions": 12,
    "max_new_tokens": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return compare(tmp_path_factory.mktemp("tiny"), seeds=(0, 1), learning_rates=(1e-3, 1e-2), **TINY)


def test_every_way_is_tried_at_every_rate_and_tested_on_every_seed(tiny):
    assert [(s.way, s.learning_rate, s.seed) for s in tiny.tuning] == [
        (way, rate, seed) for seed in (0, 1) for way in WAYS for rate in (1e-3, 1e-2)
    ]
    assert [(s.way, s.seed) for s in tiny.scores] == [(way, seed) for seed in (0, 1) for way in ("SFT", *WAYS)]
    for way in WAYS:
        gold = {rate: sum(s.gold.mean for s in tiny.tuning if (s.way, s.learning_rate) == (way, rate))
                for rate in (1e-3, 1e-2)}  # fmt: skip
        best = max(gold, key=gold.get)
        assert {s.learning_rate for s in tiny.scores if s.way == way} == {best}


def test_differences_are_those_of_the_scores(tiny):
    gold = {(s.way, s.seed): s.gold.mean for s in tiny.scores}
    for way, found in tiny.differences.items():
        means = [gold[way, seed] - gold[DPO, seed] for seed in (0, 1)]
        assert [estimate.mean for estimate in found] == pytest.approx(means, abs=1e-9)
        assert tiny.overall[way].mean == pytest.approx(np.mean(means), abs=1e-9)
        assert tiny.overall[way].stderr == pytest.approx(np.std(means, ddof=1) / 2**0.5, abs=1e-9)


def test_the_ways_differ_in_nothing_but_the_loss(tmp_path):
    """The same questions a step, as many steps, one reference cache."""
    run = _Seed(tmp_path, DemoSettings(seed=3, **TINY))
    common = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-3,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
    }  # fmt: skip
    trainers = {name: way.make(tmp_path / "sft", run.rows, common, run.settings) for name, way in WAYS.items()}
    steps = {len(trainer.get_train_dataloader()) for trainer in trainers.values()}
    assert steps == {4}
    assert len(trainers[DPO].train_dataset) == 3 * 32
    assert trainers["PRO"].reference_cache is None
    pairs = trainers[DPO].train_dataset
    assert len({tuple(ids) for ids in pairs["chosen_ids"]}) <= 32  # each list's best, thrice
    assert trainers["PRO, from the reference"].reference_cache.report.computed == 0


def test_the_best_rate_is_that_of_all_seeds():
    """Not that of the luckiest one."""
    gold = {0.1: (0.9, 0.1), 0.2: (0.6, 0.7), 0.3: (0.2, 0.8)}
    nothing = Estimate(0.0, 0.0)
    scores = [
        Score("PRO", seed, rate, Estimate(values[seed], 0.0), nothing, nothing)
        for seed in (0, 1)
        for rate, values in gold.items()
    ]
    assert best_rate(scores) == 0.2


def test_as_many_rates_are_tried_of_every_way():
    assert {len(way.learning_rates) for way in WAYS.values()} == {3}


def test_one_seed_has_no_standard_error(tmp_path):
    with pytest.raises(ValueError, match="two are needed"):
        compare(tmp_path, seeds=(0,))


@pytest.mark.long
@pytest.mark.timeout(1800)  # of a machine that does other things too
def test_both_learn_from_rankings(tmp_path):
    """Every way more than halves what the SFT model lacks of a gold reward of 1; which is best, the log says."""
    began = time.process_time()
    found = compare(tmp_path, ranked_questions=1024)
    assert time.process_time() - began < 600
    sft = {score.seed: score.gold.mean for score in found.scores if score.way == "SFT"}
    for score in found.scores:
        print(score)
        if score.way != "SFT":
            assert score.gold.mean > (1 + sft[score.seed]) / 2, score
    print(found.differences, found.overall)
