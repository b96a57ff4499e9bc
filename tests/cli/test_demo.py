"""`fastalign demo`: the command around fastalign.demo."""

from __future__ import annotations

import json

import pytest

from fastalign.cli import main


def test_a_small_demonstration(tmp_path, capsys):
    small = {
        "sft_examples": 64, "preference_pairs": 64, "questions": 16, "curve_questions": 4, "curve_points": 1,
        "ranked_questions": 64, "ppo_steps": 2, "ppo_batch_size": 16,
    }  # fmt: skip
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert main(["demo", "--output_dir", str(tmp_path), "--seed", "3", "--max_new_tokens=32", *flags]) == 0
    out = capsys.readouterr().out
    assert "R-DPO" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["seed"] == 3
    assert set(results["scores"]) == {"SFT", "DPO", "R-DPO", "PPO"}
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sede", "1"], "unknown flag --sede (did you mean --seed?)"),
        (["--seed", "one"], "--seed: 'one' cannot be taken; accepted: an integer"),
        (["--beta", "0"], "beta=0: it must be positive"),
    ],
)
def test_bad_usage(flags, message, capsys):
    assert main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--length_alpha" in out
    assert "TrainingArguments" not in out
