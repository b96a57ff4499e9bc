"""A packed batch gives every sequence the hidden states, losses and gradients that it has alone."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fastalign.models import fuse_head
from fastalign.models.packing import disable_segments, enable_segments
from fastalign.models.segments import Segments

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "llama-eager": (tf.LlamaForCausalLM, tf.LlamaConfig, {"attn_implementation": "eager"}),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, {}),
    "qwen2-window": (tf.Qwen2ForCausalLM, tf.Qwen2Config,
                     {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 8}),
    "mistral-window": (tf.MistralForCausalLM, tf.MistralConfig, {"sliding_window": 3, "head_dim": 8}),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 8, "sliding_window": 4}),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4}),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt-neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, {}),
}  # fmt: skip
LENGTHS = [[7, 1, 4], [9], [2, 6]]


def make(name: str) -> tf.PreTrainedModel:
    kind, config, extra = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**(SIZES | extra)))


def batch() -> tuple[list[torch.Tensor], dict]:
    """Random sequences, and the same packed in padded rows."""
    generator = torch.Generator().manual_seed(0)
    width, rows = max(map(sum, LENGTHS)), len(LENGTHS)
    sequences = [torch.randint(2, 61, (n,), generator=generator) for row in LENGTHS for n in row]
    ids, positions, mask = (torch.zeros(rows, width, dtype=torch.int64) for _ in range(3))
    lengths, rest = np.zeros((rows, max(map(len, LENGTHS))), dtype=np.int64), iter(sequences)
    for row, parts in enumerate(LENGTHS):
        lengths[row, : len(parts)] = parts
        own = [next(rest) for _ in parts]
        ids[row, : sum(parts)] = torch.cat(own)
        positions[row, : sum(parts)] = torch.cat([torch.arange(n) for n in parts])
        mask[row, : sum(parts)] = 1
    return sequences, {
        "input_ids": ids, "position_ids": positions, "attention_mask": mask, "segments": Segments(lengths, width)
    }  # fmt: skip


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone(name, checkpointing):
    model = make(name)
    sequences, packed = batch()
    weights = torch.randn(61, generator=torch.Generator().manual_seed(2))
    alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    expected = gradients(model, sum((logits.log_softmax(-1) @ weights).sum() for logits in alone))
    enable_segments(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    logits = model(**packed, use_cache=False).logits[packed["attention_mask"].bool()]
    torch.testing.assert_close(
        logits, torch.cat(alone), rtol=1e-4, atol=1e-5 * float(torch.cat(alone).detach().abs().max())
    )
    got = gradients(model, (logits.log_softmax(-1) @ weights).sum())
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()), msg=key)


def test_without_segments_the_sequences_would_see_each_other():
    """So that the test above can fail."""
    model = make("llama")
    sequences, packed = batch()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in sequences])
        mixed = model(**(packed | {"segments": None})).logits[packed["attention_mask"].bool()]
    assert float((mixed - alone).abs().max()) > 1.0


def test_it_is_undone_and_done_once():
    model = make("qwen3")
    enable_segments(enable_segments(model))
    assert model.config._attn_implementation != "sdpa"
    disable_segments(disable_segments(model))
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model = enable_segments(make("llama"))
    model.save_pretrained(tmp_path)
    assert "fastalign" not in (tmp_path / "config.json").read_text()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_an_adapter_and_the_fused_head_go_along():
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    sequences, packed = batch()
    fuse_head(enable_segments(model))

    def head_fn(hidden, head):
        return hidden @ head.weight.T

    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in sequences])
        logits = model(**packed, head_fn=head_fn)[packed["attention_mask"].bool()]
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_a_copy_works_on_its_own():
    twin = copy.deepcopy(enable_segments(make("llama")))
    sequences, packed = batch()
    with torch.no_grad():
        alone = torch.cat([twin(input_ids=ids[None]).logits[0] for ids in sequences])
        logits = twin(**packed).logits[packed["attention_mask"].bool()]
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_an_error_in_between_leaves_nothing_behind():
    model = enable_segments(make("llama"))
    _, packed = batch()
    with pytest.raises(ValueError, match="segments of a batch"):
        model(**(packed | {"segments": Segments(np.array([[2]]), 3)}))
    ids, mask = packed["input_ids"], packed["attention_mask"].flip(1)
    before = disable_segments(copy.deepcopy(model))(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_models_that_attend_by_themselves_are_refused_by_name():
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM does not attend through transformers' attention interface"):
        enable_segments(bloom)


def test_other_kinds_of_layers_are_refused_by_name():
    model = make("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of type linear_attention"):
        enable_segments(model)


def test_a_model_that_mixes_tokens_elsewhere_is_refused():
    model = make("llama")

    def mix(module, args, output):
        return output + 0.5 * output.roll(1, dims=1) * (torch.arange(output.shape[1])[:, None] > 0)

    model.model.layers[0].mlp.register_forward_hook(mix)  # a convolution over time, say
    with pytest.raises(ValueError, match="computes other hidden states for a sequence in a packed batch"):
        enable_segments(model)
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_hooks


def test_a_window_that_attention_is_not_told_of_is_refused():
    model = make("gemma2")
    model.config.sliding_window = 64  # longer than the probe, so that no figure can tell
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ValueError, match=r"hands sliding windows \[None, None\] .* its config says \[64, None\]"):
        enable_segments(model)


def test_a_model_that_drops_the_keyword_is_refused(monkeypatch):
    model = make("llama")
    forward = type(model.model.layers[0]).forward

    def without(self, hidden_states, *args, segments=None, **kwargs):
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", without)
    with pytest.raises(ValueError, match="does not hand the keyword segments to its attention"):
        enable_segments(model)


def test_a_model_that_ignores_position_ids_is_refused():
    """Relative positions are those of a packed sequence wherever it lies, but not those behind a shared prefix."""
    model = make("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def by_place(x, position_ids):
        return forward(x, torch.arange(x.shape[1])[None].expand(x.shape[0], -1))

    rotary.forward = by_place
    with pytest.raises(ValueError, match="for a sequence that shares its first tokens with another"):
        enable_segments(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_adapter_that_adds_tokens_is_refused():
    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        enable_segments(model)
