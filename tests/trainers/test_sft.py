"""SFTTrainer on a tiny model: its loss is transformers' own, whatever the batch is cut into; adapters; resuming."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig

from fastalign.trainers import SFTConfig, SFTTrainer

VOCAB = 61
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def sft(kit):
    return kit.sft


def plain_loss(model, examples):
    """transformers' own: labels on the trained tokens, the model's mean over them."""
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, example in enumerate(examples):
        own = torch.tensor(example["input_ids"])
        ids[b, : len(own)], mask[b, : len(own)] = own, 1
        labels[b, : len(own)] = torch.where(torch.tensor(example["completion_mask"]), own, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
        (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 5.0}),
        (tf.GPT2LMHeadModel, tf.GPT2Config, {"n_positions": 64}),
    ],
)
def test_the_loss_is_the_models_own(kit, sft, kind, config, sizes):
    model, train = kit.model(kind=kind, config=config, **sizes), kit.sequences(4)
    trainer = sft(model, train, max_steps=1, disable_dropout=True)
    with torch.no_grad():
        expected = plain_loss(model.eval(), list(train))
    logps, right = [], []
    for logits, example in zip(expected.logits.double(), train, strict=True):
        own = torch.tensor(example["input_ids"])
        trained = torch.tensor(example["completion_mask"]).nonzero()[:, 0]
        logps.append(logits[trained - 1].log_softmax(-1))
        right.append(logits[trained - 1].argmax(-1) == own[trained])
    logp = torch.cat(logps)
    trainer.train()
    (log,) = kit.logs(trainer)
    assert log["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert log["entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), rel=1e-5)
    assert log["mean_token_accuracy"] == pytest.approx(float(torch.cat(right).double().mean()), rel=1e-6)
    assert log["num_tokens"] == sum(map(len, train["input_ids"]))
    assert "nll" not in log


def test_a_step_moves_the_weights_as_the_models_own_loss_would(kit, sft):
    train, twin = kit.sequences(4), kit.model().double()
    plain_loss(twin, list(train)).loss.backward()
    trainer = sft(kit.model().double(), train, max_steps=1, lr_scheduler_type="constant")
    trainer.train()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in twin.named_parameters()}
    kit.assert_same(kit.weights(trainer), expected, rtol=1e-5, atol=1e-6)  # its loss is computed in float32


def run(kit, sft, n=22, **settings):
    """Two epochs in steps of 8 sequences (22: the last step has 6), in float64."""
    settings = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch"} | settings
    trainer = sft(kit.model().double(), kit.sequences(n), **settings)
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_batch_tokens": 50},
        {"per_device_train_batch_size": 8, "schedule": "deferred", "gradient_checkpointing": True},
        {"per_device_train_batch_size": 8, "pad_to_multiple_of": 32, "token_metrics": False},
    ],
    ids=lambda split: "-".join(f"{name}={value}" for name, value in split.items()),
)
def test_the_split_of_a_batch_changes_nothing(kit, sft, split):
    expected, reference = run(kit, sft, per_device_train_batch_size=8, micro_batch_tokens=0)
    weights, logs = run(kit, sft, **split)
    kit.assert_same(weights, expected, **EXACT)
    assert len(logs) == len(reference) == 6
    for got, want in zip(logs, reference, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            if name in got:
                assert got[name] == pytest.approx(want[name], rel=1e-6), name


@pytest.mark.parametrize("size", [1, 3, 7])
def test_evaluation_is_over_tokens_whatever_the_batches(kit, sft, size):
    model, held_out = kit.model(), kit.sequences(7, seed=1)
    trainer = sft(model, None, held_out, per_device_eval_batch_size=size)
    with torch.no_grad():
        expected = float(plain_loss(model.eval(), list(held_out)).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate({"a": held_out})["eval_a_loss"] == pytest.approx(expected, rel=1e-5)
    rows = [{"text": "w3 w4 w5"}, {"prompt": "w3", "completion": " w7"}]
    assert trainer.evaluate(rows)["eval_loss"] > 0


def test_two_processes_give_what_one_gives(kit, sft, start, tmp_path):
    """Packed, so that they have different numbers of trained tokens; the loss is the mean over all of them."""
    settings = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch", "packing": True,
        "max_length": 32, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "micro_batch_tokens": 64,
    }  # fmt: skip
    folder = tmp_path / "two"
    folder.mkdir()
    workers = start(Path(__file__).with_name("worker.py"), folder, json.dumps(settings), "sft")
    data = kit.sequences(24), kit.sequences(7, seed=1)
    one = sft(kit.model().double(), *data, **(settings | {"per_device_train_batch_size": 4}))
    one.train()
    metrics = one.evaluate()
    workers.wait()
    two = torch.load(folder / "result.pt")
    kit.assert_same(two["weights"], kit.weights(one), **EXACT)
    for a, b in zip(two["logs"], kit.logs(one), strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert two["eval"][name] == pytest.approx(metrics[name], rel=1e-6), name


def test_the_routers_loss_is_weighted_by_tokens(kit, sft):
    def first(coef, **settings):
        model = kit.model(kind=tf.MixtralForCausalLM, config=tf.MixtralConfig, num_local_experts=4)
        settings = {"max_steps": 1, "train_sampling_strategy": "sequential"} | settings
        trainer = sft(model, router_aux_loss_coef=coef, **settings)
        trainer.train()
        return kit.logs(trainer)[0]

    off = first(0.0)
    assert "aux_loss" not in off
    for split in ({}, {"micro_batch_tokens": 1}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        log = first(0.5, **split)
        assert log["aux_loss"] > 0  # a mean over each micro-batch's own tokens, so not the same number
        assert log["loss"] == pytest.approx(off["loss"] + 0.5 * log["aux_loss"], rel=1e-5)


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
        (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 8}),
        (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 9.0}),
    ],
)
def test_packing_changes_nothing_but_the_layout(kit, sft, kind, config, sizes):
    """Loss, gradients (by the weights they move) and metrics, of all sequences in one step."""
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 64, "max_length": 32, "backend": "torch"}
    held_out = kit.sequences(9, seed=1)
    runs = []
    for other in ({"micro_batch_tokens": 0}, {"packing": True, "micro_batch_tokens": 80},
                  {"packing": True, "gradient_checkpointing": True, "eval_packing": False}):  # fmt: skip
        model = kit.model(kind=kind, config=config, **sizes)
        trainer = sft(model, kit.sequences(30), held_out, **(settings | other))
        trainer.train()
        runs.append((trainer, kit.weights(trainer), kit.logs(trainer), trainer.evaluate()))
    padded, packed, mixed = (trainer for trainer, *_ in runs)
    assert len(packed.train_dataset) == len(mixed.train_dataset) < 16
    assert len(packed.eval_dataset) < len(mixed.eval_dataset) == len(padded.eval_dataset) == 9
    (_, weights, logs, metrics), *others = runs
    for _, own_weights, own_logs, own_metrics in others:
        kit.assert_same(own_weights, weights, rtol=1e-5, atol=2e-6)
        for got, want in zip(own_logs, logs, strict=True):
            for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
                assert got[name] == pytest.approx(want[name], rel=1e-5), name
        for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
            assert own_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_a_packed_run_resumes_and_saves_a_plain_model(kit, sft):
    def make():
        return sft(
            kit.model(), kit.sequences(40), packing=True, max_length=32, per_device_train_batch_size=2,
            num_train_epochs=2, optim="adamw_torch", learning_rate=0.01, save_strategy="steps", save_steps=3,
        )  # fmt: skip

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-3"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    whole.save_model()
    assert "fastalign" not in (kit.folder / "out" / "config.json").read_text()
    loaded = tf.AutoModelForCausalLM.from_pretrained(kit.folder / "out")
    assert loaded.config._attn_implementation == "sdpa"


def test_long_sequences_are_split_or_truncated(kit, sft):
    rows = [{"text": " ".join(f"w{3 + i}" for i in range(30))}, {"text": "w3 w4"}]
    split = sft(train=rows, packing=True, packing_strategy="bfd_split", max_length=12)
    assert sorted(n for e in split.train_dataset for n in e["seq_lengths"]) == [3, 7, 12, 12]
    cut = sft(train=rows, packing=True, max_length=12)
    assert sorted(n for e in cut.train_dataset for n in e["seq_lengths"]) == [3, 12]
    assert cut.data_reports["train"].truncated_completions == 1


def test_packed_data_is_known_and_needs_packing(kit, sft):
    packed = sft(train=kit.sequences(8), packing=True, max_length=48).train_dataset
    assert sft(train=packed, packing=True, max_length=48).train_dataset is packed
    with pytest.raises(ValueError, match=r"the train data is packed \(it has seq_lengths\): set packing=True"):
        sft(train=packed, max_length=48)


def test_models_that_cannot_be_packed_are_named(sft):
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM does not attend through"):
        sft(bloom, packing=True)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(kit, sft, checkpointing):
    model = kit.model()
    base = {name: p.clone() for name, p in model.named_parameters()}
    trainer = sft(model, max_steps=3, peft_config=LoraConfig(**LORA), gradient_checkpointing=checkpointing)
    before = kit.weights(trainer)
    trainer.train()
    after = kit.weights(trainer)
    assert all("lora_" in name for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")])


def test_a_saved_model_is_transformers_own(kit, sft):
    trainer = sft(max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = tf.AutoModelForCausalLM.from_pretrained(kit.folder / "out")
    kit.assert_same(dict(loaded.named_parameters()), kit.weights(trainer), rtol=0, atol=0)
    assert loaded.config.use_cache
    assert json.loads((kit.folder / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_training_ends_in_the_same_weights(kit, sft, adapter):
    def make():
        lora = LoraConfig(**LORA, lora_dropout=0.3) if adapter else None  # dropout: the random state must come back too
        return sft(
            kit.model(attention_dropout=0.1), kit.sequences(22), peft_config=lora, num_train_epochs=2,
            optim="adamw_torch", learning_rate=0.01, save_strategy="steps", save_steps=4,
            gradient_accumulation_steps=2, max_grad_norm=1.0,
        )  # fmt: skip

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-4"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    for name in ("loss", "num_tokens", "entropy"):
        assert kit.logs(resumed)[-1][name] == kit.logs(whole)[-1][name]


def test_generation_stops_at_the_chosen_end_of_sequence(sft):
    trainer = sft(eos_token="w60")
    try:
        assert trainer.model.config.eos_token_id == 60
        assert trainer.model.generation_config.eos_token_id == [60, 1]
    finally:
        trainer.processing_class.eos_token = "<eos>"  # the session's tokenizer


def test_it_learns(kit, sft):
    trainer = sft(train=kit.sequences(4), num_train_epochs=60, optim="adamw_torch", learning_rate=0.02)
    trainer.train()
    logs = kit.logs(trainer)
    assert logs[0]["loss"] > 3.5
    assert logs[-1]["loss"] < 0.3
    assert logs[-1]["mean_token_accuracy"] > 0.95


def test_what_is_not_supported_is_refused(sft, kit):
    with pytest.raises(ValueError, match="compute_metrics is not supported"):
        SFTTrainer(kit.model(), compute_metrics=lambda output: {})
    with pytest.raises(ValueError, match="args must be a SFTConfig, got DPOConfig"):
        SFTTrainer(kit.model(), kit.config())
    with pytest.raises(ValueError, match="no data"):
        SFTTrainer(kit.model(), SFTConfig("out", use_cpu=True), processing_class=kit.tokenizer)
    with pytest.raises(ValueError, match="no logits"):
        sft().predict(kit.sequences(2))
