"""`fastalign doctor`: a sound run passes, a broken one is told apart, and usage errors are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastalign.cli import main


def argv(settings, *more) -> list[str]:
    kept = ("model_name_or_path", "dataset_name", "dataset_train_split", "cache_dir", "max_length")
    return ["doctor", "--use_cpu", *(word for name in kept for word in (f"--{name}", str(settings[name]))), *more]


def test_a_sound_run_passes(settings, capsys):
    assert main(argv(settings, "--json")) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["status"] for finding in findings} <= {"ok", "left out"}
    of = {finding["check"]: finding for finding in findings}
    assert "16" in of["data: train"]["detail"]
    for check in ("head", "layout packed", "layout shared", "dpo, policy = reference", "ppo, old = new"):
        assert of[check]["status"] == "ok"
    assert of["reference cache"]["status"] == "left out"


def test_a_nan_in_the_weights_is_named_and_the_status_is_1(settings, checkpoint, tmp_path, capsys):
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in checkpoint.iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())
    weights = load_file(spoilt / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][1, 1] = torch.nan
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    assert main(argv(settings | {"model_name_or_path": str(spoilt)})) == 1
    out, err = capsys.readouterr()
    assert f"nan or infinity in {name}" in out
    assert "fastalign doctor: failed: " in err
    assert "weights are finite" in err


def test_a_damaged_cache_is_found(settings, capsys):
    run = {name: value for name, value in settings.items() if name != "dataset_test_split"}
    words = [word for name, value in run.items() for word in (f"--{name}", str(value))]
    assert main(["dpo", *words]) == 0
    shard = next(Path(settings["cache_dir"]).glob("shards/*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(argv(settings)) == 1
    out, err = capsys.readouterr()
    assert shard.name in out
    assert err.strip().endswith("failed: reference cache")


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--pairs", "none"], "--pairs takes a positive number, got none"), (["--json", "yes"], "--json takes no value"),
     (["--bta", "1"], "unknown flag --bta"), (["--loss_type", "kto"], "single responses")],
)  # fmt: skip
def test_bad_usage(settings, more, words, capsys):
    assert main(argv(settings, *more)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_help_names_no_module(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "usage: fastalign doctor" in capsys.readouterr().out


def test_a_model_is_needed(capsys):
    assert main(["doctor"]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err
