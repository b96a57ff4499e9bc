"""What DeepSpeed is refused for, by name; tests/distributed has the runs."""

from types import SimpleNamespace

import pytest
from torch import nn

from fastalign.models.sharding import whole_weights
from fastalign.trainers.zero import check_deepspeed, check_partitioned


def plugin(stage=3, **zero):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True} | zero
    return SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})


def args(**settings):
    plain = {"fp16": False, "auto_find_batch_size": False, "load_best_model_at_end": False}
    return SimpleNamespace(**(plain | settings))


def test_zero_3_is_taken():
    check_deepspeed(plugin(), args(loss_types=("sigmoid",), normalize_rewards="none"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stage": 2}, "ZeRO stage 2 is not supported: set it to 3"),
        ({"stage3_gather_16bit_weights_on_model_save": False}, "a run would end without a model"),
        ({"offload_param": {"device": "cpu"}}, "offload_param is not supported"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer is not supported"),
    ],
)
def test_settings_of_deepspeed(given, message):
    with pytest.raises(ValueError, match=message):
        check_deepspeed(plugin(**given), args())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"fp16": True}, "fp16"),
        ({"merge_adapter": True}, "merge_adapter"),
        ({"normalize_rewards": "mean"}, "normalize_rewards"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"loss_types": ("kto",)}, "loss_type='kto'"),
        ({"response_length": 8}, "PPO"),
    ],
)
def test_settings_of_the_trainer(settings, name):
    with pytest.raises(ValueError, match=f"{name} is not supported with DeepSpeed ZeRO-3: .*fsdp"):
        check_deepspeed(plugin(), args(**settings))


def test_a_model_that_was_not_partitioned_is_named():
    with pytest.raises(ValueError, match=r"deepspeed is asked for, and 0\.weight is whole"):
        check_partitioned(nn.Sequential(nn.Linear(2, 2)))


def test_whole_weights_are_refused():
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="Linear is partitioned by DeepSpeed ZeRO-3"), whole_weights(model):
        pass
