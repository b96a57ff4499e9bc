"""`fastalign ppo` from a file to a saved policy, and back from what it saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.cli import main
from fastalign.cli.flags import load_yaml
from fastalign.cli.settings import CONFIG_FILE


@pytest.fixture
def ppo_yaml(run_yaml, settings, tmp_path, monkeypatch) -> Path:
    import yaml

    given = {name: value for name, value in settings.items() if name != "cache_dir"}
    given |= {"reward_funcs": ["my_rewards:digits"], "response_length": 8, "num_ppo_epochs": 2, "num_mini_batches": 2}
    run_yaml.write_text(yaml.safe_dump(given))
    (tmp_path / "my_rewards.py").write_text(
        "def digits(completions, **columns):\n    return [float(sum(map(str.isdigit, text))) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return run_yaml


def test_a_run_and_its_repetition_from_the_saved_configuration(ppo_yaml, settings, capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    assert main(["ppo", "--config", str(ppo_yaml), "--kl_coef", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "training loss: " in printed
    assert "eval at step 2: " in printed
    out = Path(settings["output_dir"])
    policy = AutoModelForCausalLM.from_pretrained(out)
    assert AutoModelForSequenceClassification.from_pretrained(out / "critic").config.num_labels == 1
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    saved = load_yaml(out / CONFIG_FILE)
    assert saved["kl_coef"] == 0.1
    assert saved["reward_funcs"] == ["my_rewards:digits"]
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"objective/scores", "objective/kl", "policy/approxkl_avg", "loss/value_avg"} <= set(logs[0])

    again = tmp_path / "again"
    assert main(["ppo", "--config", str(out / CONFIG_FILE), "--output_dir", str(again)]) == 0
    repeated = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), repeated.parameters(), strict=True))


def test_resuming_goes_on_from_the_last_checkpoint(ppo_yaml, settings):
    assert main(["ppo", "--config", str(ppo_yaml)]) == 0
    assert main(["ppo", "--config", str(ppo_yaml), "--max_steps", "3", "--resume_from_checkpoint"]) == 0
    state = json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward_funcs", "my_rewards:letters"], "'my_rewards:letters' cannot be imported"),
        (["--reward_funcs", "digits"], "must be package.module:function"),
        (["--kl_coeff", "0.1"], "did you mean --kl_coef?"),
        (["--advantage_estimator", "grpo"], "one of gae, group, rloo, reinforce"),
        (["--num_generations", "3"], "num_generations=3 does not divide the 8 completions"),
    ],
)
def test_mistakes_are_named_in_one_line(ppo_yaml, capsys, flags, message):
    assert main(["ppo", "--config", str(ppo_yaml), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_without_a_reward_nothing_starts(ppo_yaml, capsys):
    text = ppo_yaml.read_text().replace("reward_funcs:\n- my_rewards:digits\n", "")
    ppo_yaml.write_text(text)
    assert main(["ppo", "--config", str(ppo_yaml)]) == 2
    assert "no reward: give reward_model, reward_funcs" in capsys.readouterr().err


def test_the_example_is_a_ppo_config(tmp_path):
    from fastalign.cli.flags import Raw
    from fastalign.cli.settings import typed
    from fastalign.trainers import PPOConfig

    example = load_yaml(Path(__file__).parents[2] / "examples/ppo.yaml")
    given = typed(PPOConfig, {name: Raw(value, "examples/ppo.yaml") for name, value in example.items()})
    config = PPOConfig(**given | {"output_dir": str(tmp_path), "use_cpu": True})
    assert config.rollout_batch_size == 128
    assert config.mini_batch_size == 32
