from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from fastalign.rollouts.weights import checkpoint_weights

KINDS = {
    "llama": {},
    "gpt2": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {},
    "mixtral": {"num_local_experts": 4},  # its experts are stored one by one and run as one tensor
}


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_equal(found, expected, tolerance=0.0):
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True])
def test_names_and_values_are_those_of_the_checkpoint(tiny_model, tmp_path, kind, loaded):
    model = tiny_model(kind, **KINDS[kind])
    expected = saved(model, tmp_path)
    if loaded:
        model = type(model).from_pretrained(tmp_path)
    assert_equal(checkpoint_weights(model), expected)


LORAS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "everywhere": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", LORAS)
def test_lora_is_merged_into_copies(tiny_model, tmp_path, case):
    """Equal to merging for good; the policy keeps its own weights, bit for bit."""
    kind = "gpt2" if case == "gpt2" else "llama"
    model = get_peft_model(tiny_model(kind, attention_bias=True), LoraConfig(r=3, lora_alpha=6, **LORAS[case]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = checkpoint_weights(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert_equal(checkpoint_weights(model), saved(tiny_model(kind, attention_bias=True), tmp_path / "base"))
    merged = saved(model.merge_and_unload(), tmp_path / "merged")
    assert_equal(found, merged, 1e-6)
    changed = [
        name for name in merged if not torch.equal(merged[name], load_file(tmp_path / "base/model.safetensors")[name])
    ]
    assert len(changed) >= 2


def test_merged_adapters_are_in_the_weights_already(tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    found = checkpoint_weights(model)
    model.merge_adapter()
    assert_equal(checkpoint_weights(model), found, 1e-6)


def test_a_small_update_survives_16_bits(tiny_model):
    """The sum is made in the wider dtype: rounding it is the engine's last step, not the first."""
    model = get_peft_model(tiny_model().bfloat16(), LoraConfig(r=3, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            nn.init.constant_(parameter, 1e-3)
    weight = checkpoint_weights(model)["model.layers.0.self_attn.q_proj.weight"]
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.float32
    assert torch.any(weight != base.float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), r"the adapter on model\.layers\.0\.self_attn\.q_proj"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"is a peft\.tuners\.ia3\.layer\.Linear"),
    ],
)
def test_other_adapters_are_refused(tiny_model, config, message):
    model = get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match=message):
        checkpoint_weights(model)
    with model.disable_adapter():
        checkpoint_weights(model)


@pytest.mark.parametrize("changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_tied_weights_cannot_come_apart(tiny_model, changes):
    config = LoraConfig(**{"target_modules": ["q_proj"], **changes})
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    with pytest.raises(ValueError, match="LlamaForCausalLM ties its head to its embeddings"):
        checkpoint_weights(model)


def test_parameters_that_are_not_there(tiny_model):
    model = tiny_model()
    model.model.norm.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"parameter model\.norm\.weight is sharded by DeepSpeed ZeRO-3 or FSDP1"):
        checkpoint_weights(model)
    model = tiny_model()
    model.model.norm.weight = nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"parameter model\.norm\.weight is quantised \(torch\.uint8\)"):
        checkpoint_weights(model)


def test_sharded_parameters_are_gathered(tiny_model, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    expected = checkpoint_weights(tiny_model())
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        assert_equal(checkpoint_weights(fully_shard(tiny_model(), mesh=mesh)), expected)
    finally:
        dist.destroy_process_group()
