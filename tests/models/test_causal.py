"""`fuse_head` on tiny random configs: what reaches the head function gives the model's own logits, in every family."""

import copy
import inspect

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from fastalign.models.causal import Head, attach_head, find_head, fuse_head, has_router_loss, is_fused, unfuse_head

torch.set_num_threads(1)
V = 53
DECODER = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {**DECODER, "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.01}

FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "llama_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, final_logit_softcapping=3.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, final_logit_softcapping=5.0)),
    "gemma3_uncapped": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**DECODER, logit_scale=0.0625)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**DECODER, logits_scaling=8.0)),
    "phi_bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**{**DECODER, "num_key_value_heads": 4})),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16)),
}  # fmt: skip


def make(family: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():  # random biases and norms: the initial zeros and ones would hide them
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    z = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap


@pytest.mark.parametrize("family", FAMILIES)
def test_head_function_sees_the_models_own_logits(family):
    model = make(family)
    expected = model(**batch()).logits
    assert fuse_head(model) is model
    torch.testing.assert_close(model(**batch(), head_fn=logits), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0)  # without head_fn: untouched


def test_settings_of_the_families():
    assert find_head(make("gemma2")).softcap == 3.0
    assert find_head(make("cohere")).logit_scale == 0.0625
    assert find_head(make("granite")).logit_scale == 0.125
    assert find_head(make("phi_bias")).bias is not None
    tied = make("llama_tied")
    assert find_head(tied).weight is tied.get_input_embeddings().weight
    plain = find_head(make("gpt2"))
    assert (plain.logit_scale, plain.softcap, plain.bias) == (1.0, None, None)
    assert plain.options == {"bias": None, "logit_scale": 1.0, "softcap": None}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "phi_bias"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_through_logits(family, checkpointing):
    model = make(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(**batch()).logits.sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fuse_head(model)
    model(**batch(), head_fn=lambda hidden, head: logits(hidden, head).sin().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_autocast_reaches_the_head_function():
    model = fuse_head(make("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch()).logits
        got = model(**batch(), head_fn=logits)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert find_head(model).weight.dtype == torch.float32


def test_bfloat16_model_verifies():
    for family in ("llama", "gemma2", "cohere", "granite"):
        fuse_head(make(family).to(torch.bfloat16))


def test_idempotent_and_reversible():
    model = make("llama")
    before = dict(model.__dict__)
    signature = inspect.signature(model.forward)
    fuse_head(fuse_head(model))
    assert is_fused(model)
    assert inspect.signature(model.forward) == signature
    unfuse_head(unfuse_head(model))
    assert not is_fused(model)
    assert model.__dict__ == before
    assert model.forward.__func__ is tf.LlamaForCausalLM.forward


def test_another_librarys_forward_is_kept():
    model = make("llama")
    calls = []
    original = model.forward

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = patched
    fuse_head(model)
    calls.clear()
    model(**batch())
    assert calls == [1]
    assert unfuse_head(model).forward is patched


def test_a_copy_has_its_own_weights():
    model = fuse_head(make("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**batch(), head_fn=logits).abs().max() == 0
    assert model(**batch(), head_fn=logits).abs().max() > 0


def test_inside_data_parallel(tmp_path):
    model = make("llama")
    model(**batch()).logits.sin().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fuse_head(model))
        wrapped(**batch(), head_fn=lambda hidden, head: logits(hidden, head).sin().sum()).backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def test_generation_and_saving_work_on_a_fused_model(tmp_path):
    model = make("llama")
    ids = batch()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    fuse_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_verification_leaves_modes_and_random_state():
    model = make("llama").train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    fuse_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


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


@pytest.mark.parametrize("cls", [ShiftedLlama, CappedLlama])
def test_unknown_operation_is_refused_by_name(cls):
    with pytest.raises(ValueError, match=cls.__name__):
        fuse_head(cls(tf.LlamaConfig(**DECODER)))


def test_refusals_name_the_class():
    class OddLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = make("llama")
    model.lm_head = OddLinear(32, V, bias=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*OddLinear"):
        fuse_head(model)
    with pytest.raises(ValueError, match="Linear"):
        fuse_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        fuse_head(
            tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            )
        )
    with torch.device("meta"):
        meta = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="meta"):
        fuse_head(meta)
    fused = fuse_head(make("llama"))
    with pytest.raises(ValueError, match="labels"):
        fused(**batch(), labels=batch()["input_ids"], head_fn=logits)
    with pytest.raises(ValueError, match="logits_to_keep"):
        fused(**batch(), logits_to_keep=1, head_fn=logits)
    with pytest.raises(ValueError, match="load-balancing"):
        fused(**batch(), output_router_logits=True, head_fn=logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_is_the_models_own(family):
    model = make(family)
    assert has_router_loss(model)
    expected = model(**batch(), output_router_logits=True).aux_loss
    fuse_head(model)
    z, aux_loss = model(**batch(), output_router_logits=True, head_fn=logits)
    torch.testing.assert_close(aux_loss, expected, rtol=0, atol=0)
    assert z.shape == (2, 7, V)
    assert not has_router_loss(make("llama"))


def lora(model, **kwargs):
    torch.manual_seed(2)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **kwargs))
    return peft_model.eval()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "lora_dropout": 0.5},
    ],
    ids=["body", "head", "modules_to_save", "dropout"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_peft(family, kwargs):
    model = lora(make(family), **kwargs)
    if "modules_to_save" in kwargs:
        with torch.no_grad():
            model.get_base_model().get_output_embeddings().weight.mul_(1.5)
    fuse_head(model)
    expected = model(**batch()).logits
    torch.testing.assert_close(model(**batch(), head_fn=logits), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = model(**batch()).logits
        torch.testing.assert_close(model(**batch(), head_fn=logits), base, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 1e-3


def test_lora_on_the_head_gets_its_gradients():
    model = lora(make("llama"), target_modules=["lm_head"])
    fuse_head(model)
    model(**batch()).logits.sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2
    model.zero_grad()
    model(**batch(), head_fn=lambda hidden, head: logits(hidden, head).sin().sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None


def test_dropout_on_the_heads_adapter_is_active_in_training():
    model = fuse_head(lora(make("llama"), target_modules=["lm_head"], lora_dropout=0.5).train())
    torch.manual_seed(3)
    expected = model(**batch()).logits
    torch.manual_seed(3)
    torch.testing.assert_close(model(**batch(), head_fn=logits), expected, rtol=1e-5, atol=1e-5)


def test_merged_adapter_on_the_head():
    model = fuse_head(lora(make("llama"), target_modules=["lm_head"]))
    expected = model(**batch()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch(), head_fn=logits), expected, rtol=1e-4, atol=1e-5)


def test_dora_on_the_head_is_refused_by_name():
    with pytest.raises(ValueError, match="variant"):
        fuse_head(lora(make("llama"), target_modules=["lm_head"], use_dora=True))


def test_attach_head_returns_what_it_was_given_without_an_adapter():
    model = make("llama")
    hidden = torch.randn(2, 3, 32)
    same, head = attach_head(model, hidden)
    assert same is hidden
    assert head.weight is model.lm_head.weight


def test_prompt_learning_is_visible_in_the_length():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = fuse_head(get_peft_model(make("llama"), config).eval())
    assert model(**batch(), head_fn=lambda hidden, head: hidden).shape == (2, 10, 32)
