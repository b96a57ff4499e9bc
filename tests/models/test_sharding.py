"""FSDP2 around fused models, in one process with gloo: tests/distributed has several."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastalign.models import fuse_head
from fastalign.models.sharding import call_within, is_sharded, reshard, set_gradient_sync, sharded_names, whole_weights


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model, mesh, *, head=False):
    """Decoder layers, and the head if it is wished, in units of their own."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(zoo, model):
    loss = model(**zoo.batch(), head_fn=lambda hidden, head: zoo.logits(hidden, head).sin().sum())
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("head", [False, True], ids=["in the root", "a unit of its own"])
def test_the_heads_weight_is_whole_and_its_gradient_is_reduced(zoo, mesh, head):
    plain = fuse_head(zoo.make("llama"))
    model = sharded(copy.deepcopy(plain), mesh, head=head)
    assert backward(zoo, model) == pytest.approx(backward(zoo, plain), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor), name
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-5, atol=1e-6)
    assert "forward" not in model.lm_head.__dict__


def test_gradients_add_up_until_they_are_reduced(zoo, mesh):
    model = sharded(fuse_head(zoo.make("llama")), mesh)
    set_gradient_sync(model, False)
    backward(zoo, model)
    assert all(parameter.grad is None for parameter in model.parameters())
    set_gradient_sync(model, True)
    backward(zoo, model)
    twice = model.lm_head.weight.grad.full_tensor().clone()
    model.zero_grad()
    backward(zoo, model)
    torch.testing.assert_close(twice, 2 * model.lm_head.weight.grad.full_tensor(), rtol=1e-5, atol=1e-6)


def test_whole_weights(zoo, mesh):
    plain = fuse_head(zoo.make("llama"))
    model = sharded(copy.deepcopy(plain), mesh)
    assert is_sharded(model)
    assert not is_sharded(plain)
    assert len(sharded_names(model)) == len(list(model.parameters()))
    with torch.no_grad(), whole_weights(model):
        assert not sharded_names(model)
        inner = model.model(**zoo.batch()).last_hidden_state  # a part, called by itself
        assert not sharded_names(model)  # and left whole
    assert len(sharded_names(model)) == len(list(model.parameters()))
    torch.testing.assert_close(inner, plain.model(**zoo.batch()).last_hidden_state)
    assert backward(zoo, model) == pytest.approx(backward(zoo, plain), rel=1e-6)  # as if nothing had been


def test_an_evaluation_leaves_the_root_whole_until_it_is_taken_back(zoo, mesh):
    model = sharded(fuse_head(zoo.make("llama")), mesh)
    with torch.no_grad():
        model(**zoo.batch())
    assert len(sharded_names(model)) < len(list(model.parameters()))
    reshard(model)
    assert len(sharded_names(model)) == len(list(model.parameters()))


def test_whole_weights_of_a_part_are_refused(zoo, mesh):
    model = zoo.make("llama")
    fully_shard(model.model.layers[0], mesh=mesh)
    with pytest.raises(ValueError, match="is not what FSDP2 was applied to as a whole"), whole_weights(model):
        pass


def test_a_model_that_is_not_sharded_is_left_alone(zoo):
    model = zoo.make("llama")
    with whole_weights(model):
        assert call_within([model.lm_head], torch.sin, torch.ones(1)) == torch.ones(1).sin()


def test_a_head_that_is_sharded_where_it_is_used_is_named(zoo, mesh):
    model = fuse_head(zoo.make("llama"))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is sharded where it is used"):
        backward(zoo, model)
