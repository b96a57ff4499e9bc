"""PPO under LoRA, and which reference a run has: no second model, the base untouched, what is saved loads elsewhere."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], task_type="CAUSAL_LM")


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("critic", ["own", "head", "none"])
def test_the_reference_is_the_policy_without_its_adapter(kit, critic):
    base = kit.model()
    before = parameters(base)
    settings = {"own": {}, "head": {"value_head": True}, "none": {"advantage_estimator": "reinforce"}}[critic]
    trainer = kit.ppo(base, peft_config=LORA, learning_rate=0.05, **settings)
    reference, adapter = trainer.collector.reference
    assert reference is trainer.actor_critic.policy  # no second model in memory
    assert adapter is None
    trainer.train()
    first, *_, last = kit.logs(trainer)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-8)
    assert last["objective/kl"] > 0.01
    inner = trainer.actor_critic.policy.get_base_model()
    for name, parameter in inner.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace("base_layer.", "")]), name
            assert not parameter.requires_grad
    assert any(p.requires_grad for name, p in inner.named_parameters() if "lora_B" in name)


def test_kl_is_to_the_reference_by_hand(kit):
    trainer = kit.ppo(kit.model(), peft_config=LORA, learning_rate=0.05, max_steps=2)
    seen = []
    collect = trainer.collector.collect
    trainer.collector.collect = lambda *a, **k: seen.append((a[0], *collect(*a, **k))) or seen[-1][1:]
    generate = trainer.collector.sampler.generate
    rolled = []
    trainer.collector.sampler.generate = lambda *a, **k: rolled.append(generate(*a, **k)) or rolled[-1]
    trainer.train()
    policy = trainer.actor_critic.policy.eval()
    prompts, batch, _ = seen[1]
    start = 0
    for ids, completion in zip(prompts.prompt_ids, rolled[1], strict=True):
        whole = torch.tensor([ids + completion.ids])
        with torch.no_grad(), policy.disable_adapter():
            logps = policy(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        found = batch["ref_logps"][start : start + len(completion.ids)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        start += len(completion.ids)
    assert kit.logs(trainer)[1]["objective/kl"] == pytest.approx(
        float((batch["old_logps"] - batch["ref_logps"]).sum() / len(rolled[1])), rel=1e-4
    )


def test_an_sft_adapter_is_part_of_the_reference(kit):
    sft = get_peft_model(kit.model(), LORA)
    with torch.no_grad():
        for name, parameter in sft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = kit.ppo(sft, learning_rate=0.05)
    reference, adapter = trainer.collector.reference
    assert reference is not sft
    assert adapter == "default"
    assert not any(p.requires_grad for p in reference.parameters())
    before = parameters(reference)
    trainer.train()
    assert kit.logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert kit.logs(trainer)[2]["objective/kl"] != pytest.approx(0, abs=1e-3)
    kit.assert_same(parameters(reference), before, rtol=0, atol=0)


def test_a_reference_of_its_own(kit):
    """In memory and by name; the KL is not 0 at the first step, and the policy still trains."""
    other = kit.model(seed=7)
    other.save_pretrained(kit.folder / "reference")
    found = []
    for settings in ({"ref_model": other}, {"ref_model_name_or_path": str(kit.folder / "reference")}):
        trainer = kit.ppo(kit.model(), max_steps=2, **settings)
        before = kit.weights(trainer)
        trainer.train()
        found.append([entry["objective/kl"] for entry in kit.logs(trainer)])
        assert any(not torch.equal(before[name], p) for name, p in kit.weights(trainer).items())
    assert found[0] == found[1]
    assert found[0][0] > 1


def test_a_reference_that_cannot_be(kit):
    model = kit.model()
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        kit.ppo(model, ref_model=model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="name two references"):
        kit.ppo(ref_model=kit.model(1), ref_model_name_or_path="x")
    with pytest.raises(ValueError, match="kl_coef and kl_loss_coef are 0"):
        kit.ppo(ref_model=kit.model(1), kl_coef=0.0)
    assert kit.ppo(kl_coef=0.0).collector.reference is None  # no KL, no model for it


def test_a_whole_policy_loads_in_plain_transformers(kit):
    trainer = kit.ppo(learning_rate=0.02)
    trainer.train()
    trainer.save_model()
    out = kit.folder / "out"
    ids = torch.randint(3, 61, (2, 9))
    policy = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, trainer.actor_critic.policy.eval()(ids).logits)
        critic = AutoModelForSequenceClassification.from_pretrained(out / "critic")
        mine = trainer.actor_critic.critic.eval()
        torch.testing.assert_close(critic(ids).logits, mine(ids).logits)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    again = kit.ppo(str(out), value_model=str(out / "critic"))  # a run that goes on from both
    kit.assert_same(parameters(again.actor_critic), parameters(trainer.actor_critic), rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_loads_in_plain_peft(kit, merged):
    kit.model().save_pretrained(kit.folder / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer = kit.ppo(str(kit.folder / "base"), peft_config=config, learning_rate=0.05, merge_adapter=merged)
    trainer.train()
    trainer.save_model()
    ids = torch.randint(3, 61, (2, 9))
    with torch.no_grad():
        expected = trainer.actor_critic.policy.eval()(ids).logits
        plain = PeftModel.from_pretrained(kit.model(), kit.folder / "out")
        torch.testing.assert_close(plain(ids).logits, expected)
        assert not torch.allclose(kit.model()(ids).logits, expected)
        assert (kit.folder / "out" / "merged").is_dir() == merged
        if merged:
            whole = AutoModelForCausalLM.from_pretrained(kit.folder / "out" / "merged")
            torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_needs_an_adapter(kit):
    trainer = kit.ppo(merge_adapter=True, max_steps=1)
    with pytest.raises(ValueError, match="the model has no adapter"):
        trainer.save_model()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kit, reentrant):
    def weights(**settings):
        trainer = kit.ppo(kit.model().double(), peft_config=LORA, optim="sgd", learning_rate=0.1, **settings)
        trainer.train()
        return kit.weights(trainer)

    got = weights(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    kit.assert_same(got, weights(), rtol=1e-6, atol=1e-8)
