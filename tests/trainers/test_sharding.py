"""What FSDP is refused for, by name; tests/distributed has the runs."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from fastalign.trainers.sharding import check_fsdp, check_shardable, check_sharded


@pytest.fixture
def args():
    return SimpleNamespace(fp16=False, auto_find_batch_size=False, merge_adapter=False)


@pytest.fixture
def plugin(monkeypatch):
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_STATE_DICT_TYPE"):
        monkeypatch.setenv(name, "")  # restored afterwards: the plugin writes it
        monkeypatch.delenv(name)
    return lambda **given: FullyShardedDataParallelPlugin(
        **({"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | given)
    )


def test_fsdp2_is_taken(args, plugin):
    check_fsdp(plugin(), args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1 is not supported: set fsdp_version to 2"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading=True is not supported with FSDP2"),
        ({"cpu_offload": True}, "cpu_offload=True is not supported"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "state_dict_type='SHARDED_STATE_DICT'.*FULL_STATE_DICT"),
    ],
)
def test_settings_of_fsdp(args, plugin, given, message):
    with pytest.raises(ValueError, match=message):
        check_fsdp(plugin(**given), args)


@pytest.mark.parametrize("name", ["fp16", "auto_find_batch_size", "merge_adapter"])
def test_settings_of_the_trainer(args, plugin, name):
    setattr(args, name, True)
    with pytest.raises(ValueError, match=f"{name}=True is not supported with FSDP2"):
        check_fsdp(plugin(), args)


def test_a_quantised_model(kit):
    model = kit.model()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="quantised by bitsandbytes is not supported with FSDP2"):
        check_shardable(model)


def test_a_model_that_was_not_sharded_is_named():
    with pytest.raises(ValueError, match=r"fsdp is asked for, and 0\.weight is a Parameter"):
        check_sharded(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))


def test_one_process(kit):
    with pytest.raises(ValueError, match="fsdp shards over several processes and this is one"):
        kit.config(fsdp=True)
