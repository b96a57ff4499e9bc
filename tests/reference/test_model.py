from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fastalign.reference import CacheError, ReferenceCache, ReferenceModel, score
from fastalign.reference import model as module
from fastalign.reference.memo import IdentityMemo


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def memo(tmp_path):
    (tmp_path / "memo").mkdir()
    return IdentityMemo(tmp_path / "memo")


@pytest.fixture
def loads(monkeypatch):
    """How often a checkpoint was loaded."""
    names = []
    real = module.load_causal_lm

    def load(name, **kwargs):
        names.append(name)
        return real(name, **kwargs)

    monkeypatch.setattr(module, "load_causal_lm", load)
    return names


@pytest.fixture
def hashes(monkeypatch):
    """How often weights were read to be hashed."""
    calls = []
    real = module.model_identity
    monkeypatch.setattr(module, "model_identity", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.fixture
def adapter_checkpoint(tmp_path, checkpoint, tiny_model):
    """An SFT adapter on the checkpoint, saved, and the model with it in memory."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft", model.eval()


def build(path, reference, sequences):
    return ReferenceCache.build(path, reference, sequences, progress=False)


def test_a_checkpoint_and_the_model_loaded_from_it_are_one_reference(checkpoint, tiny_model):
    digest = ReferenceModel.from_pretrained(checkpoint).digest()
    assert ReferenceModel.from_model(tiny_model()).digest() == digest
    assert ReferenceModel.from_pretrained(str(checkpoint), dtype="float32").digest() == digest
    assert ReferenceModel.from_pretrained(checkpoint, dtype=torch.float32).digest() == digest
    assert ReferenceModel.from_pretrained(checkpoint, dtype=torch.bfloat16).digest() != digest
    assert ReferenceModel.from_pretrained(checkpoint, temperature=0.5).digest() != digest
    assert ReferenceModel.from_pretrained(checkpoint, autocast=torch.bfloat16).digest() != digest
    assert ReferenceModel.from_pretrained(checkpoint, attn_implementation="eager").digest() != digest


def test_weights_are_hashed_once(checkpoint, memo, loads, hashes):
    digest = ReferenceModel.from_pretrained(checkpoint).digest(memo)
    assert (len(loads), len(hashes)) == (1, 1)
    # other settings of the scoring share what is known about the weights
    assert ReferenceModel.from_pretrained(checkpoint).digest(memo) == digest
    assert ReferenceModel.from_pretrained(checkpoint, temperature=2.0, device="cpu").digest(memo) != digest
    assert (len(loads), len(hashes)) == (1, 1)
    ReferenceModel.from_pretrained(checkpoint, dtype=torch.bfloat16).digest(memo)
    assert (len(loads), len(hashes)) == (2, 2)


def test_weights_are_hashed_again_when_files_change(checkpoint, memo, loads, tiny_model):
    before = ReferenceModel.from_pretrained(checkpoint).digest(memo)
    os.utime(checkpoint / "model.safetensors")
    assert ReferenceModel.from_pretrained(checkpoint).digest(memo) == before
    assert len(loads) == 2
    tiny_model(seed=1).save_pretrained(checkpoint)
    assert ReferenceModel.from_pretrained(checkpoint).digest(memo) != before


def test_a_model_in_memory_is_hashed_as_it_is_now(tiny_model, hashes):
    model = tiny_model()
    reference = ReferenceModel.from_model(model)
    before = reference.digest()
    with torch.no_grad():
        model.model.norm.weight.data[0] += 1
    assert reference.digest() != before
    assert len(hashes) == 2


def test_a_full_cache_needs_no_model(tmp_path, checkpoint, make_sequences, loads, hashes, monkeypatch):
    sequences = make_sequences(10)
    first = build(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint), sequences)
    assert (first.report.computed, len(loads), len(hashes)) == (10, 1, 1)
    monkeypatch.setattr(module, "load_causal_lm", None)
    again = build(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint), sequences)
    assert (again.report.cached, again.report.computed) == (10, 0)
    opened = ReferenceCache.open(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint))
    for one, other in zip(first.lookup(sequences), opened.lookup(sequences), strict=True):
        assert np.array_equal(one, other)


def test_values_are_those_of_the_model(tmp_path, checkpoint, make_sequences, tiny_model, naive_logps):
    sequences = make_sequences(10)
    cache = build(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint, temperature=0.6), sequences)
    for row, expected in zip(cache.lookup(sequences), naive_logps(tiny_model(), sequences, 0.6), strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_a_model_that_was_loaded_is_let_go(checkpoint, tiny_model):
    import gc
    import weakref

    reference = ReferenceModel.from_pretrained(checkpoint)
    alive = weakref.ref(reference.scorer().model)
    reference.release()
    gc.collect()
    assert alive() is None
    mine = tiny_model()
    handed_in = ReferenceModel.from_model(mine)
    handed_in.release()
    assert handed_in.scorer().model is mine


def test_build_lets_the_model_go(tmp_path, checkpoint, make_sequences):
    reference = ReferenceModel.from_pretrained(checkpoint)
    build(tmp_path / "cache", reference, make_sequences(3))
    assert reference._model is None


def test_policy_and_loss_settings_share_the_cache(tmp_path, checkpoint, make_sequences, tiny_model):
    """Full fine-tuning from a path, LoRA from a model in memory, another LoRA: one reference, computed once."""
    sequences = make_sequences(6)
    build(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint), sequences)
    for rank in (2, 4):
        policy = get_peft_model(tiny_model(), LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
        cache = build(tmp_path / "cache", ReferenceModel.from_model(policy), sequences)
        assert cache.report.computed == 0


def test_another_reference_is_explained(tmp_path, checkpoint, make_sequences, tiny_model, caplog):
    build(tmp_path / "cache", ReferenceModel.from_pretrained(checkpoint), make_sequences(3))
    other = ReferenceModel.from_model(tiny_model(rms_norm_eps=0.5), temperature=0.5)
    with pytest.raises(
        CacheError, match=r"holds nothing of .*differs in config\.rms_norm_eps 1e-06 → 0\.5, head\.temperature"
    ):
        ReferenceCache.open(tmp_path / "cache", other)
    with caplog.at_level("INFO"):
        build(tmp_path / "cache", other, make_sequences(3))
    assert "differs in config.rms_norm_eps" in caplog.text


def test_adapters_on_disk_and_in_memory_are_one_reference(adapter_checkpoint, checkpoint, make_sequences, tiny_model):
    path, model = adapter_checkpoint
    digest = ReferenceModel.from_model(model, adapter="default").digest()
    from_folder = ReferenceModel.from_pretrained(path)
    assert from_folder.digest() == digest
    assert ReferenceModel.from_pretrained(checkpoint, adapter_path=path).digest() == digest
    assert ReferenceModel.from_pretrained(checkpoint).digest() == ReferenceModel.from_model(model).digest() != digest
    assert from_folder.source == f"{checkpoint} + {path}"
    # as a trainer keeps it: the policy goes on from the SFT adapter, a second copy stays the reference
    policy = PeftModel.from_pretrained(tiny_model(), path, is_trainable=True)
    policy.load_adapter(path, "reference")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".default." in name:
                parameter.add_(1.0)
    kept = ReferenceModel.from_model(policy, adapter="reference")
    assert kept.digest() == digest
    sequences = make_sequences(5)
    with kept.scorer() as scorer:
        rows = scorer(sequences)
    for row, expected in zip(rows, score(model, sequences, adapter="default"), strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_an_adapter_that_changed_is_another_reference(adapter_checkpoint, memo):
    path, model = adapter_checkpoint
    before = ReferenceModel.from_pretrained(path).digest(memo)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1.0)
    model.save_pretrained(path)
    assert ReferenceModel.from_pretrained(path).digest(memo) != before


def test_adapter_folders_that_cannot_be(adapter_checkpoint, checkpoint, tmp_path):
    path, _ = adapter_checkpoint
    with pytest.raises(ValueError, match="is an adapter itself"):
        ReferenceModel.from_pretrained(path, adapter_path=path)
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        ReferenceModel.from_pretrained(path)


def test_a_checkpoint_with_missing_weights_is_refused(checkpoint):
    """transformers would fill them with random numbers: another reference every time, under one name."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no values for 1 tensors .* the first is model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        ReferenceModel.from_pretrained(checkpoint).digest()


def test_tied_weights_are_not_missing(tmp_path, tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    assert ReferenceModel.from_pretrained(tmp_path / "tied").digest() == ReferenceModel.from_model(model).digest()


def test_files_that_change_under_a_load(checkpoint, monkeypatch, tiny_model):
    real = module.load_causal_lm

    def load(name, **kwargs):
        loaded = real(name, **kwargs)
        tiny_model(seed=1).save_pretrained(name)
        return loaded

    monkeypatch.setattr(module, "load_causal_lm", load)
    reference = ReferenceModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="changed while it was loaded"):
        reference.digest()
    assert reference._model is None


def test_files_that_change_between_digest_and_load(tmp_path, checkpoint, memo, tiny_model):
    """The digest is remembered, the weights are new: they must not be scored under the old digest."""
    ReferenceModel.from_pretrained(checkpoint).digest(memo)
    reference = ReferenceModel.from_pretrained(checkpoint)
    reference.digest(memo)
    tiny_model(seed=1).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="since its digest was taken"):
        reference.scorer()
    fresh = ReferenceModel.from_pretrained(checkpoint)
    assert fresh.digest(memo) == ReferenceModel.from_model(tiny_model(seed=1)).digest()


def test_a_released_reference_can_be_used_again(tmp_path, checkpoint, make_sequences, tiny_model):
    reference, sequences = ReferenceModel.from_pretrained(checkpoint), make_sequences(6)
    first = build(tmp_path / "cache", reference, sequences[:3])
    assert build(tmp_path / "cache", reference, sequences).reference == first.reference
    tiny_model(seed=1).save_pretrained(checkpoint)
    assert build(tmp_path / "cache", reference, sequences).reference != first.reference


def test_a_hub_name(checkpoint, tmp_path, monkeypatch, loads, memo):
    """Found in the local hub cache, whose snapshots are links to blobs; no download."""
    hub = tmp_path / "hub"
    snapshot, blobs = hub / "models--team--tiny" / "snapshots" / ("a" * 40), hub / "models--team--tiny" / "blobs"
    for folder in (snapshot, blobs, hub / "models--team--tiny" / "refs"):
        folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    (hub / "models--team--tiny" / "refs" / "main").write_text("a" * 40)
    reference = ReferenceModel.from_pretrained("team/tiny", cache_dir=str(hub), local_files_only=True)
    assert reference.digest(memo) == ReferenceModel.from_pretrained(checkpoint).digest()
    count = len(loads)
    ReferenceModel.from_pretrained("team/tiny", cache_dir=str(hub), local_files_only=True).digest(memo)
    assert len(loads) == count


def test_a_name_that_is_nothing(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        ReferenceModel.from_pretrained(str(tmp_path / "nowhere")).digest()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(tiny_model, temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        ReferenceModel.from_model(tiny_model(), temperature=temperature)


def test_the_real_checkpoint(shared_dir, tmp_path):
    """bfloat16 on disk, scored in float32: on real preferences, by path and from memory."""
    from transformers import AutoModelForCausalLM

    path = shared_dir / "models" / "hh-tiny"
    batch = json.loads((shared_dir / "golden" / "trl_dpo.json").read_text())["batch"]
    sequences = [
        (ids[: sum(mask)], completion.index(1))
        for ids, mask, completion in zip(
            batch["input_ids"][:4], batch["attention_mask"], batch["completion_mask"], strict=False
        )
    ]
    built = build(tmp_path / "cache", ReferenceModel.from_pretrained(path, dtype="float32"), sequences)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert build(tmp_path / "cache", ReferenceModel.from_model(model), sequences).report.computed == 0
    assert built.verify() == []
