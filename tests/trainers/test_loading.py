"""The policy before training: precision, dropout, adapters, arguments."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from fastalign.trainers import DPOTrainer

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def test_16_bit_weights_train_in_float32(kit):
    model = kit.model().to(torch.bfloat16)
    trainer = kit.trainer(model, kit.pairs(4), max_steps=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()


def test_pure_16_bit_training_on_request(kit, caplog):
    trainer = kit.trainer(kit.model().to(torch.bfloat16), kit.pairs(4), max_steps=1, dtype="bfloat16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert "pure 16-bit" in caplog.text
    trainer.train()


def test_checkpoint_loads_in_float32(kit):
    kit.model().to(torch.bfloat16).save_pretrained(kit.folder / "policy")
    path = str(kit.folder / "policy")
    assert kit.trainer(path, kit.pairs(4)).model.dtype == torch.float32
    frozen = kit.trainer(path, kit.pairs(4), use_peft=True, lora_target_modules=["q_proj"])
    dtypes = {(p.requires_grad, p.dtype) for p in frozen.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_dropout_is_off_unless_wanted(kit):
    trainer = kit.trainer(kit.model(attention_dropout=0.5), kit.pairs(4))
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0.0
    trainer = kit.trainer(kit.model(attention_dropout=0.5), kit.pairs(4), disable_dropout=False)
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0.5


def test_adapter_refusals(kit):
    model, pairs = kit.model(), kit.pairs(4)
    with pytest.raises(ValueError, match="lora_r=8 has no effect without use_peft"):
        kit.trainer(model, pairs, lora_r=8)
    with pytest.raises(ValueError, match="use_peft=True and peft_config"):
        kit.trainer(model, pairs, use_peft=True, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        kit.trainer(model, pairs, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PeftModel already"):
        kit.trainer(get_peft_model(kit.model(), LoraConfig(**LORA)), pairs, peft_config=LoraConfig(**LORA))


def test_constructor_refusals(kit):
    pairs = kit.pairs(4)
    with pytest.raises(ValueError, match="compute_metrics"):
        DPOTrainer(kit.model(), args=kit.config(), train_dataset=pairs, compute_metrics=print)
    with pytest.raises(ValueError, match="no model"):
        DPOTrainer(args=kit.config(), train_dataset=pairs)
    with pytest.raises(ValueError, match="no data"):
        DPOTrainer(kit.model(), args=kit.config(), processing_class=kit.tokenizer)
    with pytest.raises(ValueError, match="DPOConfig"):
        DPOTrainer(kit.model(), args=tf.TrainingArguments(str(kit.folder)), train_dataset=pairs)
    with pytest.raises(ValueError, match="processing_class must be a transformers tokenizer"):
        DPOTrainer(kit.model(), args=kit.config(), train_dataset=pairs, processing_class=print)
    with pytest.raises(ValueError, match="model_init_kwargs is for a model given by name"):
        kit.trainer(kit.model(), pairs, model_init_kwargs={"attn_implementation": "eager"})
    stream = pairs.to_iterable_dataset()
    with pytest.raises(ValueError, match="max_samples"):
        kit.trainer(kit.model(), stream)


def test_the_policy_as_its_own_reference_model_is_refused(kit):
    model = kit.model()
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        kit.trainer(model, kit.pairs(4), ref_model=model)


def test_a_folder_with_an_adapter_is_its_base_and_the_adapter(kit):
    """SFT by LoRA, then DPO on the same adapter, by name alone."""
    base = str(kit.folder / "base")
    kit.model().save_pretrained(base)
    torch.manual_seed(1)
    sft = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA, init_lora_weights=False))
    sft.save_pretrained(kit.folder / "sft")
    trainer = kit.trainer(str(kit.folder / "sft"), kit.pairs(4), max_steps=1)
    in_memory = kit.trainer(sft, kit.pairs(4))
    assert trainer.reference_cache.reference == in_memory.reference_cache.reference
    kit.tokenizer.save_pretrained(base)
    unnamed = DPOTrainer(str(kit.folder / "sft"), args=kit.config(), train_dataset=kit.pairs(4))
    assert unnamed.processing_class.vocab_size == kit.tokenizer.vocab_size
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == set(kit.weights(in_memory))
    trainer.train()
    with pytest.raises(ValueError, match="PeftModel already"):
        kit.trainer(str(kit.folder / "sft"), kit.pairs(4), use_peft=True)


def test_an_adapter_that_cannot_train_is_refused(kit):
    kit.model().save_pretrained(kit.folder / "base")
    get_peft_model(kit.model(), LoraConfig(**LORA)).save_pretrained(kit.folder / "sft")
    frozen = PeftModel.from_pretrained(kit.model(), kit.folder / "sft")
    with pytest.raises(ValueError, match="is_trainable=True"):
        kit.trainer(frozen, kit.pairs(4))


def test_settings_given_twice_are_refused(kit):
    kit.model().save_pretrained(kit.folder / "base")
    with pytest.raises(ValueError, match="attn_implementation is 'eager' by itself and 'sdpa' in model_init_kwargs"):
        kit.trainer(
            str(kit.folder / "base"), kit.pairs(4), attn_implementation="eager",
            model_init_kwargs={"attn_implementation": "sdpa"},
        )  # fmt: skip
    trainer = kit.trainer(str(kit.folder / "base"), kit.pairs(4), model_init_kwargs={"attn_implementation": "eager"})
    assert trainer.model.config._attn_implementation.removeprefix("fastalign_segments_over_") == "eager"


def test_attention_is_chosen_when_a_model_is_loaded(kit):
    with pytest.raises(ValueError, match="attn_implementation='eager', and the model in memory has 'sdpa'"):
        kit.trainer(kit.model(), kit.pairs(4), attn_implementation="eager")
    kit.trainer(kit.model(), kit.pairs(4), attn_implementation="sdpa")
