"""Precision of trainable and frozen weights, and dropout that is really off."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.models import check_source, disable_dropout, load_causal_lm, upcast_trainable

torch.set_num_threads(1)
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_loads_in_float32_unless_asked(tmp_path):
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).dtype == torch.float32
    assert load_causal_lm(str(tmp_path), dtype="auto").dtype == torch.bfloat16
    assert load_causal_lm(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_upcasts_what_trains_and_nothing_else():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)).to(torch.bfloat16)
    count = len(list(model.parameters()))
    model.model.norm.weight.requires_grad_(False)
    assert upcast_trainable(model) == count - 1
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert upcast_trainable(model) == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),  # nn.Dropout modules
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_dropout=0.3)),  # passed to attention functions
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.2
            )
        ),
        lambda: get_peft_model(
            tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
            LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
        ),
    ],
    ids=["gpt2", "llama_attention", "opt_layerdrop", "lora"],
)
def test_dropout_is_off_in_training_mode(model):
    torch.manual_seed(0)
    model = model().train()
    ids = torch.randint(0, 40, (2, 12))

    def spread():
        outputs = [model(input_ids=ids).logits for _ in range(4)]
        return max((out - outputs[0]).abs().max() for out in outputs)

    assert spread() > 0
    disable_dropout(model)
    assert spread() == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", "no such folder"),
        ("./here", "no such folder"),
        ("~/models/policy", "no such folder"),
        ("a/b/c", "no such folder"),
        (" ", "no such folder"),
    ],
)
def test_a_path_without_a_model_is_no_name_on_the_hub(name, says):
    with pytest.raises(ValueError, match=says) as refused:
        check_source(name, "ref_model_name_or_path")
    assert str(refused.value).startswith(f"ref_model_name_or_path={name!r}")
    with pytest.raises(ValueError, match=says):
        load_causal_lm(name)


def test_a_folder_or_file_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        check_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        check_source(str(tmp_path / "model.safetensors"))
    (tmp_path / "adapter_config.json").write_text("{}")
    check_source(tmp_path)
    check_source("owner/name")
    check_source("gpt2")


def test_a_backbone_is_not_given_a_random_head(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no values for 1 tensors of LlamaForCausalLM, the first is lm_head\.weight"):
        load_causal_lm(str(tmp_path))
    _, info = load_causal_lm(str(tmp_path), output_loading_info=True)
    assert info["missing_keys"]


def test_a_class_that_is_no_language_model_is_said_in_a_line(tmp_path):
    tf.ViTModel(tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTConfig") as refused:
        load_causal_lm(str(tmp_path))
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)
