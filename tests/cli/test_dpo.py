"""`fastalign dpo` from a file to a saved model, and back from what it saved."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from fastalign.cli import main
from fastalign.cli.flags import load_yaml
from fastalign.cli.settings import CONFIG_FILE


def steps_done(settings) -> int:
    return json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["global_step"]


def test_a_run_and_its_repetition_from_the_saved_configuration(run_yaml, settings, capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["dpo", "--config", str(run_yaml), "--beta", "0.2", "--loss_type=ipo"]) == 0
    printed = capsys.readouterr().out
    assert "training loss: " in printed
    assert "eval at step 2: loss " in printed
    assert printed.count(" ± ") == 2
    assert "40 computed" in printed
    out = Path(settings["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0

    saved = load_yaml(out / CONFIG_FILE)
    assert saved["beta"] == 0.2
    assert saved["loss_type"] == "ipo"
    assert saved["save_steps"] == 1
    again = tmp_path / "again"
    assert main(["dpo", "--config", str(out / CONFIG_FILE), "--output_dir", str(again)]) == 0
    assert "40 found, 0 computed" in capsys.readouterr().out
    repeated = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repeated.parameters(), strict=True))


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--loss_type", "kto", "--desirable_weight", "1.2"], "computed"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5"], "computed"),
        (["--loss_type", "orpo"], "training loss: "),
        (["--sync_ref_model", "--ref_model_sync_steps", "1"], "training loss: "),
    ],
    ids=lambda part: part[1] if isinstance(part, list) else "",
)
def test_losses_of_every_kind(run_yaml, flags, printed, capsys):
    """On single responses (made of the pairs), of several terms, without a reference, with one that changes."""
    assert main(["dpo", "--config", str(run_yaml), *flags]) == 0
    out = capsys.readouterr().out
    assert printed in out
    assert "eval at step 2: loss " in out
    assert ("reference log-probs" in out) == (printed == "computed")


def test_a_loss_without_reference_has_no_cache_to_build(run_yaml, capsys):
    assert main(["cache", "build", "--config", str(run_yaml), "--loss_type", "simpo"]) == 2
    assert "simpo" in capsys.readouterr().err


def test_resuming_goes_on_from_the_last_checkpoint(run_yaml, settings):
    assert main(["dpo", "--config", str(run_yaml)]) == 0
    assert main(["dpo", "--config", str(run_yaml), "--max_steps", "3", "--resume_from_checkpoint"]) == 0
    assert steps_done(settings) == 3
    history = json.loads((Path(settings["output_dir"]) / "checkpoint-3/trainer_state.json").read_text())
    assert history["global_step"] == 3
    assert load_yaml(Path(settings["output_dir"]) / CONFIG_FILE)["resume_from_checkpoint"] is None


def test_resuming_from_nothing_is_an_error(run_yaml, capsys):
    run_yaml.write_text(run_yaml.read_text() + "resume_from_checkpoint: true\n")
    assert main(["dpo", "--config", str(run_yaml)]) == 2
    assert "No valid checkpoint found in output directory" in capsys.readouterr().err


def test_an_interrupt_says_where_to_go_on(run_yaml, settings, capsys, monkeypatch):
    from fastalign.trainers import DPOTrainer

    original = DPOTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", step)
    assert main(["dpo", "--config", str(run_yaml)]) == 130
    checkpoint = Path(settings["output_dir"]) / "checkpoint-1"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastalign dpo: interrupted; at step 1; {checkpoint} is the last checkpoint:"
        " go on with --resume_from_checkpoint"
    )


@pytest.mark.usefixtures("python_signals")
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_lets_the_step_finish_and_be_saved(run_yaml, settings, capsys, monkeypatch, number, status, word):
    from fastalign.trainers import DPOTrainer

    original = DPOTrainer.training_step

    def step(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", step)
    assert main(["dpo", "--config", str(run_yaml), "--save_steps", "100"]) == status
    out = Path(settings["output_dir"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastalign dpo: {word}; at step 1; {out / 'checkpoint-1'} is the last checkpoint:"
        " go on with --resume_from_checkpoint"
    )
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_is_missing_is_named(name, settings, tmp_path, capsys):
    argv = [word for key, value in settings.items() if key != name for word in (f"--{key}", str(value).lower())]
    assert main(["dpo", *argv]) == 2
    assert f"fastalign dpo: error: {name} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "-1"], "beta"),
        (["--loss_type", "dpo"], "--loss_type: 'dpo' cannot be taken; accepted: one of sigmoid, robust, hinge"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--fsdp", "full_shard"], "fsdp shards over several processes"),
    ],
)
def test_user_errors_are_2_and_one_line(flags, message, run_yaml, capsys):
    assert main(["dpo", "--config", str(run_yaml), *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastalign dpo: error: ")
    assert message in last


def test_a_bad_row_is_named(run_yaml, preferences, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    rows = preferences.read_text().splitlines()
    rows[3] = json.dumps({"prompt": "3 + 1 =", "chosen": "", "rejected": " 5"})
    broken.write_text("\n".join(rows))
    assert main(["dpo", "--config", str(run_yaml), "--dataset_name", str(broken)]) == 2
    err = capsys.readouterr().err
    assert "row 3: empty response" in err
    assert "Traceback" not in err
    assert main(["dpo", "--config", str(run_yaml), "--dataset_name", str(broken), "--on_bad_row", "skip"]) == 0


def test_help_lists_fields_in_the_words_of_the_config(capsys):
    assert main(["dpo", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--length_alpha" in out
    assert "one of sigmoid, " in " ".join(out.split())
    assert "--weight_decay\n" not in out
    assert main(["dpo", "--help_all"]) == 0
    assert "--weight_decay\n" in capsys.readouterr().out
