"""SFTTrainer on a tiny model: its loss is transformers' own, whatever the batch is cut into; adapters; resuming."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig

from fastalign.trainers import SFTConfig, SFTTrainer

VOCAB = 61
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def sequences(n, seed=0, longest=24, **columns):
    """Random tokens; of each sequence some are trained on, the first never."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        ids = rng.integers(3, VOCAB, rng.integers(3, longest)).tolist()
        mask = (rng.random(len(ids)) < 0.6).tolist()
        rows.append({"input_ids": ids, "completion_mask": [False, *mask[1:-1], True], "row": row} | columns)
    return Dataset.from_list(rows)


@pytest.fixture
def sft(kit):
    """make(model, train, evaluation, **settings) -> SFTTrainer"""

    def make(model=None, train=None, evaluation=None, *, tokenizer=None, peft_config=None, formatting_func=None,
             **settings):  # fmt: skip
        defaults = {
            "output_dir": str(kit.folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 0.1,
            "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
        }  # fmt: skip
        return SFTTrainer(
            kit.model() if model is None else model, SFTConfig(**(defaults | settings)),
            train_dataset=sequences(8) if train is None else train, eval_dataset=evaluation,
            processing_class=tokenizer or kit.tokenizer, peft_config=peft_config, formatting_func=formatting_func,
        )  # fmt: skip

    return make


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
    model, train = kit.model(kind=kind, config=config, **sizes), sequences(4)
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
    train, twin = sequences(4), kit.model().double()
    plain_loss(twin, list(train)).loss.backward()
    trainer = sft(kit.model().double(), train, max_steps=1, lr_scheduler_type="constant")
    trainer.train()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in twin.named_parameters()}
    kit.assert_same(kit.weights(trainer), expected, rtol=1e-5, atol=1e-6)  # its loss is computed in float32


def run(kit, sft, n=22, **settings):
    """Two epochs in steps of 8 sequences (22: the last step has 6), in float64."""
    settings = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch"} | settings
    trainer = sft(kit.model().double(), sequences(n), **settings)
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
    model, held_out = kit.model(), sequences(7, seed=1)
    trainer = sft(model, None, held_out, per_device_eval_batch_size=size)
    with torch.no_grad():
        expected = float(plain_loss(model.eval(), list(held_out)).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate({"a": held_out})["eval_a_loss"] == pytest.approx(expected, rel=1e-5)
    rows = [{"text": "w3 w4 w5"}, {"prompt": "w3", "completion": " w7"}]
    assert trainer.evaluate(rows)["eval_loss"] > 0


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


# Rows -----------------------------------------------------------------------------------------------------------------


ROWS = [{"prompt": "w3 w4", "completion": " w5"}, {"prompt": "w6", "completion": " w7 w8"}]


@pytest.mark.parametrize(
    ("rows", "settings", "trained"),
    [
        (ROWS, {}, [["w5", "<eos>"], ["w7", "w8", "<eos>"]]),
        (ROWS, {"completion_only_loss": False}, [["w4", "w5", "<eos>"], ["w7", "w8", "<eos>"]]),
        ([{"text": "w3 w4"}], {}, [["w4", "<eos>"]]),
        ([{"body": "w3 w4"}], {"dataset_text_field": "body"}, [["w4", "<eos>"]]),
        (
            [{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}],
            {"assistant_only_loss": True}, [["w4", "<eos>"]],
        ),
        (
            [{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}],
            {}, [["<eos>", "w4", "<eos>"]],
        ),
    ],
)  # fmt: skip
def test_what_is_trained_on_follows_the_config(kit, sft, rows, settings, trained):
    trainer = sft(train=rows, **settings)
    found = [
        [token for token, on in zip(kit.tokenizer.convert_ids_to_tokens(e["input_ids"]), e["completion_mask"],
                                    strict=True) if on]
        for e in trainer.train_dataset
    ]  # fmt: skip
    assert found == trained
    assert trainer.data_reports["train"].kept == len(rows)


def test_a_formatting_function_makes_the_text(kit, sft):
    trainer = sft(train=[{"a": "w3", "b": "w4"}], formatting_func=lambda row: f"{row['a']} {row['b']}")
    assert kit.tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "w3 w4 <eos>"
    with pytest.raises(ValueError, match="formatting_func makes plain text"):
        sft(train=[{"a": "w3"}], formatting_func=lambda row: row["a"], completion_only_loss=True)


def test_bad_rows_are_named(sft):
    with pytest.raises(ValueError, match=r"row 1: missing key \(none of 'text', 'messages'"):
        sft(train=[{"text": "w3 w4"}, {"label": 1}])
    assert len(sft(train=[{"text": "w3 w4"}, {"label": 1}], on_bad_row="skip").train_dataset) == 1


def test_the_template_and_the_end_of_sequence_can_be_chosen(kit, sft):
    path = kit.folder / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}")
    own, row = copy.deepcopy(kit.tokenizer), [{"messages": [{"role": "user", "content": "w3"}]}]
    trainer = sft(train=row, tokenizer=own, chat_template_path=str(path), eos_token="w60", max_steps=1)
    assert own.convert_ids_to_tokens(trainer.train_dataset[0]["input_ids"]) == ["<unk>", "w3", "<eos>"]
    assert trainer.model.config.eos_token_id == 60
    assert trainer.model.generation_config.eos_token_id == [60, 1]
    text = sft(train=[{"text": "w3"}], tokenizer=own)
    assert text.train_dataset[0]["input_ids"] == [3, 60]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": "<nothing>"}, "eos_token='<nothing>': it is not in the vocabulary"),
        ({"chat_template_path": "nowhere.jinja"}, "chat_template_path='nowhere.jinja': there is no such file"),
    ],
)
def test_what_a_tokenizer_cannot_be_given_is_named(sft, settings, message):
    with pytest.raises(ValueError, match=message):
        sft(**settings)


def test_another_tokenizers_template_is_taken_with_its_special_tokens_or_not_at_all(kit, sft):
    other = copy.deepcopy(kit.tokenizer)
    other.chat_template = "<|turn|> {% for m in messages %}{{ m['content'] }}{% endfor %}"
    other.save_pretrained(kit.folder / "plain")
    own = copy.deepcopy(kit.tokenizer)
    sft(train=[{"text": "w3"}], tokenizer=own, chat_template_path=str(kit.folder / "plain"))
    assert own.chat_template == other.chat_template
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.save_pretrained(kit.folder / "special")
    with pytest.raises(ValueError, match=r"its template writes <\|turn\|>, which this tokenizer does not have"):
        sft(tokenizer=own, chat_template_path=str(kit.folder / "special"))
    other.chat_template = None
    other.save_pretrained(kit.folder / "bare")
    with pytest.raises(ValueError, match="that tokenizer has no chat template"):
        sft(tokenizer=own, chat_template_path=str(kit.folder / "bare"))


def test_tokenised_data_is_checked(sft):
    with pytest.raises(ValueError, match=r"row 0 of the tokenised data set has \d+ tokens, max_length=4 is accepted"):
        sft(train=sequences(2, longest=30), max_length=4)
    with pytest.raises(ValueError, match="no data"):
        SFTTrainer(sft().model, SFTConfig("out", use_cpu=True), processing_class=sft().processing_class)


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
            kit.model(attention_dropout=0.1), sequences(22), peft_config=lora, num_train_epochs=2,
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


def test_it_learns(kit, sft):
    trainer = sft(train=sequences(4), num_train_epochs=60, optim="adamw_torch", learning_rate=0.02)
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
    with pytest.raises(ValueError, match="no logits"):
        sft().predict(sequences(2))
