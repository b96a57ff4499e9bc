"""What `fastalign.patch` and the method that it gives refuse."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastalign.integrations import patch


def test_refusals_name_what_is_wrong(zoo):
    model, batch = zoo.make("llama"), zoo.batch()
    with pytest.raises(ValueError, match="Linear"):
        patch(nn.Linear(2, 2))
    patch(model)
    with pytest.raises(ValueError, match=r"completion_mask must be \(2, 7\)"):
        model.logps(batch["input_ids"], batch["attention_mask"].bool()[:, 1:])
    with pytest.raises(ValueError, match="float32"):
        model.logps(batch["input_ids"], batch["attention_mask"].bool().float())
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\)"):
        model.logps(batch["input_ids"][0], batch["attention_mask"].bool()[0])
    with pytest.raises(ValueError, match="temperature"):
        model.logps(batch["input_ids"], batch["attention_mask"].bool(), temperature=0.0)
    with pytest.raises(ValueError, match="labels"):
        model.logps(batch["input_ids"], batch["attention_mask"].bool(), labels=batch["input_ids"])

    class Own(tf.LlamaForCausalLM):
        def logps(self):
            return None

    with pytest.raises(ValueError, match="Own has a method logps"):
        patch(Own(tf.LlamaConfig(**zoo.decoder)))


def test_a_sharded_head_is_refused_by_name(zoo, tmp_path):
    model = zoo.make("llama")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is sharded.*DistributedDataParallel"):
            patch(model)
    finally:
        torch.distributed.destroy_process_group()
