"""The attention interface of a model with and without segments."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from fastalign.models import attention
from fastalign.models.packing import enable_segments

torch.set_num_threads(1)


@pytest.mark.parametrize("former", ["sdpa", "eager"])
def test_calls_without_segments_are_the_former_ones(former):
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation=former,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # left padding, as generation has it
    sampled = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, **sampled)
    enable_segments(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(ids, attention_mask=mask, **sampled), generated)


def test_flex_attention_is_refused():
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = tf.LlamaForCausalLM(config)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*'sdpa', 'eager' and"):
        attention.install(model)
