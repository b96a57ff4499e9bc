"""Saved reward models: plain transformers' scores, pad tokens, adapters, normalisation."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel

from fastalign.models import load_scalar_adapter, load_scalar_model, reward_normalization, score_sequences

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
PROBE = [([5, 6, 7, 1], 1), ([9], 0), ([8, 1, 1], 1), ([11, 12, 13], 2)]


def plain_scores(folder, tokenizer=None) -> np.ndarray:
    """PROBE's scores by transformers alone, in one batch padded with the saved config's pad token."""
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    width = max(len(ids) for ids, _ in PROBE)
    pad = model.config.pad_token_id
    with torch.no_grad():
        batch = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in PROBE])
        return model(input_ids=batch, attention_mask=(batch != pad).long()).logits.squeeze(-1).numpy()


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_saved_model_gives_the_same_scores_in_plain_transformers(rewards, pad):
    rewards.tokenizer.pad_token = pad
    try:
        model = rewards.model(pad_token_id=1 if pad == "<eos>" else None)
        trainer = rewards.trainer(model, rewards.pairs(8), max_steps=2)
        trainer.train()
        trainer.save_model(str(rewards.folder / "saved"))
        config = json.loads((rewards.folder / "saved" / "config.json").read_text())
        assert config["pad_token_id"] not in (None, 1)
        assert (config["num_labels"] if "num_labels" in config else len(config["id2label"])) == 1
        assert config["use_cache"] is True
        loaded = tf.AutoTokenizer.from_pretrained(rewards.folder / "saved")
        assert loaded.pad_token_id == config["pad_token_id"]
        np.testing.assert_allclose(
            plain_scores(rewards.folder / "saved"), score_sequences(trainer.model, PROBE), rtol=1e-4, atol=1e-5
        )
    finally:
        rewards.tokenizer.pad_token = "<pad>"


def test_adapter_round_trip_and_merge(rewards, kit):
    kit.model().save_pretrained(rewards.folder / "base")
    trainer = rewards.trainer(
        str(rewards.folder / "base"), rewards.pairs(8), peft_config=LoraConfig(**LORA), max_steps=3, merge_adapter=True,
        normalize_rewards="mean",
    )  # fmt: skip
    trainer.train()
    expected = score_sequences(trainer.model, PROBE)
    raw = score_sequences(trainer.model, PROBE, normalise=False)
    assert not np.allclose(expected, raw)
    folder = rewards.folder / "saved"
    trainer.save_model(str(folder))
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    adapter = load_scalar_adapter(folder)
    np.testing.assert_allclose(score_sequences(adapter, PROBE), expected, rtol=1e-5, atol=1e-6)
    base = tf.AutoModelForSequenceClassification.from_pretrained(rewards.folder / "base", num_labels=1)
    plain = PeftModel.from_pretrained(base, str(folder))
    np.testing.assert_allclose(score_sequences(plain, PROBE), raw, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain_scores(folder / "merged"), raw, rtol=1e-4, atol=1e-4)
    merged = load_scalar_model(folder / "merged")
    np.testing.assert_allclose(score_sequences(merged, PROBE), expected, rtol=1e-4, atol=1e-4)
    again = rewards.trainer(str(folder), rewards.pairs(8), max_steps=1)  # training goes on from the adapter
    np.testing.assert_allclose(score_sequences(again.model, PROBE, normalise=False), raw, rtol=1e-5, atol=1e-6)
    assert any("lora_A" in name for name in kit.weights(again))


@pytest.mark.parametrize("how", ["mean", "mean_std"])
def test_normalisation_brings_the_reference_set_to_mean_zero(rewards, how):
    reference = [{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(3, 40)]  # as for SFT
    trainer = rewards.trainer(
        rewards.model(), rewards.pairs(8), max_steps=2, normalize_rewards=how, reward_reference=reference
    )
    trainer.train()
    sequences = trainer._reference_sequences()
    assert [ids for ids, _ in sequences[:1]] == [[3, 4, 1]]
    scores = score_sequences(trainer.model, sequences)
    assert abs(scores.mean()) < 1e-5
    assert scores.std() == pytest.approx(1.0, abs=1e-5) if how == "mean_std" else abs(scores.std() - 1) > 1e-3
    assert "rewards are measured from" in trainer.summary_lines()[0]
    trainer.save_model(str(rewards.folder / "saved"))
    loaded = load_scalar_model(rewards.folder / "saved")
    assert reward_normalization(loaded) == reward_normalization(trainer.model)
    again = rewards.trainer(loaded, rewards.pairs(8), max_steps=1)  # other weights: the old mean would be wrong
    again.train()
    assert reward_normalization(again.model) is None
    assert again.summary_lines() == []


def test_by_default_rewards_are_measured_on_the_training_data(rewards):
    for kind in ("pairs", "lists", "scalar"):
        data = rewards.data(kind, 6)
        trainer = rewards.trainer(
            rewards.model(), data, max_steps=1, normalize_rewards="mean", reward_reference_samples=4
        )
        trainer.train()
        count = (
            sum(len(ids) for ids in data["response_ids"][:4]) if kind == "lists" else {"pairs": 8, "scalar": 4}[kind]
        )
        assert len(trainer._reference_sequences()) == count
        assert abs(score_sequences(trainer.model, trainer._reference_sequences()).mean()) < 1e-5
