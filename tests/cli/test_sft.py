"""`fastalign sft` from a file to a saved model, and back from what it saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.cli import main
from fastalign.cli.flags import load_yaml
from fastalign.cli.settings import CONFIG_FILE


@pytest.fixture
def sft_yaml(settings, tmp_path) -> Path:
    """Two steps on prompts with completions."""
    import yaml

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(20)))
    own = {name: value for name, value in settings.items() if name != "cache_dir"}
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(own | {"dataset_name": str(data)}))
    return path


def test_a_run_and_its_repetition_from_the_saved_configuration(sft_yaml, settings, capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["sft", "--config", str(sft_yaml), "--completion_only_loss", "false"]) == 0
    printed = capsys.readouterr().out
    assert "training loss: " in printed
    assert "eval at step 2: loss " in printed
    assert ", accuracy 0." in printed
    out = Path(settings["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    assert load_yaml(out / CONFIG_FILE)["completion_only_loss"] is False
    again = tmp_path / "again"
    assert main(["sft", "--config", str(out / CONFIG_FILE), "--output_dir", str(again)]) == 0
    repeated = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repeated.parameters(), strict=True))


def test_resuming_goes_on_from_the_last_checkpoint(sft_yaml, settings):
    assert main(["sft", "--config", str(sft_yaml)]) == 0
    assert main(["sft", "--config", str(sft_yaml), "--max_steps", "3", "--resume_from_checkpoint"]) == 0
    state = json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_packing_is_a_flag(sft_yaml, settings):
    assert main(["sft", "--config", str(sft_yaml), "--packing", "--max_length", "32", "--eval_packing", "false"]) == 0
    assert "fastalign" not in (Path(settings["output_dir"]) / "config.json").read_text()


def test_the_example_is_a_configuration(tmp_path):
    from fastalign.cli.sft import COMMAND
    from fastalign.trainers import SFTConfig

    example = Path(__file__).parents[2] / "examples" / "sft.yaml"
    given = COMMAND.settings(["--config", str(example), "--output_dir", str(tmp_path), "--use_cpu"])
    config = SFTConfig(**given)
    assert config.packing
    assert config.assistant_only_loss
    assert set(COMMAND.required) <= given.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_type", "dft"], "loss_type='dft' is not supported yet"),
        (["--learning-rte", "1"], "unknown flag --learning_rte (did you mean --learning_rate?)"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--dataset_text_field", "body", "--assistant_only_loss", "true"], "assistant_only_loss=True needs messages"),
    ],
)
def test_user_errors_are_2_and_named(flags, message, sft_yaml, capsys):
    assert main(["sft", "--config", str(sft_yaml), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_bad_row_is_named(sft_yaml, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    rows = [{"text": "a"}, {"text": ""}, {"prompt": "b"}]
    broken.write_text("\n".join(map(json.dumps, rows)))
    split = ["--dataset_name", str(broken), "--dataset_train_split", "train", "--dataset_test_split", "train[:1]"]
    assert main(["sft", "--config", str(sft_yaml), *split]) == 2
    err = capsys.readouterr().err
    assert "row 1: empty response" in err
    assert "row 2: missing key" in err
    assert main(["sft", "--config", str(sft_yaml), *split, "--on_bad_row", "skip"]) == 0


def test_help_lists_fields_in_the_words_of_the_config(capsys):
    assert main(["sft", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--assistant_only_loss" in out
    assert "--beta" not in out
