"""Every setting of SFT is honoured or refused by name."""

import dataclasses

import pytest

from fastalign.trainers import SFTConfig


def config(tmp_path, **settings):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_those_of_the_documentation(tmp_path):
    args = config(tmp_path)
    assert (args.learning_rate, args.max_length, args.dataset_text_field) == (2e-5, 1024, "text")
    assert args.completion_only_loss is None
    assert not args.assistant_only_loss
    assert not args.disable_dropout


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(SFTConfig):
        if field.name in SFTConfig.__annotations__:
            assert field.metadata["help"].endswith("."), field.name


UNSUPPORTED = {
    "loss_type": "dft", "shuffle_dataset": True, "dataset_kwargs": {"skip_prepare_dataset": True},
    "activation_offloading": True, "dataset_num_proc": 2, "pad_token": "<pad>",
    "use_liger_kernel": True, "label_smoothing_factor": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}=.*not supported.*accepted is"):
        config(tmp_path, **{name: UNSUPPORTED[name]})


def test_bad_values_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="dataset_text_field"):
        config(tmp_path, dataset_text_field="")
    with pytest.raises(ValueError, match="packing_strategy='wrapped': accepted are bfd, bfd_split"):
        config(tmp_path, packing_strategy="wrapped")
    for name in ("packing", "eval_packing"):
        with pytest.raises(ValueError, match="packing=True needs max_length"):
            config(tmp_path, max_length=None, **{name: True})
    with pytest.raises(ValueError, match="'bfd_split' with eval_packing=False"):
        config(tmp_path, packing=True, packing_strategy="bfd_split", eval_packing=False)
