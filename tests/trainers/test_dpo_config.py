"""Every setting is honoured or refused by name."""

import dataclasses

import pytest

from fastalign.losses import DPO_LOSSES, DPOOptions
from fastalign.trainers import DPOConfig


def config(tmp_path, **settings):
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_those_of_the_documentation(tmp_path):
    args = config(tmp_path)
    assert (args.learning_rate, args.logging_steps, args.beta, args.loss_type) == (1e-6, 10, 0.1, "sigmoid")
    assert args.gradient_checkpointing
    assert not args.bf16
    assert not args.logging_nan_inf_filter
    assert args.max_length == 1024


@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_under_its_old_name(tmp_path, value, recwarn):
    args = config(tmp_path, gradient_checkpointing=value)
    assert args.gradient_checkpointing is value
    assert dataclasses.replace(args).gradient_checkpointing is value
    assert not [w for w in recwarn if "gradient_checkpointing" in str(w.message)]


def test_checkpointing_arguments_reach_transformers(tmp_path):
    args = config(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(DPOConfig):
        if field.name in DPOConfig.__annotations__:
            assert field.metadata["help"].endswith("."), field.name


def test_loss_type_as_a_list_of_one(tmp_path):
    assert config(tmp_path, loss_type=["hinge"]).loss_type == "hinge"
    weighted = config(tmp_path, loss_type=["hinge"], loss_weights=[0.5])
    assert (weighted.loss_type, weighted.loss_weights) == (["hinge"], [0.5])
    assert config(tmp_path, loss_type=["sigmoid", "hinge"]).loss_types == ("sigmoid", "hinge")


def test_the_losses_options_are_fields_with_their_defaults(tmp_path):
    """One list of options: those of the losses; TRL's names and defaults."""
    args = config(tmp_path)
    assert {name: getattr(args, name) for name in DPOOptions._fields} == DPOOptions()._asdict()
    assert (args.simpo_gamma, args.cpo_alpha, args.desirable_weight, args.undesirable_weight) == (0.5, 1.0, 1.0, 1.0)


SET = {
    "loss_weights": ([0.5], ["sigmoid"]), "label_smoothing": (0.1, "robust"), "length_alpha": (0.1, "hinge"),
    "f_divergence_type": ("js_divergence", "ipo"), "ld_alpha": (0.5, "sigmoid"), "use_weighting": (True, "apo_zero"),
    "discopop_tau": (0.1, "discopop"), "simpo_gamma": (1.0, "simpo"), "cpo_alpha": (0.5, "cpo"),
    "desirable_weight": (2.0, "kto"), "undesirable_weight": (2.0, "bco"), "bco_running_shift": (True, "bco_pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", SET)
def test_an_option_is_taken_by_its_losses_and_refused_by_others(tmp_path, name):
    value, loss_type = SET[name]
    assert getattr(config(tmp_path, loss_type=loss_type, **{name: value}), name) == value
    if name != "loss_weights":
        other = "nca_pair" if name not in ("ld_alpha", "use_weighting") else "kto"
        with pytest.raises(ValueError, match=name):
            config(tmp_path, loss_type=other, **{name: value})


def test_where_the_reference_is(tmp_path):
    """Scored beforehand by default; live where it changes; nowhere for losses without one."""
    assert config(tmp_path).precompute_ref_log_probs is True
    assert config(tmp_path, precompute_ref_log_probs=False).precompute_ref_log_probs is False
    assert config(tmp_path, sync_ref_model=True).precompute_ref_log_probs is False
    assert config(tmp_path, loss_type="simpo").precompute_ref_log_probs is False
    assert config(tmp_path, loss_type=["simpo", "sigmoid"]).precompute_ref_log_probs is True
    assert dataclasses.replace(config(tmp_path, sync_ref_model=True)).sync_ref_model


REFERENCE_REFUSALS = [
    ("precompute_ref_log_probs", {"sync_ref_model": True, "precompute_ref_log_probs": True}),
    ("use_peft", {"sync_ref_model": True, "use_peft": True}),
    ("ref_model_mixup_alpha", {"ref_model_mixup_alpha": 0.5}),
    ("ref_model_sync_steps", {"ref_model_sync_steps": 10}),
    ("ref_model_mixup_alpha", {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}),
    ("ref_model_sync_steps", {"sync_ref_model": True, "ref_model_sync_steps": 0}),
    ("precompute_ref_batch_tokens", {"precompute_ref_log_probs": False, "precompute_ref_batch_tokens": 512}),
    ("ref_model_name_or_path", {"loss_type": "cpo", "ref_model_name_or_path": "sft"}),
    ("sync_ref_model", {"loss_type": "orpo", "sync_ref_model": True}),
    ("precompute_ref_log_probs", {"loss_type": "sft", "precompute_ref_log_probs": True}),
    ("precompute_ref_batch_tokens", {"loss_type": "simpo", "precompute_ref_batch_tokens": 512}),
]


@pytest.mark.parametrize(("name", "settings"), REFERENCE_REFUSALS)
def test_settings_of_another_place_of_the_reference(tmp_path, name, settings):
    with pytest.raises(ValueError, match=name):
        config(tmp_path, **settings)


def test_choices_are_the_losses():
    assert DPOConfig.__dataclass_fields__["loss_type"].metadata["choices"] == tuple(DPO_LOSSES)


UNSUPPORTED = {
    "activation_offloading": True, "dataset_num_proc": 2, "pad_token": "<pad>",
    "precompute_ref_batch_size": 8, "use_liger_kernel": True, "label_smoothing_factor": 0.1, "torch_compile": True,
    "batch_eval_metrics": True,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}=.*not supported.*accepted is"):
        config(tmp_path, **{name: UNSUPPORTED[name]})


def test_trls_neutral_values_are_taken(tmp_path):
    config(
        tmp_path, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, padding_free=False,
        sync_ref_model=False, loss_weights=None, precompute_ref_log_probs=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0), ("loss_type", "dpo"), ("label_smoothing", 0.5), ("length_alpha", float("inf")),
        ("micro_batch_tokens", -1), ("lora_dropout", 1.0), ("lora_r", 0), ("workspace_mb", 0.0), ("dtype", "half"),
        ("precompute_ref_batch_tokens", 0), ("on_bad_row", "drop"), ("dataset_format", "xml"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        config(tmp_path, **{name: value})


def test_an_option_that_its_loss_cannot_honour(tmp_path):
    with pytest.raises(ValueError, match="length_alpha"):
        config(tmp_path, loss_type="ipo", length_alpha=0.1)
