import dataclasses
import json
import math
import time

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.demo import run


def test_everything_is_there(tiny_demo):
    result, printed = tiny_demo
    folder = result.report.parent
    assert {
        "report.html",
        "results.json",
        "preferences.jsonl",
        "rankings.jsonl",
        "sft",
        "dpo",
        "r-dpo",
        "reward-model",
        "ppo",
        "reference-cache",
    } <= {path.name for path in folder.iterdir()}
    assert (result.plot is not None) == (folder / "plot.png").is_file()
    for word in ("SFT", "R-DPO", "gold reward", "shorter" if result.shorter >= 0 else "longer", "fastalign dpo"):
        assert word in printed


def test_the_models_load_with_plain_transformers_and_differ(tiny_demo):
    folder = tiny_demo[0].report.parent
    weights = {}
    for name in ("sft", "dpo", "r-dpo", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        prompt = "Shopper: price of tea? Clerk:"
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
        weights[name] = model.lm_head.weight
    assert not torch.equal(weights["sft"], weights["dpo"])
    assert not torch.equal(weights["dpo"], weights["r-dpo"])  # length_alpha reached the loss
    assert not torch.equal(weights["sft"], weights["ppo"])


def test_the_second_run_finds_every_reference_log_prob(tiny_demo):
    cached = tiny_demo[0].cached_logps
    assert cached["DPO"][0] == 0
    assert cached["R-DPO"] == (cached["DPO"][1], 0)


def test_curves_start_at_the_sft_model_and_end_with_training(tiny_demo, tiny):
    curves = tiny_demo[0].curves
    steps = tiny["preference_pairs"] // tiny["batch_size"]
    assert (
        [point.step for point in curves["DPO"]] == [point.step for point in curves["R-DPO"]] == [0, steps // 2, steps]
    )
    assert curves["DPO"][0] == curves["R-DPO"][0] == curves["PPO"][0]
    assert curves["DPO"][0].kl.mean == 0.0
    assert [point.step for point in curves["PPO"]] == [0, tiny["ppo_steps"] // 2, tiny["ppo_steps"]]


def test_results_are_saved_in_full(tiny_demo):
    result, _ = tiny_demo
    saved = json.loads((result.report.parent / "results.json").read_text())
    assert saved == json.loads(json.dumps(result.to_json()))
    assert saved["scores"]["DPO"]["kl"] == {
        "mean": result.scores["DPO"].kl.mean,
        "stderr": result.scores["DPO"].kl.stderr,
    }
    assert saved["settings"]["length_alpha"] == result.settings.length_bias
    assert len(saved["ppo_kl"]) == result.settings.ppo_steps
    assert saved["ppo_kl"][0] == pytest.approx(0.0, abs=1e-4)  # the first answers are the SFT model's
    assert saved["reward_model"]["gold"]["mean"] == result.reward_model.gold.mean
    assert saved["shorter"] == 1 - result.scores["R-DPO"].length.mean / result.scores["DPO"].length.mean


def test_a_seed_gives_the_same_figures_and_another_one_others(tiny_demo, tiny, tmp_path):
    first, _ = tiny_demo
    quiet = Console(quiet=True)
    again = run(tmp_path / "again", 3, console=quiet, **tiny | {"curve_points": 1, "curve_questions": 3})
    assert again.scores == first.scores  # and watching the training does not change it
    other = run(tmp_path / "other", 4, console=quiet, **tiny)
    assert other.scores != first.scores


def test_a_senseless_setting_is_refused_and_threads_are_left_alone(tmp_path):
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="questions=1"):
        run(tmp_path, 0, questions=1)
    assert torch.get_num_threads() == threads


def test_without_a_length_penalty_r_dpo_is_dpo_to_the_bit(tiny, tmp_path):
    scores = run(tmp_path, 3, console=Console(quiet=True), length_alpha=0.0, **tiny).scores
    assert dataclasses.replace(scores["R-DPO"], name="DPO") == scores["DPO"]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_length_exploitation_in_miniature(tmp_path, seed):
    """The demonstration's claims: R-DPO at least 20 % shorter than DPO, its gold reward within 5 % of DPO's; PPO a
    standard deviation above SFT in gold reward, at a KL within a factor 2 of its target; the reward model above 80 %.
    """
    began = time.process_time()
    result = run(tmp_path, seed, console=Console(quiet=True))
    assert time.process_time() - began < 280  # of one core: under five minutes on two
    sft, dpo, r_dpo, ppo = result.scores.values()
    assert result.ppo_gain >= 1.0
    target = result.settings.target_kl
    assert target / 2 <= result.held_kl <= 2 * target
    assert target / 2 <= ppo.kl.mean <= 2 * target  # of the final policy, on other questions
    assert result.reward_model.annotators.mean > 0.8
    assert result.reward_model.gold.mean > 0.8
    assert result.shorter >= 0.2
    assert abs(result.gold_ratio - 1) <= 0.05
    # what makes it a demonstration: both learn, DPO's answers grow, and the annotators like them better for it
    assert min(dpo.gold.mean, r_dpo.gold.mean) > sft.gold.mean + 0.3
    assert dpo.length.mean > 1.3 * sft.length.mean
    assert dpo.annotator_wins.mean > r_dpo.annotator_wins.mean
    assert math.isfinite(dpo.kl.mean)
