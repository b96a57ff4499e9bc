"""`fuse_head` on tiny random models: what reaches the head function gives the model's own logits, in every family."""

import copy
import inspect

import pytest
import torch
import transformers as tf
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from fastalign.models.causal import find_head, fuse_head, has_router_loss, is_fused, unfuse_head

FAMILIES = [
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_uncapped", "cohere",
    "granite", "phi_bias", "gpt2", "mixtral", "qwen3_moe",
]  # fmt: skip


class ShiftedLlama(tf.LlamaForCausalLM):
    """A model that does more to its logits than its config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.clamp(max=20.0)
        return out


class CappedLlama(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_head_function_sees_the_models_own_logits(zoo, family):
    model = zoo.make(family)
    expected = model(**zoo.batch()).logits
    assert fuse_head(model) is model
    torch.testing.assert_close(model(**zoo.batch(), head_fn=zoo.logits), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**zoo.batch()).logits, expected, rtol=0, atol=0)  # without head_fn: untouched


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "phi_bias"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_through_logits(zoo, family, checkpointing):
    model = zoo.make(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(**zoo.batch()).logits.sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fuse_head(model)
    model(**zoo.batch(), head_fn=lambda hidden, head: zoo.logits(hidden, head).sin().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_autocast_reaches_the_head_function(zoo):
    model = fuse_head(zoo.make("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**zoo.batch()).logits
        got = model(**zoo.batch(), head_fn=zoo.logits)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert find_head(model).weight.dtype == torch.float32


def test_bfloat16_model_verifies(zoo):
    for family in ("llama", "gemma2", "cohere", "granite"):
        fuse_head(zoo.make(family).to(torch.bfloat16))


def test_idempotent_and_reversible(zoo):
    model = zoo.make("llama")
    before = dict(model.__dict__)
    signature = inspect.signature(model.forward)
    fuse_head(fuse_head(model))
    assert is_fused(model)
    assert inspect.signature(model.forward) == signature
    unfuse_head(unfuse_head(model))
    assert not is_fused(model)
    assert model.__dict__ == before
    assert model.forward.__func__ is tf.LlamaForCausalLM.forward


def test_another_librarys_forward_is_kept(zoo):
    model = zoo.make("llama")
    calls = []
    original = model.forward

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = patched
    fuse_head(model)
    calls.clear()
    model(**zoo.batch())
    assert calls == [1]
    assert unfuse_head(model).forward is patched


def test_a_wrapper_put_on_since_is_not_taken_off(zoo):
    """accelerate wraps the forward of a model that trains in mixed precision."""
    model = fuse_head(zoo.make("llama"))
    inner, calls = model.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapper
    assert unfuse_head(model).forward is wrapper
    expected = zoo.make("llama")(**zoo.batch()).logits
    assert torch.equal(model(**zoo.batch()).logits, expected)
    assert calls == [1]
    torch.testing.assert_close(fuse_head(model)(**zoo.batch(), head_fn=zoo.logits), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_has_its_own_weights(zoo):
    model = fuse_head(zoo.make("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**zoo.batch(), head_fn=zoo.logits).abs().max() == 0
    assert model(**zoo.batch(), head_fn=zoo.logits).abs().max() > 0


def test_inside_data_parallel(zoo, tmp_path):
    model = zoo.make("llama")
    model(**zoo.batch()).logits.sin().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fuse_head(model))
        wrapped(**zoo.batch(), head_fn=lambda hidden, head: zoo.logits(hidden, head).sin().sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def test_generation_and_saving_work_on_a_fused_model(zoo, tmp_path):
    model = zoo.make("llama")
    ids = zoo.batch()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    fuse_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_verification_leaves_modes_and_random_state(zoo):
    model = zoo.make("llama").train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    fuse_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


@pytest.mark.parametrize("cls", [ShiftedLlama, CappedLlama])
def test_unknown_operation_is_refused_by_name(zoo, cls):
    with pytest.raises(ValueError, match=cls.__name__):
        fuse_head(cls(tf.LlamaConfig(**zoo.decoder)))


def test_refusals_name_the_class(zoo):
    class OddLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = zoo.make("llama")
    model.lm_head = OddLinear(32, zoo.V, bias=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*OddLinear"):
        fuse_head(model)
    with pytest.raises(ValueError, match="Linear"):
        fuse_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        fuse_head(
            tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=zoo.V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            )
        )
    with torch.device("meta"):
        meta = zoo.families["llama"]()
    with pytest.raises(ValueError, match="meta"):
        fuse_head(meta)
    fused = fuse_head(zoo.make("llama"))
    with pytest.raises(ValueError, match="labels"):
        fused(**zoo.batch(), labels=zoo.batch()["input_ids"], head_fn=zoo.logits)
    with pytest.raises(ValueError, match="logits_to_keep"):
        fused(**zoo.batch(), logits_to_keep=1, head_fn=zoo.logits)
    with pytest.raises(ValueError, match="load-balancing"):
        fused(**zoo.batch(), output_router_logits=True, head_fn=zoo.logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_is_the_models_own(zoo, family):
    model = zoo.make(family)
    assert has_router_loss(model)
    expected = model(**zoo.batch(), output_router_logits=True).aux_loss
    fuse_head(model)
    z, aux_loss = model(**zoo.batch(), output_router_logits=True, head_fn=zoo.logits)
    torch.testing.assert_close(aux_loss, expected, rtol=0, atol=0)
    assert z.shape == (2, 7, zoo.V)
    assert not has_router_loss(zoo.make("llama"))


def test_prompt_learning_is_visible_in_the_length(zoo):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = fuse_head(get_peft_model(zoo.make("llama"), config).eval())
    assert model(**zoo.batch(), head_fn=lambda hidden, head: hidden).shape == (2, 10, 32)
