"""A recorded step: exact bytes of what has a formula, and the direction of what has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from fastalign.planning import HeadSettings, ModelSettings, OptimizerSettings, count_tokens, parts_of, record_step
from fastalign.planning.heap import Heap

HEAD = HeadSettings(device_type="cpu")
ADAMW = OptimizerSettings(cls=torch.optim.AdamW, kwargs={"fused": True})
PLAIN = ModelSettings(checkpointing=False)


def recorded(config, pieces, model=PLAIN, **given):
    return record_step(config, pieces, model=model, head=HEAD, optimizer=ADAMW, **given)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_every_family_has_a_plan_in_every_layout(config, make_piece, layout):
    pieces = [make_piece()] * 2
    record = recorded(config, pieces, replace(PLAIN, layout=layout))
    parts = parts_of(record, "cuda")
    assert parts["weights"] == pytest.approx(4 * record.parameters, rel=0.01)  # and a few buffers
    assert parts["activations"] > 0
    assert record.trainable == record.parameters
    tied = 512 * 64 if config.tie_word_embeddings else 0
    assert record.parameters + tied >= 2 * 512 * 64
    expected = {"padded": 2 * 4 * 32, "packed": 2 * 4 * 31, "shared": 2 * 2 * (12 + 2 * 19)}  # no last tokens
    assert record.tokens["computed"] == expected[layout]
    assert record.tokens["scored"] == 2 * 4 * 20


def test_gradients_and_optimizer_state_are_those_of_the_weights(llama, make_piece):
    record = recorded(llama, [make_piece(4)] * 2)
    parts = parts_of(record, "cuda")
    assert parts["gradients"] == 4 * record.trainable
    assert parts["optimizer"] == pytest.approx(8 * record.trainable, rel=0.02)  # and a step count of each


def test_the_later_step_ends_as_it_began(llama, make_piece):
    record = recorded(llama, [make_piece()])
    assert sum(event.size for event in record.later if event.storage >= 0) == 0
    heaps = []
    for steps in (2, 4):
        heap = Heap()
        heap.replay(record.events(steps))
        heaps.append(heap)
    assert heaps[0]._used.keys() == heaps[1]._used.keys()


def test_checkpointing_takes_less_memory_and_more_work(llama, make_piece):
    without, with_it = (recorded(llama, [make_piece(8)], replace(PLAIN, checkpointing=flag)) for flag in (False, True))
    assert parts_of(with_it, "cuda")["activations"] < 0.7 * parts_of(without, "cuda")["activations"]
    assert with_it.flops["backward"] > 1.3 * without.flops["backward"]
    assert with_it.flops["forward"] == without.flops["forward"]


def test_an_adapter_has_small_gradients_and_a_frozen_head(llama, make_piece):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4)
    record = recorded(llama, [make_piece()] * 2, replace(PLAIN, adapter=adapter))
    parts = parts_of(record, "cuda")
    assert parts["adapter"] == 4 * record.trainable
    assert record.trainable < 0.1 * record.parameters
    assert parts["gradients"] <= 4 * record.trainable
    assert all(plan.gradient_bytes == plan.n * llama.hidden_size * 4 for plan in record.plans)


def test_a_scalar_model_has_no_vocabulary_to_score(llama, make_piece):
    record = recorded(llama, [make_piece()], replace(PLAIN, scalar=True))
    assert record.plans == []
    assert record.flops["head"] == 0
    assert parts_of(record, "cuda")["activations"] > 0


def test_eager_attention_keeps_its_weights(llama, make_piece):
    sdpa, eager = (
        recorded(llama, [make_piece(4, 40, 60)], replace(PLAIN, attn_implementation=name)) for name in ("sdpa", "eager")
    )
    assert parts_of(eager, "cuda")["activations"] > 1.2 * parts_of(sdpa, "cuda")["activations"]


def test_autocast_halves_activations_and_copies_weights(llama, make_piece):
    wide, narrow = (recorded(llama, [make_piece(8)], autocast=dtype) for dtype in (None, torch.bfloat16))
    assert parts_of(narrow, "cuda")["activations"] < 0.85 * parts_of(wide, "cuda")["activations"]
    assert "copies" in parts_of(narrow, "cuda")
    assert "copies" not in parts_of(wide, "cuda")


def test_what_a_process_has_beyond_its_tensors_is_a_part_on_the_cpu_alone(llama, make_piece):
    record = recorded(llama, [make_piece()])
    assert {"allocator", "objects"} <= set(parts_of(record, "cpu"))
    assert not {"allocator", "objects"} & set(parts_of(record, "cuda", reference=5))
    assert parts_of(record, "cuda", reference=5)["reference"] == 5


def test_kernels_are_compiled_for_each_shape_of_a_product_in_16_bits(llama, make_piece):
    """On the CPU, and kept: a second batch of the same lengths needs none, one of others does."""
    once, again, other = (
        recorded(llama, pieces, autocast=torch.bfloat16)
        for pieces in ([make_piece(2)], [make_piece(2)] * 2, [make_piece(2), make_piece(3)])
    )
    assert once.narrow == again.narrow
    assert other.narrow.total() > 1.5 * once.narrow.total() > 0
    sizes = [parts_of(record, "cpu")["libraries"] for record in (once, other)]
    assert sizes[1] - sizes[0] == (other.narrow.total() - once.narrow.total()) * 3 * 250 * 1024
    assert parts_of(once, "cpu", with_scoring=True)["libraries"] > sizes[0]
    on_gpu = record_step(
        llama, [make_piece()], model=PLAIN, head=HeadSettings(device_type="cuda"), optimizer=ADAMW,
        autocast=torch.bfloat16,
    )  # fmt: skip
    assert "libraries" not in {name for name, size in parts_of(on_gpu, "cuda").items() if size}
    assert not recorded(llama, [make_piece()]).narrow


def test_an_optimizer_that_needs_numbers_is_refused_by_name(llama, make_piece):
    optimizer = OptimizerSettings(cls=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="LBFGS does not run without memory"):
        record_step(llama, [make_piece()], model=PLAIN, head=HEAD, optimizer=optimizer)


def test_tokens_by_layout(make_piece):
    piece = make_piece(3)
    counts = {layout: count_tokens([piece], layout) for layout in ("padded", "packed", "shared")}
    assert counts["padded"] == {"padded": 192, "real": 192, "computed": 192, "scored": 120}
    assert counts["shared"]["computed"] < counts["packed"]["computed"] < 192
