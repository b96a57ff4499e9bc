"""Checkpoints whose weights have other names than the model's own."""

import pytest
import torch
import transformers as tf

from fastalign.models.checkpoints import load_renamed_weights, saved_names

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "renamed head": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, {}),
    "experts one by one": (tf.MixtralForCausalLM, tf.MixtralConfig, {"num_local_experts": 3, "num_key_value_heads": 2}),
}


def make(kind, seed=0):
    model, config, more = KINDS[kind]
    torch.manual_seed(seed)
    return model(config(**SIZES, **more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_comes_back(tmp_path, kind, dtype):
    saved, model = make(kind).to(dtype), make(kind, seed=1).to(dtype)
    saved.save_pretrained(tmp_path)
    own = set(model.state_dict())
    if saved_names(tmp_path) <= own:
        pytest.skip("this version of transformers saves it under its own names")
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert load_renamed_weights(model, tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].dtype == dtype
    # in place: an optimizer holds these parameters
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers


def test_a_checkpoint_in_parts(tmp_path):
    saved, model = make("renamed head"), make("renamed head", seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="4KB")
    assert not (tmp_path / "model.safetensors").exists()
    if saved_names(tmp_path) <= set(model.state_dict()):
        pytest.skip("this version of transformers saves it under its own names")
    assert load_renamed_weights(model, tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, saved.get_output_embeddings().weight)


def test_what_has_its_own_names_or_is_no_model_is_left_alone(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    before = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    assert not load_renamed_weights(model, tmp_path)
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert not load_renamed_weights(torch.nn.Linear(2, 2), tmp_path)
    assert saved_names(tmp_path / "absent") == set()
