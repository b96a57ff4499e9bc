"""The configurations for `accelerate launch`: accelerate reads them, and the trainers take what they ask for."""

import json
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin

from fastalign.trainers.sharding import check_fsdp
from fastalign.trainers.zero import check_deepspeed

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "FSDP", "zero3": "DEEPSPEED"}
PLAIN = SimpleNamespace(fp16=False, auto_find_batch_size=False, merge_adapter=False, load_best_model_at_end=False)


def test_each_is_listed_here_and_in_the_documentation(repository):
    files = {path.stem for path in (repository / "examples/accelerate").glob("*.yaml")}
    assert files == set(KINDS)
    text = (repository / "docs/processes.md").read_text()
    assert all(f"`examples/accelerate/{name}.yaml`" in text for name in files)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads_it(repository, name, kind):
    config = load_config_from_file(str(repository / f"examples/accelerate/{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision in ("no", None)


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_the_trainers_take_its_fsdp(repository, name, monkeypatch):
    given = load_config_from_file(str(repository / f"examples/accelerate/{name}.yaml")).fsdp_config
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")  # restored afterwards: the plugin writes it
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=given["fsdp_version"], auto_wrap_policy=given["fsdp_auto_wrap_policy"],
        reshard_after_forward=given["fsdp_reshard_after_forward"], state_dict_type=given["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=given["fsdp_cpu_ram_efficient_loading"], cpu_offload=given["fsdp_offload_params"],
        activation_checkpointing=given["fsdp_activation_checkpointing"],
    )  # fmt: skip
    check_fsdp(plugin, PLAIN)


def test_the_trainers_take_its_deepspeed(repository):
    given = load_config_from_file(str(repository / "examples/accelerate/zero3.yaml")).deepspeed_config
    config = json.loads((repository / given["deepspeed_config_file"]).read_text())
    stage = config["zero_optimization"]["stage"]
    check_deepspeed(SimpleNamespace(zero_stage=stage, deepspeed_config=config), PLAIN)
    assert given["zero3_init_flag"] is False
