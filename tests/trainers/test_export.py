"""Saved models load in plain transformers."""

import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def test_saved_model_is_complete(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(8), max_steps=1)
    trainer.train()
    folder = kit.folder / "saved"
    trainer.save_model(str(folder))
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert tf.AutoTokenizer.from_pretrained(folder).chat_template == kit.tokenizer.chat_template


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "with_head"])
def test_adapter_is_saved_as_adapter_and_merged_on_request(kit, extra):
    kit.model().save_pretrained(kit.folder / "base")
    trainer = kit.trainer(
        str(kit.folder / "base"), kit.pairs(8), peft_config=LoraConfig(**LORA, **extra), max_steps=2, merge_adapter=True
    )
    trainer.train()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    folder = kit.folder / "saved"
    trainer.save_model(str(folder))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = trainer.model.eval()(ids).logits
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    base = tf.AutoModelForCausalLM.from_pretrained(kit.folder / "base")
    assert torch.equal(PeftModel.from_pretrained(base, folder)(ids).logits, expected)
    merged = tf.AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert tf.AutoTokenizer.from_pretrained(folder / "merged").chat_template == kit.tokenizer.chat_template
    assert (folder / "merged" / "generation_config.json").is_file()


def test_merging_needs_an_adapter(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4), merge_adapter=True, max_steps=1)
    with pytest.raises(ValueError, match="merge_adapter"):
        trainer.save_model(str(kit.folder / "saved"))


def test_merging_refuses_what_it_would_break(kit):
    """An adapter on a tied head: the merged head could not be the embeddings as well."""
    tied = kit.model(tie_word_embeddings=True)
    trainer = kit.trainer(
        tied, kit.pairs(4), peft_config=LoraConfig(r=4, target_modules=["lm_head"]), merge_adapter=True, max_steps=1
    )
    with pytest.raises(ValueError, match="tied"):
        trainer.save_model(str(kit.folder / "saved"))
