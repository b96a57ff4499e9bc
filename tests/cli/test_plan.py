"""`fastalign plan` and `fastalign bench step` on the command line."""

from __future__ import annotations

import json

import pytest
import torch
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
        (["plan", "--confg", "run.yaml"], "unknown flag --confg (did you mean --config?)"),
        (["plan", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        (["plan", "--tokns", "8"], "unknown flag --tokns (did you mean --tokens?)"),
        (["bench", "step", "--stps", "8"], "unknown flag --stps (did you mean --steps?)"),
        (
            ["plan", "--model_name_or_path", "./nowhere", "--tokens", "8", "--use_cpu"],
            "'./nowhere': there is no such folder",
        ),
        (["plan", "--model_name_or_path", "m", "--tokens", "8", "--memory_gb", "inf"], "--memory_gb takes a positive"),
        (["bench"], "an action is needed"),
        (["bench", "stp"], "unknown action 'stp'"),
        (["bench", "step", "--model_name_or_path", "m", "--tokens", "8", "--steps", "0"], "--steps takes a positive"),
    ],
)
def test_what_cannot_be_honoured(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--optim", "adamw_8bit"], "bitsandbytes"),
        (["plan", "--micro_batch_tokens", "auto"], "memory_gb is missing: on the CPU"),
        (["plan", "--micro_batch_tokens", "atuo"], "micro_batch_tokens='atuo': accepted are"),
        (["plan", "--micro_batch_tokens", "auto", "--memory_gb", "1e-3"], "and the budget is 0.001 GiB"),
        pytest.param(
            ["plan", "--micro_batch_tokens", "auto", "--device", "cuda"], "there is no GPU here", marks=NO_GPU
        ),
        pytest.param(["bench", "step", "--device", "cuda"], "this machine has no GPU to measure on", marks=NO_GPU),
        pytest.param(
            ["plan", "--use_cpu=false", "--bf16", "true"], "This machine has no GPU; --device cuda plans for one",
            marks=NO_GPU,
        ),
    ],
)  # fmt: skip
def test_what_a_run_cannot_have_is_one_line(argv, message, checkpoint, capsys):
    """Status 2, and nothing on stdout."""
    command = argv[: 2 if argv[0] == "bench" else 1]
    given = ["--model_name_or_path", str(checkpoint), "--tokens", "32", "--use_cpu"]
    own = [word for word in given if word.partition("=")[0] not in {w.partition("=")[0] for w in argv}]
    assert cli.main([*command, *own, *argv[len(command) :]]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_that_is_planned_for_need_not_be_here(device, checkpoint, capsys):
    """A GPU computes in bfloat16 unless the settings say otherwise; a file for it holds what this machine refuses."""
    base = ["plan", "--model_name_or_path", str(checkpoint), "--tokens", "32", "--brief", "--json", "--device", device]
    parts = []
    for own in ([], ["--bf16", "false"], ["--bf16", "true"]):
        assert cli.main([*base, *own]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        assert plan["device_type"] == device
        parts.append(plan["parts"])
    assert ("copies" in parts[0]) == (device == "cuda")
    assert "copies" not in parts[1]
    assert parts[2]["copies"] > 0
    assert parts[0] == parts[2 if device == "cuda" else 1]


def test_bad_rows_are_said_as_in_training(checkpoint, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n')
    argv = ["plan", "--model_name_or_path", str(checkpoint), "--use_cpu", "--dataset_name"]
    assert cli.main([*argv, str(path)]) == 2
    assert "row 0: missing key (no rejected)" in capsys.readouterr().err
    assert cli.main([*argv, str(tmp_path / "nowhere.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_phase_of_ppo(checkpoint, preferences, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} + 1 ="}) + "\n" for n in range(4)))
    argv = ["plan", "--trainer", "ppo", "--model_name_or_path", str(checkpoint), "--use_cpu", "--response_length", "8"]
    assert cli.main([*argv, "--dataset_name", str(prompts), "--reward_model_path", str(checkpoint), "--brief"]) == 0
    out = capsys.readouterr().out
    for word in ("sampling", "scoring", "update", "critic", "reference", "rewards"):
        assert word in out
    assert cli.main([*argv, "--tokens", "64", "--use_vllm"]) == 2
    assert "use_vllm=True cannot be planned" in capsys.readouterr().err


def test_the_choice_of_a_run_is_what_its_plan_says(config, capsys, caplog):
    """`fastalign dpo` chooses what `fastalign plan` names for the same file."""
    argv = ["--config", config, "--micro_batch_tokens", "auto", "--memory_gb", "0.5"]
    assert cli.main(["plan", *argv, "--json", "--brief"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == found["auto"]["plan"]
    with caplog.at_level("INFO", logger="fastalign.planning.sizing"):
        caplog.clear()
        assert cli.main(["dpo", *argv, "--max_steps", "1"]) == 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fastalign.planning.sizing"]
    assert line.startswith(f"micro_batch_tokens: {found['auto']['micro_batch_tokens']},")


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
    assert asked["micro_batch_tokens"] == 1024


def test_bench_says_what_the_measured_process_said(config, capsys, monkeypatch):
    def failed(*args, **options):
        raise RuntimeError("the measured process failed (1): its last words")

    monkeypatch.setattr(run_bench, "measure_steps", failed)
    assert cli.main(["bench", "step", "--config", config]) == 1
    assert "its last words" in capsys.readouterr().err
