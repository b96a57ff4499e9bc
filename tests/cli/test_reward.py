"""`fastalign reward` from a file to a saved reward model, for every kind of judgement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.cli import main
from fastalign.cli.flags import load_yaml
from fastalign.cli.settings import CONFIG_FILE

ROWS = {
    "lists": [
        {"prompt": f"{n} + 1 =", "completions": [f" {n + 1}", " so", " and then some"], "rank": [1, 2, 2]}
        for n in range(20)
    ],
    "binary": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1 + n % 2}", "label": n % 2 == 0} for n in range(20)],
    "scalar": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "label": n / 20} for n in range(20)],
}


@pytest.fixture
def reward_yaml(run_yaml, settings) -> Path:
    import yaml

    run_yaml.write_text(yaml.safe_dump({name: value for name, value in settings.items() if name != "cache_dir"}))
    return run_yaml


def test_a_run_and_its_repetition_from_the_saved_configuration(reward_yaml, settings, capsys, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = ["--normalize_rewards", "mean", "--reward_reference_split", "train[:5]", "--center-rewards-coefficient=0"]
    assert main(["reward", "--config", str(reward_yaml), *flags]) == 0
    printed = capsys.readouterr().out
    assert "training loss: " in printed
    line = next(line for line in printed.splitlines() if line.startswith("eval at step 2: loss "))
    assert line.count(" ± ") == 3
    assert "accuracy" in line
    assert "margin" in line
    assert "rewards are measured from " in printed
    out = Path(settings["output_dir"])
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(out).pad_token_id != model.config.eos_token_id
    assert set(model.config.fastalign_reward_normalization) == {"mean", "std"}
    metrics = json.loads((out / "eval_results.json").read_text())
    assert metrics["eval_loss_se"] > 0

    assert load_yaml(out / CONFIG_FILE)["normalize_rewards"] == "mean"
    again = tmp_path / "again"
    assert main(["reward", "--config", str(out / CONFIG_FILE), "--output_dir", str(again)]) == 0
    repeated = AutoModelForSequenceClassification.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repeated.parameters(), strict=True))
    assert repeated.config.fastalign_reward_normalization == model.config.fastalign_reward_normalization


@pytest.mark.parametrize("kind", ROWS)
def test_what_the_rows_hold_decides(kind, reward_yaml, tmp_path, capsys):
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    assert main(["reward", "--config", str(reward_yaml), "--dataset_name", str(path), "--freeze_backbone"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eval at step 2"))
    assert ("correlation" in line) == (kind == "scalar")
    assert ("accuracy" in line) == (kind != "scalar")


def test_an_adapter_with_its_head_and_the_merged_model(reward_yaml, settings):
    from safetensors import safe_open

    assert main(["reward", "--config", str(reward_yaml), "--use_peft", "--merge_adapter"]) == 0
    out = Path(settings["output_dir"])
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert any("score" in name for name in file.keys())  # noqa: SIM118
    assert (out / "merged" / "model.safetensors").is_file()
    assert main(["reward", "--config", str(reward_yaml), "--model_name_or_path", str(out / "merged")]) == 0


def test_the_example_is_a_configuration(tmp_path):
    from fastalign.cli.reward import COMMAND
    from fastalign.trainers import RewardConfig

    example = Path(__file__).parents[2] / "examples" / "reward.yaml"
    given = COMMAND.settings(["--config", str(example), "--output_dir", str(tmp_path), "--use_cpu"])
    config = RewardConfig(**given)
    assert config.normalize_rewards == "mean_std"
    assert config.center_rewards_coefficient == 0.01
    assert set(COMMAND.required) <= given.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--center_rewards_coefficient", "-1"], "center_rewards_coefficient=-1"),
        (["--label_type", "real"], "--label_type: 'real' cannot be taken; accepted: one of auto, scalar, binary"),
        (["--reward_reference_split", "train"], "has no effect without normalize_rewards"),
        (["--freeze_backbone", "--use_peft"], "choose one"),
        (["--schedule", "streamed"], "schedule='streamed' is not supported yet; accepted is 'auto'. A scalar head"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--beta", "0.1"], "beta"),
    ],
)
def test_user_errors_are_2_and_one_line(flags, message, reward_yaml, capsys):
    assert main(["reward", "--config", str(reward_yaml), *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastalign reward: error: ")
    assert message in last


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_is_missing_is_named(name, reward_yaml, capsys):
    lines = [line for line in reward_yaml.read_text().splitlines() if not line.startswith(name)]
    reward_yaml.write_text("\n".join(lines))
    assert main(["reward", "--config", str(reward_yaml)]) == 2
    assert f"fastalign reward: error: {name} is missing" in capsys.readouterr().err


def test_help_names_its_own_fields(capsys):
    assert main(["reward", "--help"]) == 0
    out = capsys.readouterr().out
    for field in ("--center_rewards_coefficient", "--freeze_backbone", "--normalize_rewards", "--label_type"):
        assert field in out
