"""Raw settings → a config; its help; the file that reproduces a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from fastalign.cli.flags import Raw, UsageError, load_yaml
from fastalign.cli.settings import CONFIG_FILE, config_fields, help_text, resolved, save, typed


@dataclasses.dataclass
class ToyConfig(TrainingArguments):
    beta: float = dataclasses.field(default=0.1, metadata={"help": "Strength of the tie\n to the reference."})
    loss_type: str | list[str] = dataclasses.field(default="sigmoid", metadata={"choices": ("sigmoid", "ipo", "sft")})
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


def words(*given: str) -> Raw:
    return Raw(list(given), "the command line", words=True)


def test_types_from_both_sources():
    raw = {
        "beta": words("0.2"),
        "loss_type": words("ipo", "sft"),
        "bf16": words(),
        "learning_rate": Raw("5e-7", "run.yaml"),
        "eval_strategy": Raw(False, "run.yaml"),
        "max_steps": Raw(3, "run.yaml"),
    }
    assert typed(ToyConfig, raw) == {
        "beta": 0.2,
        "loss_type": ["ipo", "sft"],
        "bf16": True,
        "learning_rate": 5e-7,
        "eval_strategy": "no",
        "max_steps": 3,
    }


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("beta", words("abc"), "--beta: 'abc' cannot be taken; accepted: a number"),
        ("beta", words(), "--beta needs a value; accepted: a number"),
        ("beta", words("1", "2"), "--beta takes one value, got 2: 1 2; accepted: a number"),
        ("max_steps", Raw(1.5, "run.yaml"), "run.yaml: max_steps: 1.5 cannot be taken; accepted: an integer"),
        ("loss_type", words("ippo"), "--loss_type: 'ippo' cannot be taken; accepted: one of sigmoid, ipo, sft"),
        ("loss_type", words("ipo", "x"), r"--loss_type: \['ipo', 'x'\] cannot be taken"),
        (
            "run_name",
            Raw(7, "run.yaml"),
            "run.yaml: run_name: 7 cannot be taken; accepted: text or null; put it in quotes",
        ),
        ("eval_strategy", words("stepz"), "accepted: one of no, steps, epoch"),
        ("fsdp_config", Raw([1], "run.yaml"), "accepted: a mapping"),
    ],
)
def test_wrong_values_name_the_key_the_value_and_what_is_accepted(name, setting, message):
    with pytest.raises(UsageError, match=message):
        typed(ToyConfig, {name: setting})


def test_saved_config_reproduces_the_run(tmp_path):
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 5e-7,
        "eval_strategy": "no",
        "loss_type": ["ipo", "sft"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "run_name": "7",
        "hub_token": "secret",
    }
    path = save(ToyConfig, given, tmp_path / "out", "dpo")
    assert path == tmp_path / "out" / CONFIG_FILE
    text = path.read_text()
    assert "secret" not in text
    assert text.index("learning_rate") < text.index("# Defaults") < text.index("beta")

    again = typed(ToyConfig, {name: Raw(value, str(path)) for name, value in load_yaml(path).items()})
    expected = {name: value for name, value in resolved(ToyConfig, given).items() if name != "hub_token"}
    assert again == expected
    assert ToyConfig(**again).learning_rate == 5e-7


def test_help_describes_own_fields_and_names_inherited_ones():
    text = help_text(ToyConfig, "dpo", "Train.", everything=False)
    assert "--beta\n        Strength of the tie to the reference. [a number, default 0.1]" in text
    assert '[one of sigmoid, ipo, sft, default "sigmoid"]' in text
    assert "--learning_rate" not in text
    assert "learning_rate" in text


def test_help_all_describes_every_field():
    text = help_text(ToyConfig, "dpo", "Train.", everything=True)
    assert all(f"--{name}\n" in text for name in config_fields(ToyConfig))


def test_saved_defaults_are_plain_yaml(tmp_path):
    path = save(ToyConfig, {"output_dir": str(tmp_path)}, tmp_path, "dpo")
    assert set(yaml.safe_load(path.read_text())) == {n for n in config_fields(ToyConfig) if not n.endswith("_token")}
