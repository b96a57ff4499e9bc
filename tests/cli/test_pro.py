"""`fastalign pro` from rankings in a file to a saved policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.cli import main
from fastalign.cli.flags import load_yaml
from fastalign.cli.settings import CONFIG_FILE


@pytest.fixture
def rankings(tmp_path) -> Path:
    path = tmp_path / "rankings.jsonl"
    rows = [
        {"prompt": f"{n} + 1 =", "completions": [f" {n}", f" {n + 1}", " so and so"][: 2 + n % 2],
         "ranking": "B > A = C" if n % 2 else "2 > 1"}
        for n in range(20)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pro_yaml(run_yaml, settings, rankings) -> Path:
    import yaml

    own = {name: value for name, value in settings.items() if name != "cache_dir"} | {"dataset_name": str(rankings)}
    run_yaml.write_text(yaml.safe_dump(own))
    return run_yaml


def test_a_run_and_its_repetition_from_the_saved_configuration(pro_yaml, settings, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    assert main(["pro", "--config", str(pro_yaml), "--sft_coef", "0.1", "--loss_type=infonce"]) == 0
    printed = capsys.readouterr().out
    assert "training loss: " in printed
    line = next(line for line in printed.splitlines() if line.startswith("eval at step 2: loss "))
    assert "accuracy" in line
    assert line.count(" ± ") == 2
    assert "reference log-probs" not in printed
    out = Path(settings["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "eval_results.json").read_text())["eval_accuracy_se"] >= 0

    assert load_yaml(out / CONFIG_FILE)["loss_type"] == "infonce"
    again = tmp_path / "again"
    assert main(["pro", "--config", str(out / CONFIG_FILE), "--output_dir", str(again)]) == 0
    repeated = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repeated.parameters(), strict=True))


def test_a_reference_and_pairs(pro_yaml, settings, preferences, capsys):
    flags = ["--reference_free", "false", "--cache_dir", str(settings["cache_dir"]), "--dataset_name", str(preferences)]
    assert main(["pro", "--config", str(pro_yaml), *flags]) == 0
    assert "40 computed" in capsys.readouterr().out
    assert main(["dpo", "--config", str(pro_yaml), *flags[2:]]) == 0  # the same pairs, the same cache
    assert "40 found, 0 computed" in capsys.readouterr().out


def test_scores_as_temperatures(pro_yaml, tmp_path):
    path = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"{n} =", "completions": [" a", " b", " c"], "score": [n, 2, 0.5]} for n in range(3, 23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["pro", "--config", str(pro_yaml), "--dataset_name", str(path), "--reward_temperatures"]) == 0


def test_the_example_is_a_configuration(tmp_path):
    from fastalign.cli.pro import COMMAND
    from fastalign.trainers import PROConfig

    example = Path(__file__).parents[2] / "examples" / "pro.yaml"
    given = COMMAND.settings(["--config", str(example), "--output_dir", str(tmp_path), "--use_cpu"])
    config = PROConfig(**given)
    assert config.sft_weight == "auto"
    assert set(COMMAND.required) <= given.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sft_coef", "-1"], "sft_coef=-1"),
        (["--loss_type", "listnet"], "--loss_type: 'listnet' cannot be taken; accepted: one of pro, infonce"),
        (["--reward_temperatures"], "no score, which reward temperatures are made of"),
        (["--cache_dir", "x"], "has no effect with reference_free=True"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--label_smoothing", "0.1"], "label_smoothing"),
    ],
)
def test_user_errors_are_2_and_named(flags, message, pro_yaml, capsys):
    assert main(["pro", "--config", str(pro_yaml), *flags]) == 2
    err = capsys.readouterr().err
    assert "fastalign pro: error: " in err
    assert message in err


def test_a_ranking_that_names_nothing_is_named(pro_yaml, rankings, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    rows = rankings.read_text().splitlines()
    rows[3] = rows[3].replace("B > A = C", "B > A = D")
    broken.write_text("\n".join(rows))
    assert main(["pro", "--config", str(pro_yaml), "--dataset_name", str(broken)]) == 2
    err = capsys.readouterr().err
    assert "row 3: wrong type (ranking names 'D', and the completions are A … C)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_is_missing_is_named(name, pro_yaml, capsys):
    lines = [line for line in pro_yaml.read_text().splitlines() if not line.startswith(name)]
    pro_yaml.write_text("\n".join(lines))
    assert main(["pro", "--config", str(pro_yaml)]) == 2
    assert f"fastalign pro: error: {name} is missing" in capsys.readouterr().err


def test_help_names_its_own_fields(capsys):
    assert main(["pro", "--help"]) == 0
    out = capsys.readouterr().out
    for field in ("--reward_temperatures", "--sft_coef", "--reference_free", "--merge_pairs"):
        assert field in out
