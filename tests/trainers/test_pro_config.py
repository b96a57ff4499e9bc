"""Every setting of PRO is honoured or refused by name."""

import dataclasses

import pytest

from fastalign.trainers import PROConfig


def config(tmp_path, **settings):
    return PROConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_the_papers(tmp_path):
    args = config(tmp_path)
    assert (args.learning_rate, args.loss_type, args.sft_coef, args.sft_weight) == (5e-6, "pro", "auto", "auto")
    assert args.reference_free
    assert not args.reward_temperatures
    assert not args.merge_pairs


def test_the_sft_term_is_off_beside_a_reference_unless_asked_for(tmp_path):
    assert config(tmp_path, reference_free=False).sft_weight == 0
    assert config(tmp_path, reference_free=False, sft_coef=0.2).sft_weight == 0.2
    assert config(tmp_path, sft_coef="0.25").sft_weight == 0.25  # as a command line gives it


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(PROConfig):
        if field.name in PROConfig.__annotations__:
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "listnet"}, "loss_type='listnet' is unknown: accepted are 'pro', 'infonce'"),
        ({"beta": 0}, "beta=0: it must be positive"),
        ({"sft_coef": -0.1}, "sft_coef=-0.1: accepted are 'auto' and numbers"),
        ({"sft_coef": "paper"}, "sft_coef='paper'"),
        ({"cache_dir": "x"}, "cache_dir='x' has no effect with reference_free=True"),
        ({"ref_model_name_or_path": "x"}, "ref_model_name_or_path='x' has no effect"),
        ({"reference_free": False, "precompute_ref_batch_tokens": 0}, "precompute_ref_batch_tokens=0"),
        ({"merge_pairs": True, "reward_temperatures": True}, "needs scored lists"),
        ({"activation_offloading": True}, "activation_offloading=True is not supported"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
