"""DPOTrainer: references, precision, adapters, resuming and saving, on a tiny policy."""

import json
import math

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from fastalign.data import BadRowsError
from fastalign.reference import PreferenceSequences, score
from fastalign.trainers import DPOTrainer
from fastalign.trainers.reference import ReferenceError

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def reference_sums(dataset):
    return [(float(e["ref_chosen_logps"].sum()), float(e["ref_rejected_logps"].sum())) for e in dataset]


# ---- reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"])
def test_starts_at_its_reference(kit, loss_type):
    trainer = kit.trainer(kit.model(), kit.pairs(6), loss_type=loss_type)
    expected = {"hinge": 1.0, "ipo": 1.0}.get(loss_type, math.log(2))  # ipo: (0 − 1/(2·0.5))²
    assert trainer.check_start() == pytest.approx(expected, abs=1e-5)


def test_length_penalty_moves_the_start(kit):
    pairs = kit.pairs(6)
    trainer = kit.trainer(kit.model(), pairs, length_alpha=0.1)
    assert abs(trainer.check_start() - math.log(2)) > 1e-3


def test_a_second_run_finds_every_log_prob(kit):
    pairs, held_out = kit.pairs(10), kit.pairs(5, seed=1)
    first = kit.trainer(kit.model(), pairs, held_out)
    second = kit.trainer(kit.model(), pairs, held_out, beta=2.0, loss_type="ipo")
    assert (first.reference_cache.report.cached, first.reference_cache.report.computed) == (0, 30)
    assert (second.reference_cache.report.cached, second.reference_cache.report.computed) == (30, 0)
    assert reference_sums(first.train_dataset) == reference_sums(second.train_dataset)


def test_cached_log_probs_are_the_references(kit):
    """Rewards from the cache equal rewards from a reference that runs beside the policy."""
    reference, policy, pairs = kit.model(seed=7), kit.model(), kit.pairs(6)
    trainer = kit.trainer(policy, pairs, ref_model=reference, max_steps=1, per_device_train_batch_size=6)
    trainer.train()
    fresh = kit.model()  # the policy before that step
    sums = [
        [float(x.sum(dtype=np.float64)) for x in score(m, list(PreferenceSequences(pairs)))] for m in (fresh, reference)
    ]
    ratios = np.subtract(*sums)
    margins = 0.5 * (ratios[0::2] - ratios[1::2])
    entry = kit.logs(trainer)[0]
    assert entry["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert entry["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)


def test_reference_by_name_equals_reference_in_memory(kit):
    kit.model(seed=7).save_pretrained(kit.folder / "reference")
    pairs = kit.pairs(6)
    by_name = kit.trainer(kit.model(), pairs, ref_model=str(kit.folder / "reference"))
    in_memory = kit.trainer(kit.model(), pairs, ref_model=kit.model(seed=7))
    assert in_memory.reference_cache.report.computed == 0
    assert reference_sums(by_name.train_dataset) == reference_sums(in_memory.train_dataset)
    assert by_name.check_start() is None


def test_the_references_own_checkpoint_is_recognised(kit):
    kit.model().save_pretrained(kit.folder / "sft")
    path = str(kit.folder / "sft")
    trainer = kit.trainer(path, kit.pairs(4), ref_model=path)
    assert trainer.check_start() == pytest.approx(math.log(2), abs=1e-5)


def test_no_reference_is_held_while_training(kit):
    reference = kit.model(seed=7)
    trainer = kit.trainer(kit.model(), kit.pairs(4), ref_model=reference)
    models = {id(m) for value in vars(trainer).values() if isinstance(value, torch.nn.Module) for m in [value]}
    assert models == {id(trainer.model)}
    assert trainer._reference is None


def tampered(trainer):
    """The cache's look-up gives log-probs that are off by half a nat, as those of another model would be."""
    original = type(trainer.reference_cache).lookup
    return lambda self, sequences: [logps - 0.5 for logps in original(self, sequences)]


def test_wrong_log_probs_are_noticed_before_training(kit, monkeypatch):
    trainer = kit.trainer(kit.model(), kit.pairs(5))
    monkeypatch.setattr(type(trainer.reference_cache), "lookup", tampered(trainer))
    second = kit.trainer(kit.model(), kit.pairs(5))
    with pytest.raises(ReferenceError, match=r"pair \d \(row \d of the data set\)"):
        second.train()


def test_wrong_log_probs_of_a_separate_reference_are_noticed(kit, monkeypatch):
    trainer = kit.trainer(kit.model(), kit.pairs(5), ref_model=kit.model(seed=7))
    monkeypatch.setattr(type(trainer.reference_cache), "lookup", tampered(trainer))
    with pytest.raises(ReferenceError, match="another cache_dir"):
        kit.trainer(kit.model(), kit.pairs(5), ref_model=kit.model(seed=7))


def test_the_policy_as_its_own_reference_model_is_refused(kit):
    model = kit.model()
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        kit.trainer(model, kit.pairs(4), ref_model=model)


# ---- data


def messages(n):
    return [
        {"prompt": f"w{3 + i} w9", "chosen": f" w{10 + i} w4", "rejected": f" w{20 + i}"} for i in range(n)
    ]  # fmt: skip


def test_rows_are_tokenised_and_bad_ones_reported(kit):
    rows = [*messages(6), {"prompt": "w3", "chosen": " w4", "rejected": " w4"}]
    with pytest.raises(BadRowsError, match="row 6"):
        kit.trainer(kit.model(), rows)
    trainer = kit.trainer(kit.model(), rows, on_bad_row="skip", max_steps=1)
    assert trainer.data_reports["train"].kept == 6
    trainer.train()


def test_data_named_in_the_config(kit):
    file = kit.folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in messages(10)))
    kit.model().save_pretrained(kit.folder / "policy")
    kit.tokenizer.save_pretrained(kit.folder / "policy")
    args = kit.config(
        model_name_or_path=str(kit.folder / "policy"), dataset_name=str(file), dataset_train_split="train[:8]",
        dataset_test_split="train[8:]", max_steps=1,
    )  # fmt: skip
    trainer = DPOTrainer(args=args)
    trainer.train()
    assert len(trainer.train_dataset) == 8
    assert len(trainer.eval_dataset) == 2
    assert "eval_loss" in trainer.evaluate()


def test_tokenised_rows_are_checked(kit):
    pairs = kit.pairs(3)
    with pytest.raises(ValueError, match=r"row \d of the tokenised data set has \d+ tokens, max_length=8"):
        kit.trainer(kit.model(), pairs, max_length=8)
    empty = pairs.map(lambda row: {"chosen_ids": [] if row["row"] == 1 else row["chosen_ids"]})
    with pytest.raises(ValueError, match="chosen_ids of row 1"):
        kit.trainer(kit.model(), empty)


def test_evaluation_sets_by_name(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4), {"a": kit.pairs(3, seed=1), "b": kit.pairs(5, seed=2)})
    metrics = trainer.evaluate()
    assert metrics["eval_a_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "eval_b_rewards/margins_se" in metrics
    assert trainer.evaluate("b", metric_key_prefix="again").keys() >= {"again_loss"}


def test_another_data_set_can_be_evaluated_while_the_reference_is_there(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4), kit.pairs(3, seed=1), max_steps=2)
    before = trainer.evaluate(kit.pairs(3, seed=2))
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    assert trainer.evaluate(kit.pairs(3, seed=2))["eval_loss"] != before["eval_loss"]  # its log-probs are cached
    with pytest.raises(ValueError, match="the reference is gone"):
        trainer.evaluate(kit.pairs(3, seed=3))


def test_a_reference_by_name_scores_new_data_at_any_time(kit):
    kit.model(seed=7).save_pretrained(kit.folder / "reference")
    trainer = kit.trainer(kit.model(), kit.pairs(4), ref_model=str(kit.folder / "reference"), max_steps=2)
    trainer.train()
    assert "eval_loss" in trainer.evaluate(kit.pairs(3, seed=3))


# ---- precision


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


def test_bfloat16_autocast_over_float32_weights(kit):
    exact = kit.trainer(kit.model(), kit.pairs(8), num_train_epochs=2, learning_rate=0.01)
    exact.train()
    mixed = kit.trainer(kit.model(), kit.pairs(8), num_train_epochs=2, learning_rate=0.01, bf16=True)
    assert mixed.reference_cache.reference != exact.reference_cache.reference  # computed as it trains
    assert mixed.check_start() == pytest.approx(math.log(2), abs=0.02)
    mixed.train()
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    for a, b in zip(kit.logs(mixed), kit.logs(exact), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)


def test_dropout_is_off_unless_wanted(kit):
    trainer = kit.trainer(kit.model(attention_dropout=0.5), kit.pairs(4))
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0.0
    trainer = kit.trainer(kit.model(attention_dropout=0.5), kit.pairs(4), disable_dropout=False)
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0.5


# ---- adapters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(kit, checkpointing):
    policy = kit.model()
    base = {name: p.clone() for name, p in policy.named_parameters()}
    trainer = kit.trainer(
        policy, kit.pairs(8), peft_config=LoraConfig(**LORA), max_steps=3, gradient_checkpointing=checkpointing
    )
    assert trainer.check_start() == pytest.approx(math.log(2), abs=1e-5)
    before = kit.weights(trainer)
    trainer.train()
    after = kit.weights(trainer)
    assert all("lora_" in name for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")])
    losses = [entry["loss"] for entry in kit.logs(trainer)]
    assert losses[-1] != losses[0]


def test_the_adapter_never_enters_the_reference(kit):
    full = kit.trainer(kit.model(), kit.pairs(6))
    adapter = kit.trainer(kit.model(), kit.pairs(6), use_peft=True, lora_target_modules=["q_proj"], seed=3)
    wrapped = kit.trainer(get_peft_model(kit.model(), LoraConfig(**LORA)), kit.pairs(6))
    assert adapter.reference_cache.report.computed == wrapped.reference_cache.report.computed == 0
    assert full.reference_cache.reference == wrapped.reference_cache.reference


def test_an_sft_adapter_is_part_of_its_reference(kit):
    torch.manual_seed(1)
    sft = get_peft_model(kit.model(), LoraConfig(**LORA, init_lora_weights=False))
    expected = [float(x.sum()) for x in score(sft, list(PreferenceSequences(kit.pairs(4))), adapter="default")]
    base = [float(x.sum()) for x in score(kit.model(), list(PreferenceSequences(kit.pairs(4))))]
    trainer = kit.trainer(sft, kit.pairs(4), max_steps=2)
    assert np.allclose([x for pair in reference_sums(trainer.train_dataset) for x in pair], expected, rtol=1e-5)
    assert not np.allclose(expected, base, rtol=1e-3)
    assert trainer.check_start() == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()


def test_lora_on_the_head_is_trained(kit):
    trainer = kit.trainer(
        kit.model(), kit.pairs(8), peft_config=LoraConfig(r=4, target_modules=["lm_head"]), max_steps=2
    )
    trainer.train()
    assert all(float(p.abs().sum()) > 0 for p in kit.weights(trainer).values())


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


# ---- mixture of experts


def mixture(kit):
    return kit.model(kind=tf.MixtralForCausalLM, config=tf.MixtralConfig, num_local_experts=4, router_aux_loss_coef=0.5)


def test_router_loss_is_added_with_its_weight(kit):
    def first(**settings):
        trainer = kit.trainer(mixture(kit), kit.pairs(4), max_steps=1, **settings)
        trainer.train()
        return kit.logs(trainer)[0]

    own, off, twice = first(), first(router_aux_loss_coef=0.0), first(router_aux_loss_coef=1.0)
    assert "aux_loss" not in off
    assert own["loss"] == pytest.approx(off["loss"] + 0.5 * own["aux_loss"], rel=1e-5)
    assert twice["loss"] == pytest.approx(off["loss"] + own["aux_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no load-balancing loss"):
        kit.trainer(kit.model(), kit.pairs(4), router_aux_loss_coef=0.1)


# ---- resuming and saving


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_training_ends_in_the_same_weights(kit, adapter):
    def make():
        lora = LoraConfig(**LORA, lora_dropout=0.3) if adapter else None  # dropout: the random state must come back too
        return kit.trainer(
            kit.model(), kit.pairs(22), peft_config=lora, num_train_epochs=2, optim="adamw_torch", learning_rate=0.01,
            save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, max_grad_norm=1.0,
        )  # fmt: skip

    whole = make()
    whole.train()
    checkpoints = sorted(path.name for path in (kit.folder / "out").glob("checkpoint-*"))
    assert "checkpoint-4" in checkpoints
    resumed = make()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-4"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    assert kit.logs(resumed)[-1]["loss"] == kit.logs(whole)[-1]["loss"]
    assert kit.logs(resumed)[-1]["num_tokens"] == kit.logs(whole)[-1]["num_tokens"]


def test_a_checkpoint_of_another_reference_is_refused(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(8), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    other = kit.trainer(kit.model(seed=5), kit.pairs(8), max_steps=2)
    with pytest.raises(ValueError, match="trained against reference"):
        other.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-1"))


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


# ---- refusals


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
