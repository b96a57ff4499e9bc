"""The last layer for the tokens that are read: which modules see which rows, and when all of them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers as tf

from fastalign.models.last_layer import LastLayer
from fastalign.models.packing import disable_segments, enable_segments
from fastalign.models.segments import Segments

torch.set_num_threads(1)
IDS = torch.arange(12)[None] % 7
POSITIONS = torch.tensor([[*range(5), *range(7)]])
NEEDED = np.array([2, 4, 9, 11])


def llama(**changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, **changes,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def hidden(model, needed) -> torch.Tensor:
    segments = Segments(np.array([[5, 7]]), 12, needed=needed)
    return model.base_model(input_ids=IDS, position_ids=POSITIONS, segments=segments, use_cache=False)[0][0]


def rows_seen(model) -> dict[str, list[int]]:
    """Rows that go through each linear layer, in the order of the calls."""
    seen: dict[str, list[int]] = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = seen.setdefault(name.removeprefix("layers."), [])
            module.register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0].shape[:-1].numel()))
    return seen


def test_keys_and_values_come_from_every_token():
    model = enable_segments(llama())
    seen = rows_seen(model)
    hidden(model, NEEDED)
    few = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert seen == {name: [4 if name.startswith("1") and name.split(".")[-1] in few else 12] for name in seen}
    assert len(seen) == 14


def test_needed_states_and_gradients_are_the_same():
    model = enable_segments(llama())
    weights = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))

    def gradients(needed):
        model.zero_grad()
        states = hidden(model, needed)[torch.from_numpy(NEEDED)]
        (states * weights).sum().backward()
        return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    states, grads = gradients(NEEDED)
    expected, wanted = gradients(None)
    torch.testing.assert_close(states, expected)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("needed", [None, np.arange(12), np.arange(11)])
def test_nothing_is_picked_where_nearly_all_is_needed(needed):
    model = enable_segments(llama())
    seen = rows_seen(model)
    hidden(model, needed)
    assert {rows for own in seen.values() for rows in own} == {12}


def test_other_calls_are_untouched():
    """One after a call with needed rows, so that what it left behind would show."""
    model = llama()
    expected = model(input_ids=IDS).logits
    enable_segments(model)
    hidden(model, NEEDED)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    disable_segments(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_recomputing_backward_takes_the_same_rows():
    model = enable_segments(llama())
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    seen = rows_seen(model)
    states = hidden(model, NEEDED)[2]
    model.base_model(input_ids=IDS)  # another call in between
    states.sum().backward()
    assert seen["1.mlp.down_proj"] == [4, 12, 4]
    assert seen["0.mlp.down_proj"] == [12, 12, 12]


def test_layers_that_are_different_are_left_alone(caplog):
    model = llama()
    for layer in model.model.layers:
        layer.feed_forward_network = layer._modules.pop("mlp")
        type(layer).mlp = property(lambda self: None)
    try:
        with pytest.raises(ValueError, match="LlamaDecoderLayer has none of mlp, feed_forward"):
            LastLayer(model.base_model)
    finally:
        del tf.models.llama.modeling_llama.LlamaDecoderLayer.mlp
    assert not model.model.layers[-1].self_attn._forward_pre_hooks


def test_an_mlp_that_mixes_rows_is_found_out(caplog):
    """Right for all rows of a batch, wrong for some of them."""
    model = llama()
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * (2 if x.shape[1] == 6 else 1)  # so many rows of the probe are needed
    with caplog.at_level(logging.INFO, logger="fastalign"):
        enable_segments(model)
    assert "the last layer is computed for every token" in caplog.text
    seen = rows_seen(model)
    hidden(model, NEEDED)
    assert {rows for own in seen.values() for rows in own} == {12}


def test_an_mlp_that_returns_more_than_states_is_left_alone(caplog):
    model = llama()
    last_layer = LastLayer(model.base_model)
    last_layer._rows = torch.tensor([0])
    with pytest.raises(ValueError, match="LlamaMLP returns a tuple"):
        last_layer._put(model.model.layers[-1].mlp, (), (torch.zeros(1, 1, 16), None))
