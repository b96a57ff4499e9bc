"""What is recorded on tensors without memory is what happens on real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fastalign.planning.models import materialise, nothing_packed
from fastalign.planning.recorder import COPIES, WEIGHTS, Event, Recorder, peak_by_name


def one_pass(model: nn.Module) -> tuple[int, int, int]:
    """Bytes alive after the forward, at the peak, and floating-point operations of one forward and backward."""
    model.train()
    with Recorder() as recorder:
        ids = torch.zeros(2, 32, dtype=torch.int64)
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        alive = recorder.now
        hidden.sum().backward()
    return alive, recorder.peak, sum(recorder.flops.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_without_memory_takes_what_a_real_one_takes(config, checkpointing):
    real = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for model in (real, meta):
        if checkpointing:
            model.activation_checkpointing_enable()
    expected = one_pass(real)
    with FakeTensorMode(), nothing_packed():
        materialise(meta)
        found = one_pass(meta)
    assert found[:2] == pytest.approx(expected[:2], rel=0.01)  # kernels' small outputs differ
    assert found[2] == expected[2]


def test_memory_of_a_product_and_its_work():
    with FakeTensorMode(), Recorder() as recorder:
        with recorder.phase("inputs"):
            a, b = torch.empty(8, 32), torch.empty(32, 16)
        with recorder.phase("work"):
            c = a @ b
            del a, c
            view = b.view(-1)
    assert recorder.flops == {"work": 2 * 8 * 32 * 16}
    assert recorder.peak == 4 * (8 * 32 + 32 * 16 + 8 * 16)
    assert recorder.now == view.nbytes
    assert [recorder.names[event.storage] for event in recorder.events] == [
        "inputs",
        "inputs",
        "work",
        "inputs",
        "work",
    ]


def test_casts_of_weights_have_a_name_of_their_own():
    with FakeTensorMode(), Recorder() as recorder:
        with recorder.phase(WEIGHTS):
            layer = nn.Linear(16, 8, bias=False)
        with recorder.phase("forward"), torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(torch.empty(4, 16))
        _, parts = peak_by_name(recorder.events, recorder.names)
    assert output.dtype == torch.bfloat16
    assert parts[WEIGHTS] == 16 * 8 * 4
    assert parts[COPIES] == 16 * 8 * 2


def test_attention_counts_two_products_of_all_pairs():
    with FakeTensorMode(), Recorder() as recorder:
        q = torch.empty(2, 4, 32, 16)
        k = torch.empty(2, 2, 32, 16)
        nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert sum(recorder.flops.values()) == 2 * 2 * (2 * 4) * 32 * 32 * 16


def test_renamed_storages():
    with FakeTensorMode(), Recorder() as recorder:
        kept = torch.empty(4)
        recorder.rename([kept], "gradients")
    assert peak_by_name(recorder.events, recorder.names) == (16, {"gradients": 16})


def test_peak_by_name_is_the_composition_at_the_highest_moment():
    events = [Event(0, 10), Event(1, 5), Event(1, -5), Event(2, 7), Event(0, -10), Event(3, 9)]
    assert peak_by_name(events, ["a", "b", "c", "d"]) == (17, {"a": 10, "b": 0, "c": 7})
    assert peak_by_name([], []) == (0, {})
