"""DPOTrainer on a tiny policy: losses, adapters, evaluation, resuming."""

import math

import pytest
import torch
import transformers as tf
from peft import LoraConfig

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def mixture(kit):
    return kit.model(kind=tf.MixtralForCausalLM, config=tf.MixtralConfig, num_local_experts=4, router_aux_loss_coef=0.5)


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


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_lora_trains_the_adapter_alone(kit, checkpointing):
    policy = kit.model()
    base = {name: p.clone() for name, p in policy.named_parameters()}
    trainer = kit.trainer(
        policy,
        kit.pairs(8),
        peft_config=LoraConfig(**LORA),
        max_steps=3,
        gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs=checkpointing or None,
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


def test_lora_on_the_head_is_trained(kit):
    trainer = kit.trainer(
        kit.model(), kit.pairs(8), peft_config=LoraConfig(r=4, target_modules=["lm_head"]), max_steps=2
    )
    trainer.train()
    assert all(float(p.abs().sum()) > 0 for p in kit.weights(trainer).values())


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
