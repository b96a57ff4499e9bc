"""Layouts against sequences alone: models, pairs, and the comparison, for several test files."""

from __future__ import annotations

import functools

import numpy as np
import torch
import transformers as tf

from fastalign.models import enable_segments, fuse_head
from fastalign.models.layouts import plan_layout, run_layout

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "llama-tied": (tf.LlamaForCausalLM, tf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-eager": (tf.LlamaForCausalLM, tf.LlamaConfig, {"attn_implementation": "eager"}),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, {}),
    "qwen2-window": (tf.Qwen2ForCausalLM, tf.Qwen2Config,
                     {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 8}),
    "mistral-window": (tf.MistralForCausalLM, tf.MistralConfig, {"sliding_window": 3, "head_dim": 8}),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 8, "sliding_window": 4}),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4}),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}  # fmt: skip
IN_FLOAT32 = {"llama-eager", "gemma2"}  # their eager attention takes the softmax in float32


def in_own_dtype(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """transformers takes RMS norms in float32, whatever the model's dtype: not here, so that 1e-10 can be asked for."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)
    return model


def rms_norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def make(name: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    kind, config, extra = MODELS[name]
    torch.manual_seed(0)
    return fuse_head(enable_segments(in_own_dtype(kind(config(**(SIZES | extra))).to(dtype))))


def pairs() -> list[dict]:
    """Prompts of several lengths; completions that differ at once, later, or not at all, one of a single token."""
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(2, VOCAB, n).tolist() for n in (9, 1, 6, 5)]
    first, second, third = (numbers.integers(2, VOCAB, n).tolist() for n in (7, 4, 3))
    completions = [(first, second), (third, [7]), (first[:3] + second, first), (second, second)]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in zip(prompts, completions, strict=True)
    ]


def logps_of(batch):
    """A head_fn: log-probs (n,) of the targets, plainly."""

    def head_fn(hidden, head):
        rows = torch.from_numpy(np.asarray(batch["rows"]))
        z = hidden.to(head.weight.dtype) @ head.weight.T * head.logit_scale
        z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
        return z.log_softmax(-1).gather(1, batch["targets"].flatten()[rows][:, None])[:, 0]

    return head_fn


def alone(model, batch) -> torch.Tensor:
    """The same from each sequence by itself, by the model's own logits."""
    found = []
    for ids, targets, length in zip(batch["input_ids"], batch["targets"], batch["lengths"], strict=True):
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0]
        own = targets[:length]
        found.append(logits.log_softmax(-1)[own >= 0].gather(1, own[own >= 0][:, None])[:, 0])
    return torch.cat(found)


def gradients(model, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(len(output), generator=torch.Generator().manual_seed(3)).to(output)
    (output * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, batch, expected, mode, tolerance, head_fn=None, **kwargs):
    """Output and gradients of a layout against `expected`, both of them."""
    layout = plan_layout(batch, mode)
    output = run_layout(model, batch, layout, head_fn or logps_of(batch), **kwargs)
    torch.testing.assert_close(output, expected[0], rtol=tolerance, atol=tolerance)
    got = gradients(model, output)
    assert got.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((got[name] - grad).abs().max()) <= 10 * tolerance * scale, name
    return layout
