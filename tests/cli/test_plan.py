"""`fastalign plan` and `fastalign bench step` on the command line."""

from __future__ import annotations

import json

import pytest
import yaml

from fastalign import cli
from fastalign.trainers import run_bench
from fastalign.trainers.run_bench import StepMeasurement


@pytest.fixture
def config(settings, tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_plan_reads_the_files_of_dpo(config, capsys):
    assert cli.main(["plan", "--config", config, "--brief"]) == 0
    out = capsys.readouterr().out
    assert "llama: " in out
    assert "peak memory" in out
    assert "dominate" in out
    assert "give --memory_gb" in out
    assert "with one setting changed" not in out


def test_what_is_not_planned_is_said(config, capsys):
    assert cli.main(["plan", "--config", config, "--brief", "--fsdp", "full_shard"]) == 0
    assert "fsdp is not planned: of N processes each holds 1/N of the" in capsys.readouterr().out
    assert cli.main(["plan", "--config", config, "--brief", "--json", "--fsdp", "full_shard"]) == 0
    assert json.loads(capsys.readouterr().out)["not_planned"] == "fsdp"


def test_plan_as_json_with_a_choice_for_a_budget(config, capsys):
    assert cli.main(["plan", "--config", config, "--json", "--brief", "--memory_gb", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["peak_bytes"] == sum(found["plan"]["parts"].values())
    assert found["auto"]["micro_batch_tokens"] >= 256
    assert found["auto"]["plan"]["peak_bytes"] < 2**30
    assert found["alternatives"] == {}


def test_plan_of_another_trainer_and_device_without_data(checkpoint, capsys):
    argv = ["plan", "--trainer", "sft", "--model_name_or_path", str(checkpoint), "--tokens", "32", "--use_cpu"]
    assert cli.main([*argv, "--device", "cuda", "--gradient_checkpointing", "false"]) == 0
    out = capsys.readouterr().out
    assert "; cuda, shared layout" in out
    assert "allocator" not in out
    assert "gradient_checkpointing  " in out
    assert "use_peft" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--trainer", "dop"], "--trainer 'dop'"),
        (["plan", "--trainer", "rloo"], "accepted are dpo, sft, reward, pro, ppo"),
        (["plan", "--tokens", "none"], "model_name_or_path is missing"),
        (["plan", "--model_name_or_path", "m"], "dataset_name is missing"),
        (["plan", "--model_name_or_path", "m", "--tokens", "none"], "--tokens takes a positive number, got 'none'"),
        (["plan", "--model_name_or_path", "m", "--tokens", "8", "--device", "tpu"], "--device 'tpu'"),
        (["plan", "--model_name_or_path", "m", "--tokens", "8", "--json", "yes"], "--json takes no value"),
        (["plan", "--bta", "1"], "did you mean"),
        (["bench"], "an action is needed"),
        (["bench", "stp"], "unknown action 'stp'"),
        (["bench", "step", "--model_name_or_path", "m", "--tokens", "8", "--steps", "0"], "--steps takes a positive"),
    ],
)
def test_what_cannot_be_honoured(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_help_without_imports(capsys):
    for argv in (["plan", "--help"], ["bench", "--help"], ["bench", "step", "--help"]):
        assert cli.main(argv) == 0
        assert "usage: fastalign" in capsys.readouterr().out


def test_bench_prints_the_plan_beside_the_measurement(config, capsys, monkeypatch):
    asked = {}

    def measured(trainer, config_class, given, **options):
        asked.update(trainer=trainer, given=given, **options)
        return StepMeasurement(10 * 2**20, 500 * 2**20, [9.0, 2.0, 2.0])

    monkeypatch.setattr(run_bench, "measure_steps", measured)
    assert cli.main(["bench", "step", "--config", config, "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "planned / measured" in out
    assert "10.0" in out
    assert "2.000" in out
    assert asked["trainer"] == "DPOTrainer"
    assert asked["steps"] == 3
    assert asked["given"]["max_length"] == 64


def test_bench_says_what_the_measured_process_said(config, capsys, monkeypatch):
    def failed(*args, **options):
        raise RuntimeError("the measured process failed (1): its last words")

    monkeypatch.setattr(run_bench, "measure_steps", failed)
    assert cli.main(["bench", "step", "--config", config]) == 1
    assert "its last words" in capsys.readouterr().err
