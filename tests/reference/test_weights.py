from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from fastalign.reference import weights
from fastalign.reference.weights import base_tensors, float_dtypes, tensor_digest, tensors_digest


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_digests_are_the_documented_ones():
    """They are part of every key on disk: a change of them must not go unnoticed."""
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    one = hashlib.sha256(canonical(["torch.float32", [2, 3]]) + tensor.numpy().tobytes()).hexdigest()
    assert tensor_digest(tensor) == one
    named = {"b": tensor, "a": tensor.to(torch.bfloat16)}
    two = hashlib.sha256(canonical(["torch.bfloat16", [2, 3]]) + tensor.bfloat16().view(torch.int16).numpy().tobytes())
    assert tensors_digest(named) == hashlib.sha256(canonical({"a": two.hexdigest(), "b": one})).hexdigest()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
def test_every_dtype_every_element(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    digests = {tensor_digest(tensor)}
    for i in range(15):
        changed = tensor.clone()
        changed.view(-1)[i] = 1
        digests.add(tensor_digest(changed))
    assert len(digests) == 16


def test_shape_dtype_and_name_count():
    zeros = torch.zeros(6)
    assert len({tensor_digest(t) for t in (zeros, zeros.view(2, 3), zeros.view(3, 2), zeros.view(torch.int32))}) == 4
    assert tensors_digest({"a": zeros}) != tensors_digest({"b": zeros})
    assert tensors_digest({"a": zeros, "b": zeros + 1}) != tensors_digest({"a": zeros + 1, "b": zeros})


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 26])
def test_neither_layout_nor_chunks_count(monkeypatch, chunk_bytes):
    base = torch.randn(7, 6, 5)
    expected = tensor_digest(base)
    monkeypatch.setattr(weights, "_CHUNK_BYTES", chunk_bytes)
    padded = torch.randn(9, 12, 11)
    padded[1:8, ::2, 3:8] = base
    views = {
        "contiguous": base,
        "transposed": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "strided": padded[1:8, ::2, 3:8],
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view(7, 6, 5),
        "parameter": nn.Parameter(base),
    }
    assert {name for name, view in views.items() if tensor_digest(view) != expected} == set()


def test_hashing_copies_nothing_that_lies_in_order(monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 32)
    tensor = torch.randn(5, 7)
    chunks = [np.frombuffer(chunk, np.uint8) for chunk in weights._chunks(tensor)]
    assert len(chunks) == 5
    assert all(np.shares_memory(chunk, tensor.numpy()) for chunk in chunks)
    assert max(chunk.nbytes for chunk in weights._chunks(tensor.T)) <= 32


def test_empty_and_scalar_tensors():
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))


def test_order_of_the_dict_does_not_count():
    a, b = torch.zeros(2), torch.ones(2)
    assert tensors_digest({"a": a, "b": b}) == tensors_digest({"b": b, "a": a})


def test_tied_tensors_are_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(weights, "tensor_digest", lambda tensor: read.append(tensor) or "digest")
    tensor = torch.zeros(4, 4)
    tensors_digest({"embed": nn.Parameter(tensor), "head": tensor, "other": tensor.clone(), "half": tensor[:2]})
    assert len(read) == 3


def test_hashing_leaves_the_tensor_alone():
    tensor = torch.randn(4, 4, requires_grad=True)
    version = tensor._version
    tensor_digest(tensor)
    assert (tensor._version, tensor.grad_fn, tensor.requires_grad) == (version, None, True)


def test_subclasses_that_wrap_tensors():
    """Quantised weights come as tensor subclasses: their parts and their settings are what counts."""
    from torch.testing._internal.two_tensor import TwoTensor

    def two(a, b):
        return tensor_digest(TwoTensor(torch.full((3,), float(a)), torch.full((3,), float(b))))

    assert two(1, 2) == two(1, 2)
    assert len({two(1, 2), two(2, 1), two(1, 1), tensor_digest(torch.ones(3))}) == 4


def test_sharded_tensors_are_gathered(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = torch.randn(4, 3)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert tensors_digest({"w": sharded}) == tensors_digest({"w": tensor})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, device="meta"), "w is on the meta device"),
        ({"state": 1}, "w in the state dict is a dict, not a tensor"),
        (torch.zeros(2, 2).to_sparse(), "w is torch.sparse_coo"),
    ],
    ids=["meta", "dict", "sparse"],
)
def test_what_cannot_be_hashed(value, message):
    with pytest.raises(ValueError, match=message):
        tensors_digest({"w": value})


def lora(model, **changes):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [1, 2]},
        {"use_dora": True, "bias": "all"},
    ],
    ids=["default", "all", "embeddings", "modules_to_save", "tokens", "dora"],
)
def test_the_base_model_inside_peft_is_the_base_model(tiny_model, changes):
    expected = tensors_digest(base_tensors(tiny_model()))
    wrapped = lora(tiny_model(), **changes)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
            nn.init.normal_(parameter)
    assert tensors_digest(base_tensors(wrapped.get_base_model())) == expected


def test_base_names_are_the_state_dicts(tiny_model):
    model = tiny_model()
    names = set(base_tensors(lora(tiny_model(), modules_to_save=["lm_head"]).get_base_model()))
    assert names == {*model.state_dict(), "model.rotary_emb.original_inv_freq"}


def test_other_adapter_methods(tiny_model):
    import peft

    expected = tensors_digest(base_tensors(tiny_model()))
    for config in (
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["q_proj"], r=2),
        peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=2),
        peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        wrapped = peft.get_peft_model(tiny_model(), config)
        assert tensors_digest(base_tensors(wrapped.get_base_model())) == expected, config.peft_type


def test_adapters_that_transformers_injected(tiny_model):
    from peft import LoraConfig

    model = tiny_model()
    expected = tensors_digest(base_tensors(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert tensors_digest(base_tensors(model)) == expected


def test_merged_adapters_are_refused(tiny_model):
    wrapped = lora(tiny_model())
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged into model\.layers\.0\.self_attn\.q_proj"):
        base_tensors(wrapped.get_base_model())
    wrapped.unmerge_adapter()
    base_tensors(wrapped.get_base_model())


def test_every_weight_and_buffer_counts(tiny_model):
    model = tiny_model()
    expected = tensors_digest(base_tensors(model))
    assert tensors_digest(base_tensors(tiny_model())) == expected
    with torch.no_grad():
        for tensor in base_tensors(model).values():
            kept = tensor.flatten()[-1].item()
            tensor.view(-1)[-1] += 1
            assert tensors_digest(base_tensors(model)) != expected
            tensor.view(-1)[-1] = kept
    assert tensors_digest(base_tensors(model)) == expected


def test_rope_frequencies_cast_by_the_user_count(tiny_model):
    """model.to(bfloat16) rounds inv_freq too, which loading in bfloat16 does not: other positions, other log-probs."""
    loaded, cast = tiny_model(dtype=torch.bfloat16), tiny_model().to(torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        for mine, other in zip(loaded.parameters(), cast.parameters(), strict=True):
            mine.copy_(other)
    assert tensors_digest(base_tensors(loaded)) != tensors_digest(base_tensors(cast))


def test_compiled_submodules_have_their_plain_names(tiny_model):
    model = tiny_model()
    expected = tensors_digest(base_tensors(model))
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert tensors_digest(base_tensors(model)) == expected


def test_float_dtypes(tiny_model):
    assert float_dtypes(base_tensors(tiny_model(dtype=torch.bfloat16)).values()) == "bfloat16"
    mixed = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)), torch.zeros(1).double()]
    assert float_dtypes(mixed) == "bfloat16+float32"
