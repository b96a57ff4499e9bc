"""`from fastalign import DPOConfig, DPOTrainer` in place of TRL's: every field and parameter of TRL's is taken.

The lists are TRL's own, written by benchmarks/peers/trl_interface.py. A field that TRL adds belongs into one of the two
tables below, which say what becomes of values other than its default.
"""

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from fastalign import trainers

GOLDEN = Path(__file__).parent / "golden" / "trl_interface.json"
INTERFACE = json.loads(GOLDEN.read_text())
FIELDS = [(config, name) for config, fields in INTERFACE["configs"].items() for name in fields]

HONOURED = {
    "assistant_only_loss": True, "beta": 0.3, "bf16": False, "center_rewards_coefficient": 0.01,
    "chat_template_path": "template.jinja", "completion_only_loss": False, "dataset_text_field": "body",
    "disable_dropout": False, "discopop_tau": 0.1, "eos_token": "<end>", "eval_packing": False,
    "f_alpha_divergence_coef": 0.7, "f_divergence_type": "forward_kl", "gradient_checkpointing": False,
    "label_smoothing": 0.1, "ld_alpha": 0.5, "learning_rate": 3e-6, "logging_steps": 7, "loss_type": ["hinge"],
    "loss_weights": [0.5], "lr_scheduler_kwargs": {"num_cycles": 2}, "max_length": 77,
    "model_init_kwargs": {"revision": "main"}, "packing": True, "packing_strategy": "bfd_split",
    "pad_to_multiple_of": 8, "padding_free": True, "precompute_ref_log_probs": True, "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 10, "router_aux_loss_coef": 0.1, "sync_ref_model": True, "torch_empty_cache_steps": 5,
    "truncation_mode": "keep_end", "trust_remote_code": True, "use_weighting": True,
}  # fmt: skip
"""A value beside TRL's default that is kept."""

REFUSED = {
    "activation_offloading": True, "dataset_kwargs": {"skip_prepare_dataset": True}, "dataset_num_proc": 4,
    "pad_token": "<pad>", "precompute_ref_batch_size": 8, "shuffle_dataset": True,
    "use_liger_kernel": True,
    ("RewardConfig", "chat_template_path"): "template.jinja", ("RewardConfig", "eos_token"): "<end>",
    ("SFTConfig", "loss_type"): "dft",
}  # fmt: skip
"""A value beside TRL's default that is refused by name."""

COMPANIONS = {
    "discopop_tau": {"loss_type": ["discopop"]},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "label_smoothing": {"loss_type": ["robust"]},
    "loss_weights": {"loss_type": ["hinge"]},
    "ref_model_mixup_alpha": {"sync_ref_model": True},
    "ref_model_sync_steps": {"sync_ref_model": True},
}
"""What a value needs beside it, to have an effect."""


def make(config, folder, **settings):
    return getattr(trainers, config)(str(folder), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize("config", INTERFACE["configs"])
def test_all_of_trls_defaults_at_once(config, tmp_path):
    """As a config file that spells everything out has them."""
    make(config, tmp_path, **INTERFACE["configs"][config])


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_every_field_of_trl(config, name, tmp_path):
    assert name in {field.name for field in dataclasses.fields(getattr(trainers, config))}
    default = INTERFACE["configs"][config][name]
    make(config, tmp_path, **{name: default})

    refused = REFUSED.get((config, name), REFUSED.get(name))
    companions = COMPANIONS.get(name, {}) if config == "DPOConfig" else {}
    if refused is not None:
        assert refused != default
        with pytest.raises(ValueError, match=name):
            make(config, tmp_path, **{name: refused})
        return
    value = HONOURED[name]
    assert value != default
    made = make(config, tmp_path, **{name: value}, **companions)
    name = name.replace("gradient_", "activation_") if hasattr(made, "activation_checkpointing") else name
    assert getattr(made, name) in (value, *(value if isinstance(value, list) else ()))


@pytest.mark.parametrize("trainer", INTERFACE["constructors"])
def test_constructors_take_trls_parameters_in_trls_order(trainer):
    theirs = INTERFACE["constructors"][trainer]
    ours = list(inspect.signature(getattr(trainers, trainer).__init__).parameters)[1:]
    assert ours[: len(theirs)] == theirs


def test_an_optimizer_class_is_used(kit, rewards):
    from fastalign.trainers import RewardTrainer, SFTTrainer

    given = (torch.optim.SGD, {"lr": 0.3, "momentum": 0.8})
    sft = SFTTrainer(
        kit.model(), kit.sft(kit.model(), kit.sequences(4)).args, train_dataset=kit.sequences(4),
        processing_class=kit.tokenizer, optimizer_cls_and_kwargs=given,
    )  # fmt: skip
    reward = RewardTrainer(
        rewards.model(), rewards.config(), train_dataset=rewards.pairs(4), processing_class=kit.tokenizer,
        optimizer_cls_and_kwargs=given,
    )  # fmt: skip
    for trainer in (sft, reward):
        trainer.create_optimizer()
        assert isinstance(trainer.optimizer, torch.optim.SGD)
        assert trainer.optimizer.defaults["momentum"] == 0.8


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        ("SFTTrainer", "compute_loss_func"),
        ("SFTTrainer", "preprocess_logits_for_metrics"),
        ("SFTTrainer", "compute_metrics"),
        ("RewardTrainer", "preprocess_logits_for_metrics"),
        ("DPOTrainer", "compute_metrics"),
    ],
)
def test_functions_of_logits_are_refused_by_name(trainer, name, kit):
    with pytest.raises(ValueError, match=f"{name} is not supported: no logits"):
        getattr(trainers, trainer)(kit.model(), processing_class=kit.tokenizer, **{name: lambda *given: None})


def test_deprecated_names_of_what_is_honoured(tmp_path):
    config = make("SFTConfig", tmp_path, loss_type="chunked_nll", packing_strategy="bfd-requeue")
    assert (config.loss_type, config.packing_strategy) == ("nll", "bfd_split")


@pytest.mark.parametrize(("given", "expected"), [("auto", None), ("none", None), (None, None), ("16", 16), (8, 8)])
def test_pad_to_multiple_of_as_text(given, expected, tmp_path):
    assert make("SFTConfig", tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == expected


@pytest.mark.parametrize("given", ["many", 0, -8, True, 1.5])
def test_pad_to_multiple_of_that_is_no_number(given, tmp_path):
    with pytest.raises(ValueError, match="pad_to_multiple_of="):
        make("SFTConfig", tmp_path, pad_to_multiple_of=given)


@pytest.mark.peers
def test_the_list_is_that_of_the_installed_trl(repository):
    pytest.importorskip("trl")
    path = repository / "benchmarks/peers/trl_interface.py"
    spec = importlib.util.spec_from_file_location("trl_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = json.loads(json.dumps(module.interface()))
    for part in ("configs", "constructors"):
        assert found[part] == INTERFACE[part]


@pytest.mark.parametrize("config", INTERFACE["configs"])
def test_hugging_faces_argument_parser(config, tmp_path):
    """Scripts make their arguments of a config's fields; what is not given has its default."""
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--learning_rate", "3e-5"]
    parser = HfArgumentParser((getattr(trainers, config),))
    (parsed,) = parser.parse_args_into_dataclasses(words)
    parser.format_help()
    expected = make(config, tmp_path, learning_rate=3e-5)
    for name in INTERFACE["configs"][config]:
        assert getattr(parsed, name) == getattr(expected, name), name
